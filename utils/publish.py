"""Write the curves of published arrays anew: neither data, network nor weights are needed.

    python -m utils.publish published/boost
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, user_errors
from utils.evaluation.published import KINDS, redraw
from utils.options.parser import OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser("python -m utils.publish", description="Write the curves of published arrays anew.")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder with arrays_anytime.npz or arrays_dynamic.npz")
    parser.add_argument("--optimised", action="store_true",
                        help="write the curve of thresholds chosen for accuracy as well (dynamic_optimised.json), and print how "
                             "far it is above that of eq. 9")
    args = parser.parse_args(argv)
    with user_errors():
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
