"""Time the parts of the program.

    python -m utils.benchmark sweep                       # threshold search and budgeted evaluation
    python -m utils.benchmark sweep --json speed.jsonl    # also append one JSON line per measurement
    python -m utils.benchmark sweep --compare speed.jsonl # exit code 1 when something became slower
    python -m utils.benchmark early_exit --network ranet8 # early exit against running the whole network
    python -m utils.benchmark train --network ranet8      # released manner, default and fast path of training
    python -m utils.benchmark scaling                     # cost against batch size, exits, image size and samples
"""
from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.benchmarks import early_exit, input_pipeline, scaling, sweep, training
from utils.benchmarks.measure import count
from utils.core.errors import UserError, user_errors
from utils.core.machine import choose_device, versions
from utils.core.tables import format_table
from utils.options.parser import OneLineParser, is_path, number

# Every benchmark is a module with add_arguments(parser) and run(args, device) -> list of measurements, and may have a
# report(lines, where) of its own.
BENCHMARKS = {"early_exit": early_exit, "input": input_pipeline, "scaling": scaling, "sweep": sweep, "train": training}


SAME = ("name", "config", "unit", "device", "threads")   # what makes two results comparable


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with user_errors():
        device = choose_device(args.device, "0", args.threads)
        earlier = read_json_lines(Path(args.compare)) if args.compare else []
        machine = versions(device)
        benchmark = BENCHMARKS[args.name]
        lines = [{**result.summary(), **machine} for result in benchmark.run(args, device)]
        where = f"{machine['device']}, {machine['threads']} CPU threads, torch {machine['torch']}"
        print(benchmark.report(lines, where) if hasattr(benchmark, "report") else report(args.name, lines, where))
        if args.json:
            with open(args.json, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        return compare(lines, earlier, args.tolerance) if args.compare else 0


def build_parser() -> OneLineParser:
    parser = OneLineParser("python -m utils.benchmark", description=__doc__.splitlines()[0])
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        summary = module.__doc__.splitlines()[0]
        benchmark = benchmarks.add_parser(name, help=summary, description=summary)
        module.add_arguments(benchmark)
        benchmark.add_argument("--repeats", type=count, default=5, help="timed repeats; the first call of all is not timed")
        benchmark.add_argument("--threads", type=count, help="CPU threads of torch; default: torch's own choice")
        benchmark.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
        benchmark.add_argument("--json", type=file_name, metavar="FILE", help="append the results to FILE, one JSON line each")
        benchmark.add_argument("--compare", type=file_name, metavar="FILE", help="compare with the last results in FILE")
        benchmark.add_argument("--tolerance", type=not_negative, default=0.2,
                               help="how much slower --compare accepts, 0.2 is 20 %%")
    return parser


def file_name(text: str) -> str:
    if not is_path(text):
        raise ArgumentTypeError(f"expected the name of a file, got {text!r}")
    return text


def not_negative(text: str) -> float:
    value = number(text)
    if value < 0:
        raise ArgumentTypeError(f"must not be negative, got {text}")
    return value


def report(name: str, lines: Sequence[dict[str, Any]], where: str) -> str:
    """The measurements as a table under a line that names the machine."""
    config = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                       for key, value in lines[0]["config"].items())
    rows = [[line["name"], line["n"], *(f"{line[key]:.4g}" for key in ("median", "p10", "p90")), line["unit"]]
            for line in lines]
    return format_table([name, "repeats", "median", "p10", "p90", "unit"], rows, title=f"{where}; {config}")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The results that --json wrote.

    Raises:
        UserError: when there is no such file, or a line of it is something that `compare` cannot use.
    """
    try:
        results = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write it with --json first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of --json results: {error}") from None
    for i, result in enumerate(results):
        if not (isinstance(result, dict) and {"name", "config", "median"} <= result.keys()
                and type(result["median"]) in (int, float) and 0 < result["median"] < 1e300):
            raise UserError(f"{path} is not a file of --json results: its result {i + 1} lacks a name, a config or a median > 0")
    return results


def compare(lines: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]], tolerance: float) -> int:
    """Print the ratio to the last earlier result of the same thing; 1 if a time grew beyond the tolerance."""
    slower = False
    for line in lines:
        before = [old for old in earlier if all(old.get(name) == line.get(name) for name in SAME)]
        if not before:
            print(f"{line['name']}: nothing to compare with")
            continue
        ratio = line["median"] / before[-1]["median"]
        # Times should not grow, rates such as images/s should not fall.
        worse = ratio > 1 + tolerance if line["unit"] in ("s", "ms", "%") else ratio < 1 / (1 + tolerance)
        slower |= worse
        print(f"{line['name']}: {ratio:.2f} of the earlier median{', SLOWER' if worse else ''}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
