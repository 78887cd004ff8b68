"""The table of all published runs in docs/results.md: what each network is, how it was trained, and where its weights are."""
from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from utils.core.tables import Table, millions
from utils.options.catalog import METHODS, arch_title, method_title, title_of
from utils.options.network import NETWORK
from utils.reports.finished_runs import FinishedRun, by_exit, mean_and_deviation, of_one_training, read_runs, training_flags
from utils.runs.result_files import RESULTS

COLUMNS = ("network", "method", "exits", "10^6 MACs", "top-1 %, first exit", "last exit", "epochs", "training images", "seeds",
           "weights", "command")


def published_runs(folder: Path, page: Path) -> str:
    """Markdown of the table, and of the commands that it numbers.

    A row is a training, its seeds together. Runs of one network, schedule and set of images share a command; a row adds the flags
    in which it differs.

    Args:
        folder: holds the published runs, at any depth; nothing else is read.
        page: the file that the text is for, from which its links lead.
    """
    runs, left_out = read_runs(sorted(path.parent for path in folder.rglob(RESULTS)))
    kinds: dict[str, list[list[FinishedRun]]] = {}
    for group in of_one_training(runs):
        kinds.setdefault(_kind(group[0]), []).extend(_one_per_seed(group))
    table = Table("Top-1 on the test images after the last epoch, mean +- standard deviation over the seeds", COLUMNS)
    commands = []
    for number, groups in enumerate(sorted(kinds.values(), key=_size), start=1):
        groups.sort(key=lambda group: (list(METHODS).index(group[0].method), len(training_flags(group[0])), group[0].folder))
        flags = [training_flags(group[0]) for group in groups]
        common = {name: words for name, words in flags[0].items() if all(words == other.get(name) for other in flags)}
        commands += [f"# {number}", _command(groups[0][0], list(common.values()))]
        for group, own in zip(groups, flags):
            more = " ".join(words for name, words in own.items() if name not in common)
            table.rows.append([*_cells(group, page), f"{number} `{more}`" if more else number])
    return "\n".join([table.markdown(), "", "```bash", *commands, "```", *left_out])


def _size(groups: Sequence[Sequence[FinishedRun]]) -> tuple:
    """For an order in which large networks and long trainings come first."""
    run = groups[0][0]
    return run.dataset, -run.macs[-1], -run.settings["epochs"], run.settings["arch"], run.folder


def _kind(run: FinishedRun) -> str:
    """What the runs of one command have in common."""
    names = ("dataset", *NETWORK, "epochs", "training images", "test images", "processes")
    return repr([run.settings[name] for name in names])


def _one_per_seed(group: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """A group in parts in which no seed is there twice, since a run done again is no further seed."""
    parts: list[list[FinishedRun]] = []
    for run in group:
        part = next((part for part in parts if run.seed not in [other.seed for other in part]), None)
        if part is None:
            parts.append([run])
        else:
            part.append(run)
    return parts


def _cells(group: Sequence[FinishedRun], page: Path) -> list[object]:
    run, tops = group[0], by_exit(group)
    images = run.settings["training images"]
    weights = [path for one in group for path in sorted(one.folder.glob("model_*.pth"))]
    seeds = sorted(group, key=lambda one: one.seed)
    return [arch_title(run.settings["arch"]), method_title(run.method), len(run.macs),
            " - ".join(map(millions, (run.macs[0], run.macs[-1]))), mean_and_deviation(tops[0]), mean_and_deviation(tops[-1]),
            run.settings["epochs"], f"{title_of(run.dataset)}, {f'{images:,}' if images else 'number not stored'}",
            ", ".join(_link(str(one.seed), one.folder, page) for one in seeds),
            ", ".join(f"{_link(path.name, path, page)} ({path.stat().st_size / 1e6:.1f} MB)" for path in weights)]


def _link(text: str, path: Path, page: Path) -> str:
    return f"[{text}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def _command(run: FinishedRun, flags: Sequence[str]) -> str:
    """A command line over several lines; --seed, paths and what makes no other training are left to the reader."""
    processes = run.settings["processes"]
    python = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    program = "train_imagenet.py" if processes > 1 or run.dataset == "imagenet" else "train_cifar100.py"
    # A flag and its value stay on one line.
    text = " ".join(words.replace(" ", "\0") for words in (f"{python} {program}", "--data-root DATA", "--result_dir RUN", *flags))
    lines = textwrap.wrap(text, 116, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")
