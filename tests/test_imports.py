"""Who may import whom, and that importing anything does nothing."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LATE = {"torchvision", "matplotlib", "tensorboard"}   # slow to import, needed by few

# Who may import what of the project: the only statement of the direction of imports. A place is a package of utils, a folder
# or a file of the top level; "programs" are the files directly in utils/, which are run and never imported.
CORE, OPTIONS = {"core"}, {"core", "options"}
DATA = OPTIONS | {"data"}
RUNS = DATA | {"runs"}
PURE = {"op_counter", "adaptive_inference"}
EVALUATION = RUNS | PURE | {"models", "evaluation"}
TRAINING = EVALUATION | {"methods", "training"}
PROGRAMS = TRAINING | {"reports", "benchmarks"}
ALLOWED = {
    "core": CORE, "options": OPTIONS, "data": DATA, "runs": RUNS | {"models"},
    "methods": RUNS | PURE | {"models", "methods"}, "evaluation": EVALUATION, "reports": RUNS | PURE | {"reports"},
    "training": TRAINING, "benchmarks": PROGRAMS | {"args", "dataloader"}, "programs": PROGRAMS | {"args", "dataloader"},
    "models": {"models", "options"}, "op_counter": set(), "adaptive_inference": EVALUATION, "args": OPTIONS | {"models"},
    "dataloader": DATA, "hubconf": EVALUATION, "scripts": PROGRAMS | {"args", "dataloader", "scripts"},
}
SCRIPTS = {"train_cifar100", "train_imagenet", "eval_cifar100", "eval_imagenet"}


def _place(parts):
    """Place of a module in ALLOWED, from the parts of its dotted name; `utils` itself, with the version, is none."""
    if parts[-1] == "__version__":
        parts = parts[:-1]
    if parts[0] == "utils" and len(parts) > 1:
        return parts[1] if (ROOT / "utils" / parts[1]).is_dir() else "programs"
    return "scripts" if parts[0] in SCRIPTS else parts[0]


def _sources():
    return [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]


def _imports(path, top_level_only=False):
    """Dotted names of what a file imports; of `from package import module` the module too."""
    tree = ast.parse(path.read_text())
    for node in (tree.body if top_level_only else ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "utils":
            yield from (f"utils.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_point_in_one_direction():
    seen = 0
    for path in _sources():
        place = _place(path.relative_to(ROOT).with_suffix("").parts)
        for name in _imports(path):
            target = _place(name.split("."))
            if target == "utils" or target not in ALLOWED:
                continue
            seen += 1
            assert target in ALLOWED[place] and target != "programs", f"{path.relative_to(ROOT)} ({place}) imports {name}"
    assert seen > 150


def test_slow_libraries_are_imported_where_they_are_used():
    for path in _sources():
        assert not {name.split(".")[0] for name in _imports(path, top_level_only=True)} & LATE, path


def test_importing_every_module_reads_no_arguments_and_prints_nothing():
    names = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in _sources())
    code = "import sys; sys.argv = ['x', '--no-such-flag']\n" + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tables_and_figures_load_no_torch():
    code = "import sys, utils.plots, utils.report, utils.ablation, adaptive_inference; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("lacking", ["sys.modules['fcntl'] = None", "del signal.SIGUSR1", "del signal.pthread_sigmask"])
@pytest.mark.parametrize("program", ["train_cifar100", "eval_imagenet", "utils.plots"])
def test_a_system_that_lacks_what_is_needed_gets_one_line(program, lacking):
    code = f"import runpy, signal, sys; sys.argv = ['program.py']; {lacking}; runpy.run_module('{program}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "program.py: error: this project runs on Linux and macOS" in done.stderr
