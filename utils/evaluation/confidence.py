"""How the exits of a trained network are read at evaluation: which ensemble of them predicts, and what tells a certain answer."""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models import BoostedNet, expand_temperatures, read_as
from utils.core.errors import UserError

Measure = Callable[[Tensor], Tensor]   # from logits (..., C) to one number (...) that grows with certainty


def confidence(logits: Tensor) -> Tensor:
    """The largest softmax probability."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """1 - H / log C for the entropy H of the C softmax probabilities: 0 for equal ones, 1 for a single class."""
    spread = torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)
    return (1 - spread / math.log(max(logits.shape[-1], 2))).clamp(0, 1)   # rounding may step over the ends


def margin(logits: Tensor) -> Tensor:
    """The largest softmax probability less the second largest."""
    top = logits.float().softmax(dim=-1).topk(min(2, logits.shape[-1]), dim=-1).values
    return top[..., 0] - top[..., 1:].sum(dim=-1)


def agreement(logits: Tensor) -> Tensor:
    """How many exits in a row, up to this one, give the same class (patience, after arXiv:2006.04152).

    Unlike the other measures it looks at all exits: logits are (n_exits, B, C), the result is (n_exits, B) from 1 on.
    """
    answers = logits.argmax(dim=-1)
    lengths = [torch.ones_like(answers[0])]
    for same in answers[1:] == answers[:-1]:
        lengths.append(torch.where(same, lengths[-1] + 1, 1))
    return torch.stack(lengths).float()


# By the names of catalog.POLICIES.
MEASURES: dict[str, Measure] = {"confidence": confidence, "entropy": entropy, "margin": margin, "patience": agreement}


def read_exits(args: argparse.Namespace, model: BoostedNet) -> tuple[BoostedNet, dict[str, Any]]:
    """The network as --ensemble has it read, and what result files say of it.

    Args:
        args: parsed flags, after `restore.take_over`.
        model: reads its exits as they were trained.
    Returns:
        The network, on the same backbone, and `ensemble` (None where the exits are read as they were trained) and `policy`.
    Raises:
        UserError: when --ensemble_reweight does not fit the number of exits.
    """
    if args.ensemble is None:
        return model, {"ensemble": None, "policy": args.policy}
    try:
        reread = read_as(args.ensemble, model.backbone, expand_temperatures(args.ensemble_reweight, model.n_exits))
    except ValueError as error:
        raise UserError(str(error)) from error
    as_trained = type(reread) is type(model) and reread.temperatures[1:] == model.temperatures[1:]
    return reread.train(model.training), {"ensemble": None if as_trained else args.ensemble, "policy": args.policy}
