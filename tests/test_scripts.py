"""The shell scripts, by what they would run (DRY_RUN=1): flags args.py takes, the paper's networks, one run folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from args import parse_args
from utils.options.network import NETWORK

ROOT = Path(__file__).resolve().parent.parent
FAMILIES, DATASETS = ("msdnet", "ranet"), ("cifar100", "imagenet")
SIZES = {"msdnet_cifar100": ["4", "8", "12"], "msdnet_imagenet": ["4", "6", "7"],
         "ranet_cifar100": ["1", "2", "3"], "ranet_imagenet": ["1", "2"]}

# Script and size -> the network in tests/data/macs.json that it has to train.
REFERENCE = {
    ("msdnet_cifar100", "any"): "msdnet_cifar100_anytime",
    **{("msdnet_cifar100", size): f"msdnet_cifar100_batch_base{size}" for size in ("4", "8", "12")},
    ("msdnet_imagenet", "any"): "msdnet_imagenet_step7",
    **{("msdnet_imagenet", size): f"msdnet_imagenet_step{size}" for size in ("4", "5", "6", "7")},
    ("ranet_cifar100", "any"): "ranet_cifar100_anytime",
    **{("ranet_cifar100", size): f"ranet_cifar100_batch_model{size}" for size in ("1", "2", "3")},
    ("ranet_imagenet", "any"): "ranet_imagenet_c64",
    ("ranet_imagenet", "1"): "ranet_imagenet_c32",
    ("ranet_imagenet", "2"): "ranet_imagenet_c64",
}


def bash(script: Path | str, *arguments: str, cwd: Path, timeout_s: float = 120,
         **environment: str) -> subprocess.CompletedProcess:
    own = ("PYTHON", "DATA_ROOT", "RESULT_ROOT", "NPROC", "TORCHRUN", "DRY_RUN", "SEEDS")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(["bash", str(script), *arguments], cwd=cwd, env={**clean, **environment}, text=True,
                          capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def commands(script: str, *arguments: str, cwd: Path, **environment: str) -> list[list[str]]:
    """The commands a script of the repository would run."""
    done = bash(ROOT / script, *arguments, cwd=cwd, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def flags(command: list[str], task: str | None = None) -> Namespace:
    """The flags of a command, parsed as its entry point would."""
    entry = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return parse_args(command[entry + 1:], task=task)


def model_commands(action: str, model: str, size: str, cwd: Path, **environment: str) -> list[str]:
    """The command for one model, e.g. ("train", "msdnet_cifar100", "8")."""
    family, dataset = model.split("_")
    mode, arguments = ("any", []) if size == "any" else ("batch", [size])
    [command] = commands(f"{family}_scripts/{action}_{dataset}_{mode}.sh", *arguments, cwd=cwd, **environment)
    return command


def test_all_sixteen_scripts_are_there_and_executable():
    for family in FAMILIES:
        for name in (f"{action}_{data}_{mode}.sh" for action in ("train", "eval") for data in DATASETS
                     for mode in ("any", "batch")):
            assert os.access(ROOT / f"{family}_scripts" / name, os.X_OK), name


SHELL_FILES = [*sorted(ROOT.glob("*/*.sh")), ROOT / ".ci/run"]


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_bash_can_parse_the_script(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(("model", "size"), REFERENCE)
@pytest.mark.parametrize("action", ["train", "eval"])
def test_the_network_is_the_published_one(action, model, size, tmp_path):
    configs = {config["name"]: config for config in json.loads((ROOT / "tests/data/macs.json").read_text())["configs"]}
    expected = parse_args(configs[REFERENCE[model, size]]["flags"].split())
    args = flags(model_commands(action, model, size, tmp_path))
    assert {name: getattr(args, name) for name in NETWORK} == {name: getattr(expected, name) for name in NETWORK}
    assert args.dataset == expected.dataset
    assert args.use_valid == (size != "any")


@pytest.mark.parametrize(("model", "size"), REFERENCE)
def test_evaluation_reads_the_folder_that_training_writes(model, size, tmp_path):
    trained, evaluated = (flags(model_commands(action, model, size, tmp_path)) for action in ("train", "eval"))
    assert evaluated.result_dir == trained.result_dir
    assert evaluated.evaluate_from == f"{trained.result_dir}/model_best.pth"


@pytest.mark.parametrize("line", [
    "train_cifar100_any --lr-type cosine", "train_cifar100_any --optimizer adam", "train_cifar100_any --method l2w",
    "train_cifar100_any --dataset cifar10", "eval_cifar100_any --evalmode dynamic", "eval_cifar100_any --budget 40e6",
    "eval_cifar100_any --images a.png", "eval_cifar100_batch 4 --evalmode anytime", "eval_cifar100_batch 4 --evalmode=realtime",
    "eval_cifar100_batch 4 --cost latency", "eval_cifar100_batch 4 --budget 3.5ms", "eval_cifar100_batch 4 --policy patience",
    "eval_cifar100_batch 4 --budget 40e6", "eval_cifar100_batch 4 --sweep released", "eval_cifar100_batch 4 --policy entropy",
    "eval_cifar100_batch 4 --images a.png"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_script_passes_can_be_overridden(family, line, tmp_path):
    script, *more = line.replace("batch 4", f"batch {SIZES[f'{family}_cifar100'][0]}").split()
    [command] = commands(f"{family}_scripts/{script}.sh", *more, cwd=tmp_path)
    task = "training" if script.startswith("train") else "evaluation"
    args = flags(command, task=task)
    flag, value = " ".join(more).replace("=", " ").split()[-2:]
    if flag not in ("--budget", "--images", "--cost"):
        assert getattr(args, flag.removeprefix("--").replace("-", "_")) == value


def test_every_model_has_a_run_folder_of_its_own(tmp_path):
    folders = [flags(model_commands("train", model, size, tmp_path)).result_dir for model, size in REFERENCE]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("action", ["train", "eval"])
def test_a_batch_script_does_all_sizes_in_turn(action, model, tmp_path):
    family, dataset = model.split("_")
    every = commands(f"{family}_scripts/{action}_{dataset}_batch.sh", cwd=tmp_path)
    assert every == [model_commands(action, model, size, tmp_path) for size in SIZES[model]]


def test_an_unknown_size_is_refused_with_the_sizes_there_are(tmp_path):
    for size in ("5", "any", "*", "4 8"):
        done = bash(ROOT / "msdnet_scripts/train_cifar100_batch.sh", size, cwd=tmp_path, DRY_RUN="1")
        assert (done.returncode, done.stdout) == (2, "")
        assert "4 8 12" in done.stderr and done.stderr.count("\n") == 1


def test_training_settings_are_the_papers(tmp_path):
    cifar = flags(model_commands("train", "ranet_cifar100", "any", tmp_path))
    assert (cifar.epochs, cifar.lr_milestones, cifar.batch_size) == (300, [150, 225], 64)
    command = model_commands("train", "msdnet_imagenet", "any", tmp_path)
    # Standalone, torchrun would otherwise look for the address of the host's name, which a container may not have.
    assert command[1:7] == ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node=4"]
    imagenet = flags(command)
    assert (imagenet.epochs, imagenet.lr_milestones, imagenet.batch_size) == (90, [30, 60], 64)
    assert (imagenet.gpu, imagenet.distributed) == ("0,1,2,3", True)
    assert imagenet.tensorboard_dir is None   # inside --result_dir
    for args in (cifar, imagenet):
        assert (args.lr_f, args.weight_decay, args.ensemble_reweight, args.workers) == (0.1, [1e-4], [0.5], 16)


@pytest.mark.parametrize(("model", "batch_size"), [("msdnet_cifar100", 128), ("ranet_cifar100", 128),
                                                   ("msdnet_imagenet", 1024), ("ranet_imagenet", 64)])
def test_evaluation_settings_are_the_released_ones(model, batch_size, tmp_path):
    for size, mode in (("any", "anytime"), (SIZES[model][0], "dynamic")):
        args = flags(model_commands("eval", model, size, tmp_path))
        assert (args.evalmode, args.flat_curve) == (mode, mode == "dynamic")
        assert (args.batch_size, args.workers, args.gpu, args.save_suffix) == (batch_size, 1, "0", "_use_reweight")
        assert args.val_workers == (16 if "imagenet" in model else 1)


@pytest.mark.parametrize("action", ["train", "eval"])
def test_the_environment_moves_data_and_results_and_flags_given_win(action, tmp_path):
    [command] = commands(f"msdnet_scripts/{action}_cifar100_any.sh", "--batch-size", "7", "--device", "cpu",
                         cwd=tmp_path, DATA_ROOT="/some where/data", RESULT_ROOT="runs", PYTHON="/opt/my python")
    args = flags(command)
    assert command[0] == "/opt/my python"
    assert args.data_root == "/some where/data"
    assert Path(args.result_dir).parent == tmp_path / "runs"
    assert (args.batch_size, args.device) == (7, "cpu")


def test_the_number_of_processes_and_torchruns_options_can_be_set(tmp_path):
    two = model_commands("train", "ranet_imagenet", "any", tmp_path, NPROC="2")
    assert "--nproc_per_node=2" in two and flags(two).gpu == "0,1"
    nodes = model_commands("train", "ranet_imagenet", "any", tmp_path, TORCHRUN="--nnodes=2 --nproc_per_node=4")
    assert nodes[3:5] == ["--nnodes=2", "--nproc_per_node=4"] and not {"--standalone", "--local-addr"} & {*nodes}


@pytest.mark.parametrize("given", [["--result_dir", "/my run"], ["--result_dir=/my run"],
                                   ["--result_dir", "x", "--result_dir=/my run"]])
@pytest.mark.parametrize(("model", "size"), [("msdnet_cifar100", "any"), ("ranet_imagenet", "any"), ("msdnet_imagenet", "4")])
def test_a_result_folder_given_is_the_one_that_is_trained_and_evaluated(model, size, given, tmp_path):
    family, dataset = model.split("_")
    mode, arguments = ("any", given) if size == "any" else ("batch", [size, *given])
    for action in ("train", "eval"):
        [command] = commands(f"{family}_scripts/{action}_{dataset}_{mode}.sh", *arguments, cwd=tmp_path)
        args = flags(command)
        assert args.result_dir == "/my run" and args.evaluate_from in (None, "/my run/model_best.pth")
        assert str(tmp_path / "results") not in " ".join(command) and f"{ROOT}/results" not in " ".join(command)


@pytest.mark.parametrize("action", ["train", "eval"])
@pytest.mark.parametrize("given", ["--result_dir=x", "--tensorboard_dir x", "--evaluate-from x"])
def test_all_sizes_in_turn_do_not_share_one_folder(action, given, tmp_path):
    done = bash(ROOT / f"ranet_scripts/{action}_cifar100_batch.sh", *given.split(), cwd=tmp_path, DRY_RUN="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "name the SIZE" in done.stderr


def test_an_exported_cdpath_changes_nothing():
    done = bash("msdnet_scripts/train_cifar100_any.sh", cwd=ROOT, DRY_RUN="1", CDPATH=str(ROOT))
    assert [done.stdout] == [bash("msdnet_scripts/train_cifar100_any.sh", cwd=ROOT, DRY_RUN="1").stdout] and done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("script", ["train_cifar100_any", "paper_tables"])   # the second calls other scripts
def test_a_signal_reaches_the_run_and_ends_the_script_with_the_runs_exit_code(script, number, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ntrap 'exit 75' {number.name}\necho started\nfor i in {{1..400}}; do sleep 0.05; done\n")
    python.chmod(0o755)
    with subprocess.Popen(["bash", ROOT / f"msdnet_scripts/{script}.sh"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHON": str(python), "RESULT_ROOT": str(tmp_path)}, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == 75 and process.stdout.read() == ""


def test_a_failing_run_stops_the_script_with_its_exit_code(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho started\nexit 3\n")
    python.chmod(0o755)
    done = bash(ROOT / "ranet_scripts/train_cifar100_batch.sh", cwd=tmp_path, PYTHON=str(python))
    assert (done.returncode, done.stdout) == (3, "started\n")


def test_a_relative_interpreter_is_found_after_a_script_has_changed_the_folder(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    for script in ("ablation_cifar100", "paper_tables"):
        done = bash(ROOT / f"msdnet_scripts/{script}.sh", cwd=tmp_path, PYTHON="bin/python", RESULT_ROOT="runs")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script, given, seeds, words", [
    ("ablation_cifar100", ["--batch-size", "16"], "1", "--batch-size cannot be given"),
    ("ablation_cifar100", ["--arch=ranet"], "1", "--arch cannot be given"),
    ("paper_tables", ["--epochs", "3", "--seed", "3"], "1", "--seed cannot be given"),
    ("paper_tables", ["--method", "joint"], "1", "--method cannot be given"),
    ("quickstart", ["--result_dir", "x"], "1", "--result_dir cannot be given"),
    ("paper_tables", [], "0 1", "got '0'"),
    ("paper_tables", [], "1,2", "got '1,2'"),
    ("paper_tables", [], "1 2 1", "a number twice"),
])
def test_what_would_make_two_runs_of_a_series_the_same_is_refused_at_once(tmp_path, script, given, seeds, words):
    done = bash(ROOT / f"msdnet_scripts/{script}.sh", *given, cwd=tmp_path, DRY_RUN="1", SEEDS=seeds)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr and done.stderr.count("\n") == 1


def test_the_quickstart_trains_evaluates_both_modes_and_plots(tmp_path):
    train, anytime, dynamic, plots = commands("msdnet_scripts/quickstart.sh", "--epochs", "5", cwd=tmp_path,
                                              RESULT_ROOT=str(tmp_path))
    assert (flags(train).dataset, flags(train).use_valid, flags(train).epochs) == ("glyphs", True, 5)
    assert [flags(command).evalmode for command in (anytime, dynamic)] == ["anytime", "dynamic"]
    for command in (anytime, dynamic):
        assert flags(command).evaluate_from == f"{flags(train).result_dir}/model_best.pth"
        assert flags(command).dataset == "glyphs"
    assert plots[1:] == ["-m", "utils.plots", flags(train).result_dir]


def short(*arguments: str, cwd: Path) -> Namespace:
    [command] = commands("msdnet_scripts/short_cifar100.sh", *arguments, cwd=cwd, RESULT_ROOT=str(cwd))
    return flags(command, task="training")


def test_the_short_recipe_is_one_for_every_network_and_method_and_flags_given_win(tmp_path):
    assert os.access(ROOT / "msdnet_scripts/short_cifar100.sh", os.X_OK)
    plain, joint = short(cwd=tmp_path), short("30", "--method", "joint", "--arch", "ranet_ge", "--use-valid", cwd=tmp_path)
    names = ("batch_size", "lr_f", "lr_type", "warmup_epochs", "momentum", "nesterov", "weight_decay", "label_smoothing", "ema")
    paper, recipe = parse_args([]), {name: getattr(plain, name) for name in names}
    assert recipe == {name: getattr(joint, name) for name in names} and plain.lr_type != paper.lr_type
    assert (plain.epochs, joint.epochs) == (12, 30) and joint.use_valid and not plain.use_valid
    assert plain.explicit.isdisjoint(NETWORK) and joint.arch == "ranet_ge"
    assert [args.result_dir for args in (plain, joint)] == [f"{tmp_path}/short_cifar100_{name}" for name in ("boost", "joint")]
    changed = short("--epochs", "3", "--batch-size", "64", "--ema", "0.9", "--result_dir", "x", cwd=tmp_path)
    assert (changed.epochs, changed.batch_size, changed.ema, changed.result_dir) == (3, 64, 0.9, "x")
    done = bash(ROOT / "msdnet_scripts/short_cifar100.sh", "ten", cwd=tmp_path, DRY_RUN="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "got 'ten'" in done.stderr


def test_the_papers_tables_come_in_order_with_one_command_that_resumes(tmp_path):
    found = commands("msdnet_scripts/paper_tables.sh", "--lr_f", "0.2", cwd=tmp_path, RESULT_ROOT=str(tmp_path), SEEDS="5")
    trained = [flags(command) for command in found if any(word.endswith("train_cifar100.py") for word in command)]
    assert [Path(args.result_dir).name for args in trained] == [
        "msdnet_any_boost_seed0", "msdnet_any_joint_seed0", "ranet_any_boost_seed0", "ranet_any_joint_seed0",
        *(f"msdnet_batch_{size}_boost" for size in (4, 8, 12)), *(f"ranet_batch_{size}_boost" for size in (1, 2, 3)),
        "msdnet_any_boost_seed5", "msdnet_any_joint_seed5", "ranet_any_boost_seed5", "ranet_any_joint_seed5",
        *(f"msdnet_batch_{size}_joint" for size in (4, 8, 12)), *(f"ranet_batch_{size}_joint" for size in (1, 2, 3))]
    for args in trained:
        name = Path(args.result_dir).name
        assert (args.resume, args.epochs, args.lr_milestones, args.lr_f) == (True, 300, [150, 225], 0.2)
        assert args.method == ("joint" if "joint" in name else "boost") and args.seed == (5 if "seed5" in name else 0)
        assert args.paper_protocol == ("any" in name) != args.use_valid
    evaluated = [flags(command) for command in found if any(word.endswith("eval_cifar100.py") for word in command)]
    assert len(evaluated) == 3 * 12 and {args.evaluate_from for args in evaluated} == {
        f"{args.result_dir}/model_best.pth" for args in trained if args.use_valid}
    report, *plots = [command[2:] for command in found[-3:]]
    assert report[0] == "utils.report" and len(report) == 1 + len(trained)
    assert [len(plot) for plot in plots] == [9, 9] and {plot[0] for plot in plots} == {"utils.plots"}


@pytest.mark.parametrize("given", ["--data-root /d --gpu 3 --lr_f 0.2", "--data-root=/d --lr_f=0.2 --gpu=3"])
def test_evaluation_computes_where_training_did_and_on_the_same_data(tmp_path, given):
    for script in ("quickstart", "paper_tables"):
        found = commands(f"msdnet_scripts/{script}.sh", *given.split(), cwd=tmp_path, RESULT_ROOT=str(tmp_path))
        evaluated = [flags(command) for command in found if any(word.endswith("eval_cifar100.py") for word in command)]
        assert evaluated and all((args.data_root, args.gpu, args.lr_f) == ("/d", "3", 0.1) for args in evaluated)


# Other methods with the recipes of their own projects.

PLAIN = {"arch": "msdnet", "weight_decay": [1e-4], "use_valid": False}
L2W = {**PLAIN, "method": "l2w", "meta_net_hidden_size": 500, "meta_net_num_layers": 1, "meta_lr": 1e-4,
       "meta_weight_decay": 1e-4, "epsilon": 0.3, "target_p_index": 15, "meta_net_input_type": "loss",
       "constraint_dimension": "mat"}
L2W_IMAGENET = {**L2W, "dataset": "imagenet", "lr_f": 0.8, "lr_type": "cosine", "lr_step": "batch", "meta_interval": 100,
                "batch_size": 512, "gpu": "0,1,2,3,4,5,6,7"}
CIFAR = {"dataset": "cifar100", "lr_f": 0.1, "lr_type": "multistep", "lr_milestones": [150, 225], "epochs": 300, "batch_size": 64}
BLOCKS = {**PLAIN, **CIFAR, "nBlocks": 7, "base": 4, "step": 2, "nChannels": 16, "method": "block_losses", "distill_weight": 0.0,
          "groups": None, "overlap": None, "include_final": False}
BLOCKS_IMAGENET = {**BLOCKS, "dataset": "imagenet", "lr_milestones": [30, 60], "epochs": 90, "nBlocks": 5, "step": 4,
                   "nChannels": 32, "use_valid": True, "gpu": "0,1,2,3"}
SELF = {"distill_weight": 0.35, "distill_T": 2.5, "teacher": None}


@pytest.mark.parametrize(("line", "expected"), [
    ("l2w_imagenet 4", {**L2W_IMAGENET, "step": 4, "base": 4, "epochs": 100, "label_smoothing": 0.0}),
    ("l2w_imagenet 7 --smooth", {**L2W_IMAGENET, "step": 7, "epochs": 300, "label_smoothing": 0.1}),
    ("l2w_imagenet 6 --lr_f 0.4 --smooth --batch-size 9", {**L2W_IMAGENET, "epochs": 300, "lr_f": 0.4, "batch_size": 9}),
    ("l2w_cifar100 8", {**L2W, **CIFAR, "meta_interval": 1, "base": 8, "nBlocks": 6}),
    ("block_losses_cifar100 conventional", {**BLOCKS, "method": "joint", "distill_weight": None}),
    ("block_losses_cifar100 conventional self", {**BLOCKS, **SELF, "groups": [7]}),
    ("block_losses_cifar100 overlap", {**BLOCKS, "overlap": 3}),
    ("block_losses_cifar100 overlap_final plain", {**BLOCKS, "overlap": 3, "include_final": True}),
    ("block_losses_cifar100 local_error self --distill_weight 0.25", {**BLOCKS, **SELF, "overlap": 1, "distill_weight": 0.25}),
    ("block_losses_cifar100 no_overlap teacher --teacher t.pth", {**BLOCKS, **SELF, "groups": [3, 4], "teacher": "t.pth"}),
    ("block_losses_imagenet conventional", {**BLOCKS_IMAGENET, "method": "joint", "distill_weight": None}),
    ("block_losses_imagenet overlap --images_per_class 300", {**BLOCKS_IMAGENET, "overlap": 2, "images_per_class": 300}),
    ("block_losses_imagenet overlap_final self",
     {**BLOCKS_IMAGENET, **SELF, "overlap": 2, "include_final": True, "distill_T": 1.5}),
])
def test_methods_are_trained_as_their_projects_publish_them(tmp_path, line, expected):
    script, *more = line.split()
    [command] = commands(f"msdnet_scripts/{script}.sh", *more, cwd=tmp_path)
    args = flags(command, task="training")
    assert {name: getattr(args, name) for name in expected} == expected
    assert Path(command[-1]).name != "--smooth" and script in Path(args.result_dir).name
    assert ("torch.distributed.run" in command) == ("imagenet" in script)


def test_runs_of_other_methods_have_folders_of_their_own(tmp_path):
    variants = [f"{variant} {distill}" for variant in ("conventional", "overlap", "overlap_final", "local_error", "no_overlap")
                for distill in ("plain", "self", "teacher --teacher t")]
    lines = [*(f"block_losses_cifar100.sh {variant}" for variant in variants), "block_losses_imagenet.sh overlap",
             "block_losses_imagenet.sh overlap self", "l2w_imagenet.sh", "l2w_imagenet.sh --smooth", "l2w_cifar100.sh",
             "imta_cifar100.sh"]
    found = [flags(command).result_dir for line in lines for command in commands(
        *f"msdnet_scripts/{line}".split(), cwd=tmp_path, RESULT_ROOT="here")]
    assert len(set(found)) == len(found) == 15 + 2 + 3 + 3 + 3 + 2
    assert {Path(folder).parent for folder in found} == {tmp_path / "here"}
    [command] = commands("msdnet_scripts/l2w_cifar100.sh", "4", "--result_dir", "/mine", cwd=tmp_path)
    assert flags(command).result_dir == "/mine"


def test_collaborating_exits_are_trained_in_two_stages(tmp_path):
    for stopped in (False, True):
        first, second = (flags(command, task="training") for command in commands(
            "msdnet_scripts/imta_cifar100.sh", "--epochs", "3", cwd=tmp_path, RESULT_ROOT=str(tmp_path)))
        for args in (first, second):
            assert (args.arch, args.nBlocks, args.epochs, args.use_valid, args.lr_milestones) == (
                "msdnet_ge", 10, 3, True, [150, 225])
        assert (first.method, first.resume, second.method, second.resume) == ("joint", True, "imta", stopped)
        assert second.checkpoint == (None if stopped else f"{first.result_dir}/model_best.pth")
        assert (second.distill_weight, second.distill_T) == (0.9, 3.0)
        Path(second.result_dir).mkdir(exist_ok=True)
        (Path(second.result_dir) / "model_latest.pth").touch()


@pytest.mark.parametrize(("line", "environment", "words"), [
    ("l2w_imagenet 4", {"NPROC": "3"}, "3 processes cannot have equal parts of 4096 images"),
    ("l2w_imagenet 4", {"NPROC": "3", "TORCHRUN": "--nnodes=2 --nproc_per_node=3"}, "6 processes cannot"),
    ("l2w_imagenet 4", {"TORCHRUN": "--nnodes=1:4 --nproc_per_node=8"}, "--nnodes 1:4"),
    ("l2w_imagenet 4", {"NPROC": "many"}, "got 'many'"),
    ("l2w_imagenet 8", {}, "there is no size '8'"),
    ("l2w_imagenet 5 --smooth", {}, "there is no size '5'; the sizes are 4 6 7"),   # which train_imagenet_batch.sh has
    ("l2w_cifar100 --result_dir x", {}, "name the SIZE"),
    ("block_losses_cifar100", {}, "there is no variant ''"),
    ("block_losses_imagenet all", {}, "there is no variant 'all'"),
    ("block_losses_cifar100 overlap teacher", {}, "--teacher FILE"),
    ("block_losses_cifar100 overlap self --teacher t.pth", {}, "self learns from the last exit"),
    ("imta_cifar100 --method joint", {}, "--method cannot be given"),
])
def test_what_a_recipe_cannot_do_is_refused_with_one_line(tmp_path, line, environment, words):
    script, *more = line.split()
    done = bash(ROOT / f"msdnet_scripts/{script}.sh", *more, cwd=tmp_path, DRY_RUN="1", **environment)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr and done.stderr.count("\n") == 1


def test_a_batch_of_4096_images_is_dealt_to_all_machines(tmp_path):
    for environment, size in (({"NPROC": "2"}, 2048), ({"NPROC": "4", "TORCHRUN": "--nnodes 2 --nproc_per_node=4"}, 512)):
        [command] = commands("msdnet_scripts/l2w_imagenet.sh", "4", cwd=tmp_path, **environment)
        assert flags(command).batch_size == size


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with utils/shell.sh, two requirement files and a .venv whose python only writes down its arguments."""
    for folder in ("utils", "tests", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "utils/shell.sh", tmp_path / "utils")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "tests/requirements.txt").write_text("pytest\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\ncase $* in *pip*) echo "$*" >>"$(dirname "$0")/calls" ;; esac\n')
    python.chmod(0o755)
    script = "source utils/shell.sh; prepare_environment requirements.txt tests/requirements.txt; python_path\n"
    (tmp_path / "prepare.sh").write_text(script)
    return tmp_path


def installs(clone: Path) -> list[str]:
    """The requirement files that pip was asked to install, in order."""
    calls = clone / ".venv/bin/calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [str(Path(line.split()[-1]).relative_to(clone)) for line in lines]


def test_requirements_are_installed_once_and_again_when_they_change(clone):
    for _ in range(2):
        done = bash(clone / "prepare.sh", cwd=clone)
        assert done.stdout.strip() == str(clone / ".venv/bin/python"), done.stderr
        assert installs(clone) == ["requirements.txt", "tests/requirements.txt"]
    (clone / "requirements.txt").write_text("torch\ntqdm\n")
    bash(clone / "prepare.sh", cwd=clone)
    assert installs(clone)[2:] == ["requirements.txt"]


def test_a_failed_installation_is_tried_again(clone):
    python = clone / ".venv/bin/python"
    working = python.read_text()
    python.write_text(working + 'case $* in *pip*) exit 1 ;; esac\n')
    done = bash(clone / "prepare.sh", cwd=clone)
    assert done.returncode == 2 and "could not install requirements.txt" in done.stderr
    python.write_text(working)
    assert bash(clone / "prepare.sh", cwd=clone).returncode == 0
    assert installs(clone) == ["requirements.txt", "requirements.txt", "tests/requirements.txt"]


def test_a_python_of_ones_own_is_taken_as_it_is(clone):
    assert bash(clone / "prepare.sh", cwd=clone, PYTHON="mine").stdout == "mine\n"
    assert installs(clone) == []


def test_a_python_too_old_is_refused_with_one_line(clone):
    shutil.rmtree(clone / ".venv")
    (clone / "bin").mkdir()
    old = clone / "bin/python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = bash(clone / "prepare.sh", cwd=clone, PATH=f"{clone / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "3.10" in done.stderr and "Python 3.8.1" in done.stderr and done.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


@pytest.mark.slow
def test_the_quickstart_ends_above_90_percent_and_5_points_above_its_first_exit(tmp_path):
    # One thread: a second one would wait for a core that other tests keep busy.
    done = bash(ROOT / "msdnet_scripts/quickstart.sh", "--threads", "1", cwd=tmp_path, timeout_s=1800, PYTHON=sys.executable,
                RESULT_ROOT="results", DATA_ROOT=str(tmp_path / "glyphs"))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "results/quickstart"
    top1 = json.loads((run / "anytime.json").read_text())["top1"]
    assert top1[-1] > 90 and top1[-1] >= top1[0] + 5
    assert len(json.loads((run / "dynamic.json").read_text())["points"]) == 40
    assert "Anytime prediction" in done.stdout and "Budgeted batch" in done.stdout
    assert (run / "anytime.png").stat().st_size and (run / "budgeted.png").stat().st_size
