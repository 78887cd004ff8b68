"""Averages of the weights (--ema): what they are, that every reader of a checkpoint gets them and says so."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import command, make_images, one_line_error
from torch.optim.swa_utils import AveragedModel

import eval_cifar100
import train_cifar100
from models import BoostedNet, MSDNet
from utils import export
from utils.evaluation.fast_form import load_model
from utils.methods import Method
from utils.runs import checkpoint
from utils.training import trainer
from utils.training.average import WeightAverage
from utils.training.fast_forward import training_forward

DECAY = 0.6


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run with averages, and the weights after each of its ten steps."""
    folder, steps = tmp_path_factory.mktemp("averaged"), []
    with pytest.MonkeyPatch.context() as patch:
        update = Method.update

        def keep(self, *batch):
            outcome = update(self, *batch)
            steps.append({name: tensor.clone() for name, tensor in self.model.backbone.state_dict().items()})
            return outcome

        patch.setattr(Method, "update", keep)
        assert train_cifar100.main(command(images, folder, "--ema", str(DECAY))) == 0
    assert len(steps) == 10
    return folder, steps


def averaged(steps: list[dict], name: str) -> torch.Tensor:
    """The average of a tensor over the steps, by the definition, in float64."""
    average = steps[0][name].double()
    for step in steps[1:]:
        average = DECAY * average + (1 - DECAY) * step[name].double()
    return average


class Numbers(torch.nn.Module):
    """A weight and the buffers of a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("mean", torch.tensor([8.0]))
        self.register_buffer("count", torch.tensor(5))


def test_an_average_by_hand():
    network = Numbers()
    average, model = WeightAverage(network, 0.75), None
    for weight, mean, count in ((2.0, 4.0, 6), (4.0, 8.0, 7), (0.0, 0.0, 8)):
        with torch.no_grad():
            network.weight.fill_(weight), network.mean.fill_(mean), network.count.fill_(count)
        average.update()
        model = average.model
    # 2; 0.75 * 2 + 0.25 * 4 = 2.5; 0.75 * 2.5 = 1.875
    assert (model.weight.item(), model.mean.item(), model.count.item()) == (1.875, 3.75, 8)
    assert average.n_averaged == 3 and network.weight.item() == 0.0 and not model.weight.requires_grad


@pytest.mark.parametrize("form", [{}, {"channels_last": True}])
def test_the_average_has_the_bits_of_torchs_averaged_model(form):
    """Through the grouped form in training, whose parameters and statistics are the network's own."""
    torch.manual_seed(0)
    model = BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1, num_classes=3), [0.5, 0.5])
    network = training_forward(model, batch_size=6, **form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def fold(averages, values, _):
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - 0.9)
        else:
            torch._foreach_copy_(averages, values)

    ours, theirs = WeightAverage(model, 0.9), AveragedModel(model, multi_avg_fn=fold, use_buffers=True)
    method = Method(model, optimizer, network=network)
    for _ in range(4):
        method.step(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
        ours.update()
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    assert ours.n_averaged == theirs.n_averaged.item() == 4
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.model.state_dict().items())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_holds_the_average_as_its_weights_and_the_trained_ones_for_resume(run):
    folder, steps = run
    latest = checkpoint.load(folder / checkpoint.LATEST)
    assert (latest["ema"], latest["training"]["n_averaged"]) == (DECAY, 10)
    for name, tensor in latest["state_dict"].items():
        assert torch.equal(latest["training"]["weights"][name], steps[-1][name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), averaged(steps, name), rtol=1e-5, atol=1e-6)
        else:
            assert tensor.item() == 10, name
    best = checkpoint.load(folder / checkpoint.BEST)
    assert best["ema"] == DECAY and "training" not in best and "weights" not in best
    name = "classifier.1.linear.weight"
    torch.testing.assert_close(best["state_dict"][name].double(), averaged(steps[:5 * best["epoch"]], name), rtol=1e-5, atol=1e-6)


def test_hold_out_and_test_figures_are_those_of_the_average(images, tmp_path, monkeypatch, run):
    folder, steps = run
    seen, predict = [], trainer.predict
    monkeypatch.setattr(trainer, "predict", lambda model, batches: seen.append(
        model.backbone.state_dict()["classifier.1.linear.weight"].clone()) or predict(model, batches))
    line = command(images, tmp_path, "--ema", str(DECAY), "--paper_protocol")
    assert train_cifar100.main(line) == 0
    for i, weights in enumerate(seen):   # the hold-out and the test set of the first epoch, then of the second
        torch.testing.assert_close(weights.double(), averaged(steps[:5 * (1 + i // 2)], "classifier.1.linear.weight"), rtol=1e-5,
                                   atol=1e-6)
    assert len(seen) == 4
    tested = json.loads((folder / "results.json").read_text())["test"]
    line = ["--data-root", str(images), "--evaluate-from", str(folder / checkpoint.LATEST), "--result_dir", str(tmp_path)]
    assert eval_cifar100.main([*line, "--device", "cpu"]) == 0
    evaluated = json.loads((tmp_path / "anytime.json").read_text())
    assert evaluated["weights_hash"] == tested["weights_hash"] and evaluated["top1"] == tested["top1"]
    assert tested["ema"] == evaluated["ema"] == DECAY


def test_a_second_step_in_a_batch_counts_as_one_more(images, tmp_path):
    """Sample weighting steps twice in a batch."""
    line = command(images, tmp_path, *"--ema 0.9 --method l2w --meta_net_hidden_size 4 --epochs 1".split())
    assert train_cifar100.main(line) == 0
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["training"]["n_averaged"] == 10


def test_everything_that_reads_the_average_says_so(images, run, tmp_path, capsys):
    folder, words = run[0], "averaged weights, decay 0.6"
    entries = json.loads((folder / "results.json").read_text())["epochs"]
    assert [entry["ema"] for entry in entries] == [DECAY] * 2
    log = (folder / "train.log").read_text()
    assert log.count("hold-out top-1 of averaged weights") == 2 and "--ema 0.6: figures of hold-out and test" in log
    best = ["--data-root", str(images), "--evaluate-from", str(folder / checkpoint.BEST), "--device", "cpu"]
    for more in (["--evalmode", "anytime"], ["--evalmode", "dynamic"], ["--evalmode", "realtime"],
                 ["--images", str(images / "test/class0/0.png")], ["--publish", str(tmp_path / "published")],
                 ["--publish", str(tmp_path / "published"), "--evalmode", "dynamic"]):
        assert eval_cifar100.main([*best, *more]) == 0
        assert words in capsys.readouterr().out, more
    for name in ("anytime.json", "dynamic.json", "realtime.json"):
        assert json.loads((folder / name).read_text())["ema"] == DECAY
    assert json.loads((tmp_path / "published/dynamic.json").read_text())["ema"] == DECAY
    assert export.main([str(folder), str(tmp_path / "programs")]) == 0
    assert words in capsys.readouterr().out
    assert json.loads((tmp_path / "programs/model.json").read_text())["ema"] == DECAY


def test_other_readers_get_the_average_without_knowing(images, run, tmp_path):
    """Those who open a file as a network, or start from it."""
    folder, steps = run
    latest = folder / checkpoint.LATEST
    name = "classifier.1.linear.weight"
    loaded, _ = load_model(latest)
    torch.testing.assert_close(loaded.backbone.state_dict()[name].double(), averaged(steps, name), rtol=1e-5, atol=1e-6)
    line = command(images, tmp_path / "next", "--checkpoint", str(latest), "--lr_f", "1e-30", "--epochs", "1")
    assert train_cifar100.main(line) == 0
    started = checkpoint.load(tmp_path / "next" / checkpoint.LATEST)
    assert torch.equal(started["state_dict"][name], checkpoint.load(latest)["state_dict"][name]) and "ema" not in started


def test_a_best_file_with_the_average_is_left_alone_by_resume_and_one_with_the_trained_weights_is_not(images, tmp_path):
    """Which a kill between the saves of an epoch may have left behind."""
    line, best = command(images, tmp_path, "--ema", str(DECAY), "--epochs", "1"), tmp_path / checkpoint.BEST
    assert train_cifar100.main(line) == 0
    before = best.stat().st_mtime_ns
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert best.stat().st_mtime_ns == before
    saved, good = checkpoint.load(tmp_path / checkpoint.LATEST), checkpoint.load(best)["state_dict"]
    checkpoint.save(best, {**checkpoint.load(best), "state_dict": saved["training"]["weights"]})
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert checkpoint.hash_weights(checkpoint.load(best)["state_dict"]) == checkpoint.hash_weights(good)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda saved: saved["training"].pop("weights"), "it has no"),
    (lambda saved: saved["training"].pop("n_averaged"), "cannot be resumed"),
    (lambda saved: saved.update(ema="0.6"), "'ema' is str")])
def test_a_state_without_its_average_ends_with_one_line(images, run, tmp_path, capsys, spoil, message):
    saved = checkpoint.load(run[0] / checkpoint.LATEST)
    spoil(saved)
    checkpoint.save(tmp_path / checkpoint.LATEST, saved)
    line = command(images, tmp_path, "--ema", str(DECAY), "--resume", "--epochs", "3")
    assert message in one_line_error(capsys, lambda: train_cifar100.main(line))
