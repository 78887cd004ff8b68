"""No flag of a method is lost on its way from the command line to what is built."""
from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from adaptive_inference import released_shares
from args import parse_args
from models import BoostedNet, MSDNet
from utils.methods import Method, build_method, method_class
from utils.options.catalog import METHODS
from utils.options.network import NetworkSpec
from utils.runs.restore import build_model

NETWORK = "--nBlocks 3 --base 1 --nChannels 4 --dataset cifar10"
TEACHER = BoostedNet(MSDNet(n_blocks=1, n_channels=4, base=1), [0.0])

# Flag -> a value that is not the default of any method, where it arrives in what is built, and what has to be there.
FLAGS: dict[str, tuple[str, Any, Any]] = {
    "trainable_ensemble": ("", lambda method: method.model.trainable_ensemble, True),
    "loss_equal": ("", lambda method: method.objective.equalise, True),
    "groups": ("1-2", lambda method: method.first_blocks, [0, 1, 1]),
    "overlap": ("2", lambda method: method.first_blocks, [0, 0, 1]),
    "include_final": ("", lambda method: method.first_blocks, [0, 1, 0]),
    "distill_weight": ("0.7", lambda method: method.distill_weight if hasattr(method, "distill_weight") else method.gamma, 0.7),
    "distill_T": ("4", lambda method: method.temperature, 4.0),
    "teacher": ("t.pth", lambda method: method.teacher, TEACHER),
    "meta_net_hidden_size": ("7", lambda method: method.weight_net.first_hidden_layer.fc.out_features, 7),
    "meta_net_num_layers": ("3", lambda method: 1 + len(method.weight_net.rest_hidden_layers), 3),
    "meta_net_input_type": ("both", lambda method: (method.reads, method.weight_net.first_hidden_layer.fc.in_features),
                            ("both", 6)),
    "constraint_dimension": ("row", lambda method: method.centring, "row"),
    "epsilon": ("0.2", lambda method: method.epsilon, 0.2),
    "target_p_index": ("7", lambda method: list(method.shares), list(released_shares(0.35, 3))),
    "meta_interval": ("5", lambda method: method.meta_interval, 5),
    "meta_lr": ("0.3", lambda method: method.meta_optimizer.param_groups[0]["lr"], 0.3),
    "meta_weight_decay": ("0.4", lambda method: method.meta_optimizer.param_groups[0]["weight_decay"], 0.4),
}
PAIRS = [(method, flag) for method, facts in METHODS.items() for flag in sorted(facts.flags)]


def built(line: str) -> Method:
    args = parse_args(f"{NETWORK} {line}".split())
    model = build_model(NetworkSpec.from_args(args))
    return build_method(args, model, torch.optim.SGD(model.parameters(), lr=0.1), network=model,
                        teacher=TEACHER if args.teacher else None)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_built_by_hand_has_the_defaults_of_its_flags(name):
    more = {"block_losses": "--overlap 1", "imta": "--checkpoint c.pth"}.get(name, "")
    method, flags = method_class(name), parse_args(f"--method {name} {more}".split())
    defaults = {parameter.name: parameter.default for base in method.__mro__ if "__init__" in vars(base) and base is not object
                for parameter in inspect.signature(base).parameters.values() if parameter.default is not parameter.empty}
    options = {key: value for key, value in method.options(flags).items() if key in defaults and key != "overlap"}
    assert options and {key: defaults[key] for key in options} == options


def test_there_is_an_expectation_for_every_flag_of_every_method():
    assert set(FLAGS) == {flag for _, flag in PAIRS}


@pytest.mark.parametrize(("method", "flag"), PAIRS)
def test_a_flag_of_a_method_arrives_in_what_is_built(method, flag):
    value, arrived, expected = FLAGS[flag]
    base = f"--method {method}" + (" --checkpoint c.pth" if method == "imta" else "")
    blocks = " --overlap 1" if method == "block_losses" and flag not in ("groups", "overlap") else ""
    weight = " --distill_weight 0.5" if method == "block_losses" and flag in ("distill_T", "teacher") else ""
    without = " --overlap 1" if method == "block_losses" else ""
    assert arrived(built(f"{base}{blocks}{weight} --{flag} {value}")) == expected
    assert arrived(built(f"{base}{without}{weight}")) != expected
