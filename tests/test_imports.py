"""Who may import whom, and that importing anything does nothing."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_cifar100", "train_imagenet", "eval_cifar100", "eval_imagenet"}
LATE = {"torchvision", "matplotlib", "tensorboard"}   # slow to import, needed by few
# What a module may import of the project, by where it is.
ALLOWED = {"models": {"models"}, "op_counter": set(), "args": {"utils"}, "dataloader": {"utils"},
           "adaptive_inference": {"utils", "models"}, "utils": {"utils", "models", "adaptive_inference", "op_counter"},
           **{script: {"args", "dataloader", "utils", "adaptive_inference", "op_counter", "models"} for script in SCRIPTS}}


def _sources():
    return [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]


def _imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in (tree.body if top_level_only else ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_imports_point_from_scripts_to_models_and_never_back():
    for path in _sources():
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        wrong = set(_imports(path)) & set(ALLOWED) - ALLOWED[place]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_slow_libraries_are_imported_where_they_are_used():
    for path in _sources():
        assert not set(_imports(path, top_level_only=True)) & LATE, path


def test_importing_every_module_reads_no_arguments_and_prints_nothing():
    names = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in _sources())
    code = "import sys; sys.argv = ['x', '--no-such-flag']\n" + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
