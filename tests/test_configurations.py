"""Every network of the paper takes a training step at its own image size."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from args import parse_args
from utils.methods import Method
from utils.options.network import NetworkSpec
from utils.runs.restore import build_model
from utils.training.engine import EpochMeters, train_epoch

CONFIGURATIONS = {entry["name"]: entry for entry in
                  json.loads(Path(__file__).with_name("data").joinpath("macs.json").read_text())["configs"]}


def test_there_are_eight_networks_for_cifar_and_six_for_imagenet():
    assert sorted(entry["input_hw"] for entry in CONFIGURATIONS.values()) == [32] * 8 + [224] * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_network_takes_a_training_step_on_two_images(name):
    args = parse_args(CONFIGURATIONS[name]["flags"].split())
    torch.manual_seed(0)
    model = build_model(NetworkSpec.from_args(args))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    meters = EpochMeters(model.n_exits, torch.device("cpu"))
    batch = torch.randn(2, 3, args.image_size, args.image_size), torch.randint(args.num_classes, (2,)), 1.0
    assert train_epoch(Method(model, optimizer), [batch], meters, after_step=lambda step: False)
    losses = meters.summary()["train_loss"]
    assert len(losses) == CONFIGURATIONS[name]["exits"]
    assert all(0 < loss < 10 * math.log(args.num_classes) for loss in losses)
    for tensor, parameter in model.named_parameters():
        assert parameter.isfinite().all(), tensor
        assert parameter.grad is not None, tensor   # in the published networks every layer is read by some exit
