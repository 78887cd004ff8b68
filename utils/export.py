"""Write a trained network as files that run without this repository's code.

    python -m utils.export RUN_DIR OUT_DIR                  # torch.export programs, step0.pt2, step1.pt2, ...
    python -m utils.export RUN_DIR OUT_DIR --format onnx    # ONNX programs, step0.onnx, step1.onnx, ...

One program per exit, see `utils.evaluation.programs`, and `model.json` beside them. docs/deployment.md has loaders.
"""
from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError, user_errors
from utils.evaluation import operating_points
from utils.evaluation.fast_form import load_model
from utils.evaluation.programs import ABOUT, SUFFIXES, write_folder
from utils.options.catalog import THRESHOLDS
from utils.options.flags import architecture
from utils.options.parser import OneLineParser
from utils.runs import checkpoint
from utils.runs.result_files import averaged_words

# What makes evaluation write each kind of thresholds.
FLAGS = {"geometric": "", "optimised": " --thresholds optimised", "promise": " --max_drop P"}


@user_errors()
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    run, out = Path(args.run), Path(args.out)
    path = run if run.is_file() else run / checkpoint.BEST
    model, saved = load_model(path, arch=args.arch)
    curve = operating_points.stored_curve(path.parent, saved, family=THRESHOLDS.get(args.thresholds, args.thresholds),
                                          calibrated=args.calibrate)
    if not curve:
        flags = FLAGS[args.thresholds] + " --calibrate" * args.calibrate
        raise UserError(f"{path.parent} has no thresholds of this checkpoint; fit them first: eval_cifar100.py --data-root "
                        f"DATA --evaluate-from {path} --evalmode dynamic{flags}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; name a new folder")
    points = curve["points"]
    written = write_folder(model, saved, points, out, args.format, args.thresholds,
                           hold_out=operating_points.hold_out_exits(curve), calibration=curve.get("calibration"))
    for n, (file, difference) in enumerate(written):
        checked = "" if difference is None else f", at most {difference:.1e} of an output's largest value from PyTorch"
        print(f"{out / file.name}: exit {n + 1} of {model.n_exits}, {file.stat().st_size / 1e6:.2f} MB{checked}", flush=True)
    if averaged := averaged_words(saved):
        print(f"{path} holds {averaged}")
    print(f"{out / ABOUT}: thresholds of {len(points)} budget{'s' * (len(points) != 1)}, costs, class names")
    return 0


def build_parser() -> ArgumentParser:
    parser = OneLineParser(prog="python -m utils.export", allow_abbrev=False,
                           description="Write a trained network as programs that need no repository, one per exit.")
    parser.add_argument("run", metavar="RUN_DIR", help=f"folder of a run, of which {checkpoint.BEST} is taken; or a checkpoint. "
                        "--evalmode dynamic must have left its thresholds there")
    parser.add_argument("out", metavar="OUT_DIR", help="new folder for the programs")
    parser.add_argument("--arch", type=architecture, metavar="FILE.py:FUNCTION",
                        help="makes the network, where it is your own: a checkpoint never runs code by itself")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="torch",
                        help="torch.export programs, or ONNX, checked against PyTorch (default: %(default)s)")
    parser.add_argument("--thresholds", choices=tuple(FLAGS), default="geometric",
                        help="which of the stored thresholds: those of eq. 9, those chosen for accuracy (--thresholds "
                             "optimised) or those of a promise (--max_drop) (default: %(default)s)")
    parser.add_argument("--calibrate", action="store_true",
                        help="thresholds of --calibrate, with the temperatures that go with them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
