"""Time the parts of the program.

    python -m utils.benchmark sweep                       # threshold search and budgeted evaluation
    python -m utils.benchmark sweep --json speed.jsonl    # also append one JSON line per measurement
    python -m utils.benchmark sweep --compare speed.jsonl # exit code 1 when something became slower
"""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.benchmarks import input_pipeline, sweep
from utils.benchmarks.measure import count
from utils.cli import OneLineParser
from utils.errors import UserError, user_errors
from utils.run import choose_device, versions
from utils.tables import format_table

# Every benchmark is a module with add_arguments(parser) and run(args, device) -> list of measurements.
BENCHMARKS = {"input": input_pipeline, "sweep": sweep}


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with user_errors():
        device = choose_device(args.device, "0", args.threads)
        earlier = read_json_lines(Path(args.compare)) if args.compare else []
        machine = versions(device)
        lines = [{**result.summary(), **machine} for result in BENCHMARKS[args.name].run(args, device)]
        print(report(args.name, lines, machine))
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
        benchmark.add_argument("--json", metavar="FILE", help="append the results to FILE, one JSON line each")
        benchmark.add_argument("--compare", metavar="FILE", help="compare with the last results in FILE")
        benchmark.add_argument("--tolerance", type=float, default=0.2, help="how much slower --compare accepts, 0.2 is 20 %%")
    return parser


def report(name: str, lines: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The measurements as a table under a line that names the machine."""
    config = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                       for key, value in lines[0]["config"].items())
    where = f"{machine['device']}, {machine['threads']} CPU threads, torch {machine['torch']}"
    rows = [[line["name"], line["n"], *(f"{line[key]:.4g}" for key in ("median", "p10", "p90")), line["unit"]]
            for line in lines]
    return format_table([name, "repeats", "median", "p10", "p90", "unit"], rows, title=f"{where}; {config}")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; write it with --json first") from None
    except ValueError as error:
        raise UserError(f"{path} is not a file of --json results: {error}") from None


def compare(lines: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]], tolerance: float) -> int:
    """Print the ratio to the last earlier result of each name and configuration; 1 if a time grew beyond the tolerance."""
    slower = False
    for line in lines:
        before = [old for old in earlier if (old["name"], old["config"]) == (line["name"], line["config"])]
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
