"""Write the curves of published arrays anew: neither data, network nor weights are needed.

    python -m utils.publish published/boost
    python -m utils.publish --scores published/boost published/joint     # which score is best; of arrays with --publish_details
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, user_errors
from utils.core.tables import Table
from utils.evaluation.published import KINDS, load_arrays, redraw
from utils.evaluation.scores import compare_scores
from utils.options.parser import OneLineParser


def table_of_scores(folders: Sequence[Path]) -> str:
    """What each score gains over confidence at the same budget, in points of test accuracy, as Markdown.

    Raises:
        UserError: for a folder without arrays_dynamic.npz, or one without details.
    """
    table = Table("Points of test accuracy above confidence, at the same budget: mean (smallest to largest) over the budgets "
                  "above 40 % of the MACs", [])
    for folder in folders:
        path = folder / "arrays_dynamic.npz"
        about, parts = load_arrays(path)
        if parts.keys() != {"valid", "test"} or not all(part.details for part in parts.values()):
            raise UserError(f"{path} does not hold what scores are made of; publish it with --evalmode dynamic --publish_details")
        found = compare_scores(parts["valid"], parts["test"], about["macs"])
        for kind in ("geometric", "optimised"):
            gains = {name: of_kind[kind] for name, of_kind in found.items() if name != "confidence"}
            table.columns = ["network, thresholds", *gains]
            table.rows.append([f"{folder.name}, {kind}", *(f"{gain.mean:+.2f} ({gain.smallest:+.2f} to {gain.largest:+.2f})"
                                                           for gain in gains.values())])
    return table.markdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.publish", description="Write the curves of published arrays anew.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder with arrays_anytime.npz or arrays_dynamic.npz")
    parser.add_argument("--optimised", action="store_true",
                        help="write the curve of thresholds chosen for accuracy as well (dynamic_optimised.json), and print how "
                             "far it is above that of eq. 9")
    parser.add_argument("--scores", action="store_true",
                        help="write nothing, but compare what may be held against the thresholds: confidence, margin, entropy, "
                             "agreement of the exits")
    args = parser.parse_args(argv)
    with user_errors():
        if args.scores:
            print(table_of_scores([Path(folder) for folder in args.folders]))
            return 0
        for folder in map(Path, args.folders):
            kinds = [kind for kind in KINDS if (folder / f"arrays_{kind}.npz").is_file()]
            if not kinds:
                raise UserError(f"{folder} has no arrays_anytime.npz or arrays_dynamic.npz; evaluation with --publish "
                                "writes them")
            for kind in kinds:
                print(*redraw(folder, kind, optimised=args.optimised), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
