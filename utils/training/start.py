"""What a run begins with: weights of another run, and the same of everything in all its processes."""
from __future__ import annotations

import argparse
import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from models import Backbone, BoostedNet
from op_counter import measure_model
from utils import __version__
from utils.core import distributed
from utils.core.errors import UserError
from utils.core.log import note
from utils.core.machine import device_name
from utils.core.tables import millions
from utils.methods import Method, method_class
from utils.options.catalog import METHODS, family_of
from utils.options.flags import MAY_DIFFER
from utils.options.parser import shown
from utils.runs import checkpoint
from utils.runs.folder import plain
from utils.runs.restore import is_of_same_data, require_same_hold_out
from utils.training.engine import statistics_needed


def load_start(args: argparse.Namespace, model: BoostedNet, data) -> None:
    """Give the network of a new run the weights of --checkpoint, if any.

    Raises:
        UserError: when they do not fit, when they may come from images that this run holds out, or when the method, or
            --freeze_backbone, needs some.
    """
    second_stage = METHODS[args.method].second_stage
    if args.checkpoint:
        start = checkpoint.load(args.checkpoint, args.checkpoint_key)
        new = method_class(args.method).load_start(model, start, args.checkpoint, new_classifier=args.new_classifier)
        if args.new_classifier or new:
            flag = "--new_classifier: " if args.new_classifier else ""
            stems = tuple(getattr(model.backbone, "stem_names", ()))
            stem = " and of the first layer" if any(name.startswith(stems) for name in new) else ""
            note(f"{flag}{len(new)} tensors of the classifiers{stem} start anew, all others are those of {args.checkpoint}")
        if second_stage or is_of_same_data(start, data):
            require_same_hold_out(start, data, args.checkpoint)
    elif second_stage or (args.freeze_backbone and family_of(args.arch) != "own"):
        flag = f"--method {args.method}" if second_stage else "--freeze_backbone"
        raise UserError(f"nothing to resume in {args.result_dir}; {flag} begins with the trained network of --checkpoint FILE, "
                        "without --resume")


def require_statistics(method: Method, data) -> None:
    """Refuse a run that would come to a batch for which batch normalisation has no statistics, before it begins.

    Raises:
        UserError: when one image is the whole of a forward pass, and some of the network's maps are 1x1.
    """
    backbone = method.model.backbone
    over_all = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())   # the statistics of several processes
    trial = getattr(method, "trial_network", None)   # which always has those of its own process
    if (over_all and not trial) or method.smallest_pass(data.smallest_batch) > 1:
        return
    with statistics_needed(), suppress(RuntimeError):   # of networks that do not run without values; training will find out
        network = trial or copy.deepcopy(backbone).to("meta").train()
        network(torch.empty(1, 3, data.image_size, data.image_size, device="meta"))


def freeze_backbone(model: BoostedNet) -> None:
    """Let training change the exits of a network only, see `Backbone.freeze`.

    Raises:
        UserError: when the backbone does not say what its exits are.
    """
    backbone = model.backbone
    exits = [name for name, _ in backbone.named_parameters() if name.split(".")[0] in getattr(backbone, "exit_names", ())]
    if not isinstance(backbone, Backbone) or not exits:
        raise UserError(f"--freeze_backbone: {type(backbone).__name__} does not say which of its parts are exits; derive it from "
                        "models.Backbone, with `exit_names`")
    backbone.freeze()


def introduce(args: argparse.Namespace, data, model: BoostedNet, device: torch.device) -> None:
    """Log what is trained on what."""
    macs, params = measure_model(model, data.image_size, data.image_size)
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    note(f"{args.dataset} ({args.data_root}): {data}")
    note(f"{args.arch}, {args.method}: {model.n_exits} exits, {millions(macs[0])} to {millions(macs[-1])} million MACs, "
         f"{params[0] / 1e6:.2f} to {params[-1] / 1e6:.2f} million parameters; on {device} ({device_name(device)}){processes}")


def require_same_flags(args: argparse.Namespace) -> None:
    """Refuse processes that were started by different commands; all of them have to call this.

    Raises:
        UserError: naming the flags and their values.
    """
    flags = {name: value for name, value in plain(vars(args)).items() if name not in MAY_DIFFER}
    different = distributed.differences(flags | {"version": __version__})
    if different:
        found = "; ".join(f"{name} is {' and '.join(dict.fromkeys(map(shown, values)))}" for name, values in different.items())
        raise UserError(f"the processes of this run were started by different commands: {found}")


def require_same_start(saved: dict[str, Any] | None, data, model: BoostedNet, teacher_hash: str | None) -> None:
    """Refuse processes that would not train the same network on the same images; all of them have to call this.

    Raises:
        UserError: naming what differs.
    """
    if distributed.world_size() == 1:
        return
    different = distributed.differences({
        "the checkpoint to go on from": (saved["epoch"], saved["training"]["figures"].get("steps")) if saved else None,
        "the training images": (data.n_train, data.data_hash), "the hold-out split": data.split and data.split.hash,
        "the weights to begin with": checkpoint.hash_weights(model.state_dict()), "the teacher": teacher_hash})
    if different:
        raise UserError(f"the processes of this run differ in {' and '.join(different)}; --data-root, --checkpoint and --teacher "
                        "must lead to equal files on all machines, and --result_dir to a folder that they share")
