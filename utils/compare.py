"""Train every method at the same recipe, evaluate each in both prediction modes, and put all into one table and one figure.

    python -m utils.compare                                      # a small MSDNet on `glyphs`, in results/compare
    python -m utils.compare --methods boost,joint --epochs 8
    python -m utils.compare --result_dir results/c100 --dataset cifar100 --data-root data/cifar100 --nBlocks 5 --nChannels 16

Every flag besides --result_dir, --methods and --svg is one of train_cifar100.py's and goes to all runs; it wins over the small
recipe. A run has its own folder, named after its method. Started again, the command leaves finished runs alone and goes on with
one that was interrupted. The networks compared are those of the last epoch, which nothing has chosen. Exits that were trained
jointly are also read as ensembles (--ensemble of eval_cifar100.py).
"""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models import expand_temperatures
from utils.core.errors import FAILURE, STOPPED, UserError, user_errors
from utils.core.files import atomic_write
from utils.core.log import say
from utils.core.signals import SIGNALS
from utils.options.flags import build_parser
from utils.options.parser import OneLineParser, is_path
from utils.reports.comparison import FOOTPRINT, draw, markdown, read_row, text
from utils.reports.finished_runs import read_evaluation
from utils.reports.style import save
from utils.runs.checkpoint import LATEST, load_latest
from utils.runs.result_files import RESULTS, stem

ROOT = Path(__file__).parent.parent
COMMAND = "command.json"
N_BUDGETS = 40   # of a whole curve

# A few minutes a method on one core, as in msdnet_scripts/quickstart.sh.
RECIPE = ("--dataset glyphs --threads 1 --use-valid --arch msdnet_ge --nBlocks 4 --base 1 --step 2 --nChannels 4 --growthRate 4 "
          "--epochs 4 --lr_milestones 2,3 --batch-size 64").split()
# What evaluation is told again; all else it finds in the checkpoint.
PLACE = ("data_root", "device", "gpu", "threads", "val_workers", "decoder", "skip_unreadable")
# Flags that this program sets, or has no use for.
OWN = ("method", "resume", "checkpoint", "start_epoch", "tensorboard_dir", "evaluate_from", "evalmode", "ensemble", "policy",
       "budget", "cost", "images", "sweep", "flat_curve", "save_suffix", "publish")


class Recipe(NamedTuple):
    """What a method needs besides the common flags.

    Attributes:
        flags: of its own.
        after: the method whose trained network it starts from.
        ensembles: other ways to read its exits that are compared too.
    """

    flags: tuple[str, ...] = ()
    after: str | None = None
    ensembles: tuple[str, ...] = ()


RECIPES = {"joint": Recipe(ensembles=("boost", "average", "poe")), "imta": Recipe(after="joint"),
           "block_losses": Recipe(flags=("--overlap", "3"))}


class Failed(Exception):
    """A run ended with an error, which it has printed itself."""

    def __init__(self, code: int) -> None:
        self.code = code


def method_names() -> list[str]:
    """The methods of the command line."""
    return next(list(action.choices) for action in build_parser()._actions if action.dest == "method")


def recipe_of(method: str) -> Recipe:
    return RECIPES.get(method, Recipe())


def flags_of(method: str, flags: Sequence[str]) -> list[str]:
    """All flags of a method's training: those given come behind its own, and win."""
    own = recipe_of(method).flags
    if any(word.partition("=")[0] == "--groups" for word in flags):   # the other way to say what --overlap says
        own = ()
    return ["--method", method, *own, *flags]


def train(method: str, folder: Path, flags: Sequence[str]) -> None:
    """Train one method in folder/method, unless that is done.

    Raises:
        Failed: when the run did not end well.
    """
    run, recipe = folder / method, recipe_of(method)
    command = flags_of(method, flags)
    if _json(run / COMMAND) == command and "test" in _content(run / RESULTS):
        return
    run.mkdir(parents=True, exist_ok=True)
    start = ["--resume"]
    if recipe.after and not (run / LATEST).exists():
        start = ["--checkpoint", str(folder / recipe.after / LATEST)]
    _call([str(ROOT / "utils" / "footprint.py"), str(run / FOOTPRINT), str(ROOT / "train_cifar100.py"), "--result_dir", str(run),
           *command, *start])
    with atomic_write(run / COMMAND) as file:   # behind a refusal to resume with other flags, the old ones stay
        file.write(json.dumps(command).encode())


def require_same_start(method: str, folder: Path, epochs: int) -> None:
    """Refuse to go on with a run that started from a network which `epochs` makes another one.

    Raises:
        UserError: when the run has begun and is of another number of epochs.
    """
    run, after = folder / method, recipe_of(method).after
    saved = load_latest(run) if after else None
    begun = saved["training"]["config"].get("epochs") if saved else epochs
    if begun != epochs:
        raise UserError(f"{run} started from the network of {after} after {begun} epochs, and --epochs {epochs} makes that "
                        f"another; move {run} away to train it anew, or name another --result_dir")


def readings(method: str, folder: Path, temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """How the exits of a trained method are read, as its evaluation files say it; the usual way first.

    Args:
        temperatures: of the additive head, for exits that were trained alone and are added up.
    Raises:
        UserError: when the run's results.json is something else.
    """
    path = folder / method / RESULTS
    try:
        n_exits = len(_content(path)["test"]["macs"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is of something else; train this run again") from error
    return [{}, *({"ensemble": ensemble, "temperatures": expand_temperatures(temperatures, n_exits)}
                  for ensemble in recipe_of(method).ensembles)]


def evaluate(method: str, folder: Path, flags: Sequence[str], temperatures: Sequence[float]) -> None:
    """Write the evaluation files of one method that are missing, older than its checkpoint, or of other flags."""
    checkpoint = folder / method / LATEST
    found = readings(method, folder, temperatures)
    epoch = _content(folder / method / RESULTS)["test"].get("epoch")
    for reading in found:
        ensemble = reading.get("ensemble")
        how = ["--ensemble", ensemble] if ensemble else []
        how += ["--ensemble_reweight", ",".join(map(str, temperatures))] if ensemble == "boost" else []
        for mode in ("anytime", "dynamic"):
            path = folder / method / f"{stem(mode, reading)}.json"
            if not path.exists() or path.stat().st_mtime < checkpoint.stat().st_mtime or not _is_usual(path, ensemble, epoch):
                _call([str(ROOT / "eval_cifar100.py"), "--evaluate-from", str(checkpoint), "--evalmode", mode, *flags, *how],
                      quiet=True)


def _is_usual(path: Path, ensemble: str | None, epoch: int | None) -> bool:
    """Whether an evaluation file is what this program would write: somebody may have evaluated here with other flags."""
    try:
        content = read_evaluation(path)
    except UserError:
        return False
    if content.get("ensemble") != ensemble or content.get("epoch") != epoch:
        return False
    return "points" not in content or (content["family"] == "eq9" and len(content["points"]) == N_BUDGETS
                                       and not content["flat"] and not content.get("augmented_hold_out"))


def _json(path: Path) -> Any:
    """Content of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _content(path: Path) -> dict[str, Any]:
    """The same of a file that holds names and values; {} where it is something else."""
    content = _json(path)
    return content if isinstance(content, dict) else {}


def _call(command: Sequence[str], *, quiet: bool = False) -> None:
    """Run a Python script, passing signals on to it; `quiet` keeps all but its errors from the terminal."""
    print("+", *command, flush=True)
    stdout = subprocess.DEVNULL if quiet else None
    # In a session of its own, Ctrl-C reaches it once, from here, and not from the terminal as well.
    with subprocess.Popen([sys.executable, *command], stdout=stdout, start_new_session=True) as child, _passed_on(child):
        code = child.wait()
    if code:
        raise Failed(code)


@contextmanager
def _passed_on(child: subprocess.Popen) -> Iterator[None]:
    before = [signal.signal(number, lambda received, frame: child.send_signal(received)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def parse(argv: Sequence[str] | None) -> tuple[Namespace, list[str], list[str]]:
    """The program's own flags, and those for training and for evaluation."""
    known = method_names()

    def methods(given: str) -> list[str]:
        names = list(dict.fromkeys(given.split(",")))
        for name in names:
            if name not in known:
                raise ArgumentTypeError(f"there is no method {name!r}; choose from {','.join(known)}")
            after = recipe_of(name).after
            if after and after not in names:
                raise ArgumentTypeError(f"{name} starts from the network of {after}; add that")
        return sorted(names, key=lambda name: recipe_of(name).after is not None)

    parser = OneLineParser("python -m utils.compare", description=__doc__, allow_abbrev=False,
                           formatter_class=RawDescriptionHelpFormatter, usage="%(prog)s [flags] [flags of train_cifar100.py]")
    parser.add_argument("--result_dir", default="results/compare", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--methods", type=methods, default=",".join(known), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--svg", action="store_true", help="write compare.svg beside compare.png")
    own, rest = parser.parse_known_args(argv)
    if not is_path(own.result_dir):
        parser.error("argument --result_dir: must be a path")
    training = build_parser()
    training.prog = parser.prog
    given, explicit = training.parse_given(RECIPE + rest)
    unwanted = [training.spelling(name) for name in OWN if name in explicit]
    if unwanted:
        parser.error(f"{' and '.join(unwanted)} cannot be chosen here: the program sets it, or has no use for it")
    place = [word for name in PLACE if name in explicit
             for word in (training.spelling(name), *([] if getattr(given, name) is True else [str(getattr(given, name))]))]
    own.temperatures, own.epochs = given.ensemble_reweight, given.epochs
    for method in own.methods:   # before the first of them has trained for hours
        problem = refusal([*flags_of(method, [*RECIPE, *rest]), *(["--checkpoint", "x"] if recipe_of(method).after else [])])
        if problem:
            parser.error(f"these flags do not suit --method {method}: {problem}; leave it out with --methods")
    return own, RECIPE + rest, place


def refusal(flags: Sequence[str]) -> str | None:
    """What the command line says against these flags; None when it takes them."""
    program = "import sys, args; args.parse_args(sys.argv[1:])"   # a process of its own: programs of utils do not import args
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    return done.stderr.strip().partition("error: ")[2] or done.stderr.strip() if done.returncode else None


def main(argv: Sequence[str] | None = None) -> int:
    own, training, place = parse(argv)
    folder, done, failed = Path(own.result_dir), [], []
    with user_errors():
        for method in own.methods:   # before the network that it started from is trained further
            require_same_start(method, folder, own.epochs)
        for method in own.methods:
            if recipe_of(method).after in failed:
                failed.append(method)
                continue
            try:
                train(method, folder, training)
                evaluate(method, folder, place, own.temperatures)
                done.append(method)
            except Failed as error:
                if error.code != FAILURE:   # a mistake would meet the other methods too, and a signal meant all
                    if error.code in (STOPPED, *(-number for number in SIGNALS)):   # in mid-training, or in evaluation
                        say("stopped; the same command goes on from there")
                        return STOPPED
                    return error.code if error.code > 0 else FAILURE
                failed.append(method)
        if not done:
            raise UserError(f"no method could be trained: {', '.join(failed)}")
        report(folder, done, failed, own.temperatures, svg=own.svg)
    return FAILURE if failed else 0


def report(folder: Path, methods: Sequence[str], failed: Sequence[str], temperatures: Sequence[float], *,
           svg: bool = False) -> None:
    """Print the table of finished runs and write compare.md and compare.png (and .svg)."""
    names = method_names()
    rows = [read_row(folder / method, reading, after=_after(folder, method), colour=names.index(method), line=line)
            for method in methods for line, reading in enumerate(readings(method, folder, temperatures))]
    with atomic_write(folder / "compare.md") as file:
        file.write(markdown(rows).encode())
    files = [folder / "compare.md", *save(draw(rows), folder / "compare", svg=svg)]
    say("\n" + text(rows), *([f"failed, see above, and not in the table: {', '.join(failed)}"] if failed else []), *files)


def _after(folder: Path, method: str) -> Path | None:
    after = recipe_of(method).after
    return folder / after if after else None


if __name__ == "__main__":
    sys.exit(main())
