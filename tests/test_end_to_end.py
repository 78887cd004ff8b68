"""A person's way through the program: train, evaluate in both modes, draw, and every mistake on the way."""
import json
import shutil

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval_cifar100
import train_cifar100
from dataloader import build_data
from models import BoostedNet, MSDNet
from utils.core.errors import STOPPED
from utils.data.split import Split
from utils.methods import Method
from utils.plots import main as plots
from utils.runs import checkpoint
from utils.training.engine import EpochMeters, train_epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "boost"
    assert train_cifar100.main(tiny.command(images, folder)) == 0
    return folder


def _evaluate(images, run, *more):
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / "model_best.pth"), "--device", "cpu",
                               *more])


def test_training_leaves_results_log_and_tensorboard(run):
    results = json.loads((run / "results.json").read_text())
    assert [e["epoch"] for e in results["epochs"]] == [1, 2]
    for entry in results["epochs"]:
        assert len(entry["train_loss"]) == len(entry["train_top1"]) == len(entry["valid_top1"]) == 2
        assert entry["valid_share"][0] == pytest.approx(0.9, abs=0.1)
    assert results["config"]["seed"] == 0 and results["split_hash"] and results["versions"]["torch"]
    assert len(results["test"]["top1"]) == 2
    assert (run / "train.log").read_text().count("hold-out top-1") == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "log"))
    events.Reload()
    wanted = {"lr", "images_per_s", "train_loss/exit1", "train_top1/exit2", "valid_share/exit2", "valid_top1/exit2"}
    assert wanted <= set(events.Tags()["scalars"])


def test_the_log_says_first_what_is_trained_on_what(images, run):
    lines = [line.partition(" ")[2].partition(" ")[2] for line in (run / "train.log").read_text().splitlines()]
    first, second = [line for line in lines if not line.startswith("reading 60 images")][:2]   # not where a cache has them
    assert first == f"folder ({images}): 40 training images of 3 classes, 8 held out, 12 test images"
    macs, params = (json.loads((run / "results.json").read_text())["test"][name] for name in ("macs", "params"))
    assert second.startswith(f"msdnet_ge, boost: 2 exits, {macs[0] / 1e6:.2f} to {macs[1] / 1e6:.2f} million MACs, "
                             f"{params[0] / 1e6:.2f} to {params[1] / 1e6:.2f} million parameters; on cpu (")


def test_anytime_evaluation_needs_the_test_images_alone(images, run, tmp_path, capsys):
    alone = tmp_path / "images"
    shutil.copytree(images / "test", alone / "test")
    assert _evaluate(images, run, "--result_dir", str(tmp_path / "whole")) == 0
    assert _evaluate(alone, run, "--result_dir", str(tmp_path / "alone")) == 0
    whole, few = (json.loads((tmp_path / name / "anytime.json").read_text()) for name in ("whole", "alone"))
    assert {**whole, "name": None} == {**few, "name": None}
    tiny.one_line_error(capsys, lambda: _evaluate(alone, run, "--evalmode", "dynamic"))


def test_training_accuracy_of_an_epoch_is_that_of_its_own_forward_passes(images, tmp_path):
    """A learning rate of almost zero leaves the weights alone: the one forward pass of the epoch can be made again."""
    train_cifar100.main(tiny.command(images, tmp_path / "a", "--epochs", "1", "--lr_f", "1e-30", "--batch-size", "40"))
    entry = json.loads((tmp_path / "a" / "results.json").read_text())["epochs"][0]
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1, num_classes=3), [0.5, 0.5]).train()
    model.backbone.load_state_dict(checkpoint.load(tmp_path / "a" / "model_latest.pth")["state_dict"])
    (pixels, labels, _), = build_data(dataset="folder", data_root=images, batch_size=40, use_valid=True, valid_size=8).train(0)
    predictions = model(pixels)
    assert entry["train_loss"] == pytest.approx([F.cross_entropy(p, labels).item() for p in predictions], rel=1e-5)
    assert entry["train_top1"] == pytest.approx([100 * (p.argmax(1) == labels).float().mean().item() for p in predictions])


def test_the_checkpoint_is_all_that_evaluation_needs(images, run, capsys):
    assert _evaluate(images, run) == 0
    printed = capsys.readouterr().out
    assert "10^6 MACs" in printed and "top-5" in printed
    rows = [line.split("\t") for line in (run / "any.txt").read_text().splitlines()]
    result = json.loads((run / "anytime.json").read_text())
    assert [int(row[0]) for row in rows] == result["macs"] and [float(row[2]) for row in rows] == result["top1"]
    assert torch.load(run / "flops.pth", weights_only=True) == result["macs"]
    saved = checkpoint.load(run / "model_best.pth")
    assert saved["class_names"] == ["class0", "class1", "class2"] and saved["method"] == "boost"
    assert saved["temperatures"] == [0.5, 0.5]
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"blocks", "classifier"}
    best = json.loads((run / "results.json").read_text())["best"]
    assert (saved["epoch"], saved["epoch_kind"]) == (best["epoch"], "best on hold-out") and best["chosen_on"] == "hold-out"
    latest = checkpoint.load(run / "model_latest.pth")
    assert (latest["epoch"], latest["epoch_kind"]) == (2, "last epoch")   # also where it is the best
    assert json.loads((run / "results.json").read_text())["test"]["epoch_kind"] == "last epoch"


def test_budgeted_evaluation_reports_requested_and_spent(images, run, capsys):
    macs = json.loads((run / "anytime.json").read_text())["macs"]
    budget = (macs[0] + macs[1]) / 2
    assert _evaluate(images, run, "--evalmode", "dynamic", "--budget", f"{budget:.0f}") == 0
    result = json.loads((run / "dynamic.json").read_text())
    point, = result["points"]
    assert point["budget"] == round(budget) and point["valid_mean_macs"] == pytest.approx(budget, rel=0.05)   # 8 images held out
    assert sum(point["test_exit_share"]) == pytest.approx(1)
    assert "hold-out MACs" in capsys.readouterr().out
    assert _evaluate(images, run, "--evalmode", "dynamic") == 0
    assert len(json.loads((run / "dynamic.json").read_text())["points"]) == 40
    assert _evaluate(images, run, "--evalmode", "dynamic", "--sweep", "released", "--flat_curve", "--save_suffix", "_x") == 0
    assert len((run / "dynamic_flat_x.txt").read_text().splitlines()) == 39
    assert plots([str(run)]) == 0
    assert {p.name for p in run.glob("*.png")} == {"anytime.png", "budgeted.png"}


def test_a_budget_the_hold_out_cannot_meet_is_pointed_out(images, run, capsys):
    macs = json.loads((run / "anytime.json").read_text())["macs"]
    _evaluate(images, run, "--evalmode", "dynamic", "--budget", f"{macs[0] + 0.3 * (macs[1] - macs[0]):.0f}")
    assert "warning: thresholds from 8 held-out images" in capsys.readouterr().out


def test_joint_training_evaluates_as_the_plain_exits(images, tmp_path):
    train_cifar100.main(tiny.command(images, tmp_path / "joint", "--method", "joint", "--ensemble_reweight", "0.5"))
    saved = checkpoint.load(tmp_path / "joint" / "model_best.pth")
    assert saved["method"] == "joint" and saved["temperatures"] == [0.0, 0.0]
    assert _evaluate(images, tmp_path / "joint", "--ensemble_reweight", "0.5") == 0   # the released command line


def test_the_first_step_of_boosting_and_joint_training_differ_only_in_the_target_of_later_exits(images, tmp_path):
    for method in ("boost", "joint"):
        train_cifar100.main(tiny.command(images, tmp_path / method, "--method", method, "--epochs", "1", "--batch-size", "40"))
    boost, joint = (json.loads((tmp_path / m / "results.json").read_text())["epochs"][0] for m in ("boost", "joint"))
    assert boost["train_loss"][0] == joint["train_loss"][0] and boost["train_loss"][1] != joint["train_loss"][1]


@pytest.mark.parametrize("form", ["plain", "nested", "module"])
def test_released_checkpoint_forms_load(images, run, tmp_path, form):
    weights = checkpoint.load(run / "model_best.pth")["state_dict"]
    if form == "module":
        weights = {f"module.{name}": t for name, t in weights.items()}
    torch.save({"state_dict": {"model": weights} if form == "nested" else weights}, tmp_path / "released.pth")
    flags = "--dataset folder --arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 4".split()
    assert eval_cifar100.main([*flags, "--data-root", str(images), "--evaluate-from", str(tmp_path / "released.pth"),
                               "--device", "cpu"]) == 0
    result, ours = (json.loads((folder / "anytime.json").read_text()) for folder in (tmp_path, run))
    for name in ("top1", "arch", "method", "dataset"):
        assert result[name] == ours[name]
    assert plots([str(tmp_path)]) == 0


def test_start_from_weights_and_a_later_epoch(images, run, tmp_path):
    more = ["--checkpoint", str(run / "model_best.pth"), "--start-epoch", "1"]
    assert train_cifar100.main(tiny.command(images, tmp_path / "b", *more)) == 0
    epochs = json.loads((tmp_path / "b" / "results.json").read_text())["epochs"]
    assert [e["epoch"] for e in epochs] == [2] and epochs[0]["lr"] == pytest.approx(0.01)   # behind the milestone


@pytest.mark.parametrize("more, message", [
    (["--evalmode", "dynamic", "--budget", "1"], "out of range"),
    (["--nBlocks", "3"], "trained with nBlocks 2"),
    (["--ensemble_reweight", "0.9"], "temperatures"),
    (["--ensemble_reweight", "0.1,0.2,0.3"], "3 values for 2 exits"),
    (["--evalmode", "dynamic", "--use-valid", "--valid_size", "9"], "trained with valid_size 8"),
    (["--seed", "1"], "trained with seed 0"),
    (["--method", "joint"], "method"),
])
def test_flags_that_contradict_the_checkpoint_are_refused(images, run, capsys, more, message):
    assert message in tiny.one_line_error(capsys, lambda: _evaluate(images, run, *more))


def test_weights_of_another_architecture_are_refused_with_the_tensor(images, run, tmp_path, capsys):
    torch.save({"state_dict": checkpoint.load(run / "model_best.pth")["state_dict"]}, tmp_path / "released.pth")
    flags = "--dataset folder --arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 6".split()
    message = tiny.one_line_error(capsys, lambda: eval_cifar100.main(
        [*flags, "--data-root", str(images), "--evaluate-from", str(tmp_path / "released.pth")]))
    assert "blocks.0.0.layers.0.net.0.weight has shape [4, 3, 3, 3], expected [6, 3, 3, 3]" in message


def test_dynamic_evaluation_without_a_hold_out_stops(images, tmp_path, capsys):
    command = tiny.command(images, tmp_path / "all")
    start = command.index("--use-valid")
    del command[start:start + 3]   # with its --valid_size
    assert train_cifar100.main(command) == 0
    assert json.loads((tmp_path / "all" / "results.json").read_text())["best"]["chosen_on"] == "last epoch"
    kinds = [checkpoint.load(tmp_path / "all" / f"model_{name}.pth")["epoch_kind"] for name in ("previous", "latest", "best")]
    assert kinds == ["epoch", "last epoch", "last epoch"]
    capsys.readouterr()
    message = tiny.one_line_error(capsys, lambda: _evaluate(images, tmp_path / "all", "--evalmode", "dynamic"))
    assert "--use-valid" in message and not list((tmp_path / "all").glob("dynamic*"))


def test_a_run_on_some_images_of_each_class_keeps_its_list(images, tmp_path, capsys, monkeypatch):
    command = tiny.command(images, tmp_path / "a", "--images_per_class", "9")
    tiny.signal_at_step(monkeypatch, 4)
    assert train_cifar100.main(command) == STOPPED
    monkeypatch.undo()
    monkeypatch.setattr(Split, "draw", None)   # what is saved is used again, nothing is drawn
    assert train_cifar100.main([*command, "--resume"]) == 0
    monkeypatch.undo()
    split = Split.load(tmp_path / "a" / "split.pth")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (results["n_train"], results["split_hash"]) == (27, split.hash)
    assert len(split.train_index) == 27 and len(split.valid_index) == 8
    assert "27 of 48 training images of 3 classes, 8 held out" in (tmp_path / "a" / "train.log").read_text()
    assert _evaluate(images, tmp_path / "a", "--evalmode", "dynamic") == 0
    # Without a hold-out the list is kept too.
    alone = tiny.command(images, tmp_path / "b", "--images_per_class", "9")
    start = alone.index("--use-valid")
    del alone[start:start + 3]   # with its --valid_size
    assert train_cifar100.main(alone) == 0
    assert len(Split.load(tmp_path / "b" / "split.pth").train_index) == 27
    capsys.readouterr()
    assert "this checkpoint knows of none" in tiny.one_line_error(
        capsys, lambda: _evaluate(images, tmp_path / "b", "--evalmode", "dynamic"))
    assert "without a hold-out" in tiny.one_line_error(
        capsys, lambda: _evaluate(images, tmp_path / "b", "--evalmode", "dynamic", "--use-valid"))
    # A network that was trained on more images, none of them held out here, may be gone on with.
    more = ["--images_per_class", "5", "--checkpoint", str(tmp_path / "a" / "model_best.pth")]
    assert train_cifar100.main(tiny.command(images, tmp_path / "c", *more)) == 0
    capsys.readouterr()
    too_many = tiny.command(images, tmp_path / "d", "--images_per_class", "17")
    message = tiny.one_line_error(capsys, lambda: train_cifar100.main(too_many))
    assert "images to train on, fewer than --images_per_class 17" in message


def test_a_finished_run_is_not_overwritten(images, run, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert "already holds a run" in tiny.one_line_error(capsys, lambda: train_cifar100.main(tiny.command(images, run)))
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_missing_data_and_files_are_one_line(images, run, tmp_path, capsys):
    shutil.copy(run / "model_best.pth", tmp_path / "model_best.pth")
    missing, no_run = tmp_path / "nowhere", tmp_path / "no-run"
    for call, message in (
            (lambda: train_cifar100.main(tiny.command(missing, tmp_path / "r")), f"{missing}/train: no such folder"),
            (lambda: _evaluate(missing, tmp_path), f"{missing} has no 'test' or 'val' folder"),
            (lambda: _evaluate(images, no_run), f"{no_run / 'model_best.pth'}: no such checkpoint")):
        assert message in tiny.one_line_error(capsys, call)
    assert not (tmp_path / "r" / "model_latest.pth").exists()


class _Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(images):
    data = build_data(dataset="folder", data_root=images, batch_size=8, use_valid=True, valid_size=8)
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1, num_classes=3), [0.5, 0.5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, meters = data.train(0), EpochMeters(2, torch.device("cpu"))
    with _Synchronisations() as watched:
        assert train_epoch(Method(model, optimizer), batches, meters, after_step=lambda step: False)
    assert meters.steps == 5 and watched.count == 0
    with _Synchronisations() as watched:   # the watch does see what waits
        meters.summary()
        torch.zeros(1).item()
    assert watched.count > 0
