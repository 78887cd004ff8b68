"""The essentials of training and early exit on a GPU, beside the CPU: what tests/gpu_session.py runs first, in about a minute.

Every method and every combination of the flags for speed, but --compile, trains three full batches and one that is not full,
through the training script. On the CPU the same tests run without graphs.
"""
from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from tiny import command, make_images, ranet_command

import train_cifar100
from models import BoostedNet, MSDNet, RANet
from utils.evaluation.confidence import confidence
from utils.evaluation.early_exit import EarlyExit
from utils.evaluation.fast_form import prepare_for_inference
from utils.options.catalog import METHODS
from utils.training import fast_forward

DEVICES = {"cpu": pytest.mark.slow, "cuda": pytest.mark.gpu}
COMMANDS = {"msdnet": command, "ranet": ranet_command}
OWN_FLAGS = {"block_losses": "--overlap 1"}
SPEED = [" ".join(filter(None, flags)) for flags in product(("", "--amp bf16"), ("", "--channels_last"), ("", "--cuda_graphs"))]
CASES = [pytest.param(network, method, speed, device, marks=marks, id=" ".join([network, method, *speed.split(), device]))
         for network in COMMANDS for method, facts in METHODS.items() for speed in (SPEED if facts.one_call else SPEED[:1])
         for device, marks in DEVICES.items() if device == "cuda" or "--cuda_graphs" not in speed]
EACH_DEVICE = pytest.mark.parametrize("device", [pytest.param(device, marks=marks) for device, marks in DEVICES.items()])
# Largest relative difference of an exit's mean loss from the CPU's in float32: logits wrong by 1 % make it 1e-3.
ROUNDING, BF16 = 5e-4, 0.02


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), classes=4, train=8, test=4)   # 28 to train on: 8 + 8 + 8 + 4


@pytest.fixture(scope="module")
def train(images, tmp_path_factory):
    """A function that trains an epoch and returns its losses, and the run's folder; CPU runs that were there before are kept."""
    done = {}

    def run(network, method, speed, device):
        key = network, method, speed, device
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            flags = f"--method {method} {OWN_FLAGS.get(method, '')} {speed} --device {device}"
            flags += " --valid_size 4 --epochs 1 --lr_f 0.01"
            if METHODS[method].second_stage:
                flags += f" --checkpoint {run(network, 'joint', '', 'cpu')[1] / 'model_latest.pth'}"
            assert train_cifar100.main(COMMANDS[network](images, folder, *flags.split())) == 0
            done[key] = json.loads((folder / "results.json").read_text()), folder
        return done[key]

    return run


@pytest.mark.parametrize(("network", "method", "speed", "device"), CASES)
def test_a_run_has_the_losses_of_the_cpu(train, network, method, speed, device, monkeypatch):
    graphs = []

    class Counted(fast_forward.GraphedPass):
        def __init__(self, *arguments):
            graphs.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(fast_forward, "GraphedPass", Counted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    got, want = (results["epochs"][0]["train_loss"] for results, _ in (train(network, method, speed, device),
                                                                         train(network, method, "", "cpu")))
    deviation = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
    assert deviation < (BF16 if "bf16" in speed else ROUNDING), (got, want)
    assert len(graphs) == ("--cuda_graphs" in speed)


@EACH_DEVICE
@pytest.mark.parametrize("form", ["growing", "folded"])
@pytest.mark.parametrize("network", COMMANDS)
def test_inputs_leave_where_the_simulation_says(network, form, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    backbone = (MSDNet(n_blocks=4, n_channels=8, base=2, step=1) if network == "msdnet" else
                RANet(n_blocks=2, step=1, n_channels=8, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1]))
    images = torch.randn(96, 3, 32, 32)
    backbone(images)   # for statistics to normalise by
    model = prepare_for_inference(BoostedNet(backbone, [0.5] * backbone.n_exits).eval().to(device), form)
    images = images.to(device)
    with torch.inference_mode():
        scores = torch.stack(model(images))
    certainty = torch.stack([confidence(one) for one in scores]).cpu()
    thresholds = [_in_a_gap(row, share) for row, share in zip(certainty, (0.3, 0.5, 0.2, 0.6, 0.4, 0.5))]
    reached = certainty >= torch.tensor(thresholds)[:, None]
    reached[-1] = True
    expected = reached.int().argmax(dim=0)
    assert len(expected.unique()) == model.n_exits
    for size in (1, 7, 96):
        parts = [EarlyExit(model, thresholds)(part) for part in images.split(size)]
        prediction, sure, exit_ = (torch.cat(column).cpu() for column in zip(*parts))
        assert torch.equal(exit_, expected), size
        assert torch.equal(prediction, scores.cpu().argmax(dim=2)[expected, torch.arange(96)]), size
        assert torch.allclose(sure, certainty[expected, torch.arange(96)], atol=1e-4), size


def _in_a_gap(confidences: torch.Tensor, share: float) -> float:
    """A threshold that about this share reaches, in the middle of a wide gap, where rounding decides nothing."""
    ordered = confidences.sort(descending=True).values
    place = round(share * len(ordered))
    gaps = (ordered[:-1] - ordered[1:])[place - 5:place + 5]
    n = place - 5 + int(gaps.argmax())
    return float(ordered[n] + ordered[n + 1]) / 2
