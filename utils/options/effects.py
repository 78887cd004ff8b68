"""Where each flag has an effect. A flag that is given where it has none is refused."""
from __future__ import annotations

from argparse import Namespace
from typing import Any

from utils.options.catalog import ARCHITECTURES, CROPPED, METHODS, family_of
from utils.options.network import NETWORK
from utils.options.parser import OneLineParser

TRAINING, EVALUATION = "training", "evaluation"

# What a flag needs of others to have an effect: one of several values; or, with True, that the other is given, with False, that
# it is not.
Needs = dict[str, tuple[Any, ...] | bool]
# Task -> needs there. The flag has no effect in a task that is missing.
Effect = dict[str, Needs]


def _training(**needs: tuple[Any, ...] | bool) -> Effect:
    return {TRAINING: needs}


def _evaluation(**needs: tuple[Any, ...] | bool) -> Effect:
    return {EVALUATION: needs}


def _both(**needs: tuple[Any, ...] | bool) -> Effect:
    return {TRAINING: needs, EVALUATION: needs}


def _methods(flag: str) -> tuple[str, ...]:
    """The methods that read a flag."""
    return tuple(name for name, facts in METHODS.items() if flag in facts.flags)


_MSDNETS = tuple(name for name in ARCHITECTURES if family_of(name) == "msdnet")
_RANETS = tuple(name for name in ARCHITECTURES if family_of(name) == "ranet")
_ONE_CALL = tuple(name for name, facts in METHODS.items() if facts.one_call)
_FIRST_STAGE = tuple(name for name, facts in METHODS.items() if not facts.second_stage)
# Not where the backbone is frozen anyway, nor where all there is to choose is which of its blocks a loss trains.
_FREEZABLE = tuple(name for name, facts in METHODS.items() if not facts.second_stage and "overlap" not in facts.flags)
_LEAVING = ("dynamic", "realtime")   # modes of evaluation in which inputs leave early
_AT_BUDGETS = ("confidence", "entropy", "margin")   # policies; patience has operating points of its own
_MACS_ONLY: Needs = {"publish": False, "images": False, "policy": _AT_BUDGETS, "evalmode": ("dynamic",), "cost": ("macs",)}

EFFECTS: dict[str, Effect] = {
    # What released command lines and the scripts here always pass is accepted everywhere.
    **dict.fromkeys(("workers", "val_workers", "gpu", "distributed", "dist_backend", "local_rank", "bnAfter",
                     "ensemble_reweight"), _both()),
    **dict.fromkeys(("seed", "device", "threads", "dataset", "data_root", "image_size", "batch_size", "method"), _both()),
    **dict.fromkeys(NETWORK, _both()),
    # Run.
    "result_dir": {TRAINING: {}, EVALUATION: {"publish": False}},
    "tensorboard_dir": _training(),
    "resume": _training(),
    "checkpoint": _training(resume=False),
    "checkpoint_key": {TRAINING: {"checkpoint": True}, EVALUATION: {}},
    "new_classifier": _training(checkpoint=True, method=_FIRST_STAGE),
    "deterministic": _training(),
    "print_freq": _training(),
    "save_every_minutes": _training(),
    # Data.
    "use_valid": {TRAINING: {}, EVALUATION: {}},
    "valid_size": _both(use_valid=True),
    "images_per_class": _training(),
    "decoder": _both(dataset=CROPPED, stem=("large",)),
    "skip_unreadable": _both(dataset=CROPPED, stem=("large",)),
    # Network.
    **dict.fromkeys(("nBlocks", "step", "stepmode", "nChannels", "growthRate", "grFactor", "reduction", "bottleneck"),
                    _both(arch=_MSDNETS + _RANETS)),
    **dict.fromkeys(("base", "prune"), _both(arch=_MSDNETS)),
    **dict.fromkeys(("block_step", "scale_list", "compress_factor"), _both(arch=_RANETS)),
    "bnFactor": _both(arch=_MSDNETS + _RANETS, bottleneck=True),
    # Method.
    **{flag: _training(method=_methods(flag)) for facts in METHODS.values() for flag in sorted(facts.flags)},
    "trainable_ensemble": _both(method=_methods("trainable_ensemble")),
    "include_final": _training(method=_methods("include_final"), overlap=True),
    "distill_T": _training(method=_methods("distill_T"), distill_weight=True),
    "teacher": _training(method=_methods("teacher"), distill_weight=True),
    # Training.
    **dict.fromkeys(("epochs", "optimizer", "lr_f", "lr_type", "lr_milestones", "weight_decay", "warmup_epochs",
                     "label_smoothing", "ema"), _training()),
    "freeze_backbone": _training(method=_FREEZABLE),
    "start_epoch": _training(resume=False, checkpoint=True),
    "momentum": _training(optimizer=("sgd", "rmsprop")),
    "nesterov": _training(optimizer=("sgd",), momentum=True),
    "decay_rate": _training(lr_type=("multistep",)),
    "lr_step": _training(lr_type=("cosine", "linear")),
    "paper_protocol": {TRAINING: {}, EVALUATION: {"publish": False, "images": False, "evalmode": ("dynamic",)}},
    **dict.fromkeys(("amp", "channels_last", "compile"), _training(method=_ONE_CALL)),
    "cuda_graphs": _training(method=_ONE_CALL, device=("auto", "cuda")),
    # Evaluation.
    "evaluate_from": _evaluation(),
    "evalmode": _evaluation(),
    "budget": _evaluation(publish=False, policy=_AT_BUDGETS, evalmode=_LEAVING),
    "ensemble": _evaluation(publish=False),
    "policy": _evaluation(publish=False, evalmode=_LEAVING),
    "cost": _evaluation(publish=False, evalmode=_LEAVING),
    "runtime": _evaluation(publish=False, evalmode=_LEAVING),
    "predictions": _evaluation(publish=False, evalmode=_LEAVING, policy=_AT_BUDGETS),
    "images": _evaluation(publish=False, evalmode=("dynamic",)),
    "thresholds": _evaluation(publish=False, policy=_AT_BUDGETS, evalmode=_LEAVING, max_drop=False, sweep=False,
                              flat_curve=False),
    "max_drop": _evaluation(publish=False, policy=_AT_BUDGETS, evalmode=_LEAVING, budget=False, sweep=False, flat_curve=False,
                            paper_protocol=False),
    "confidence_level": _evaluation(max_drop=True),
    "calibrate": _evaluation(publish=False, policy=_AT_BUDGETS, sweep=False, paper_protocol=False),
    "sweep": _evaluation(**_MACS_ONLY),
    "flat_curve": _evaluation(**_MACS_ONLY),
    "publish": _evaluation(evalmode=("anytime", "dynamic")),
    "publish_details": _evaluation(publish=True),
    "save_suffix": _evaluation(publish=False),
}

# What a checkpoint settles in evaluation: until it is read, the defaults of these flags mean nothing.
IN_FILE = {*NETWORK, "dataset", "image_size", "method"}


def without_effect(args: Namespace, parser: OneLineParser, task: str | None, *, file_read: bool = True) -> str | None:
    """Say which of the given flags has no effect, and why; None when all have one.

    Args:
        task: None for a command line that may be of either.
        file_read: what is evaluated has settled the flags `IN_FILE`.
    """
    for name in sorted(args.explicit):
        effect = EFFECTS[name]
        if task and task not in effect:
            return f"argument {parser.spelling(name)}: has no effect in {task}"
        for other, allowed in effect.get(task or TRAINING, effect.get(EVALUATION, {})).items():
            value, flag = getattr(args, other), parser.spelling(other)
            if not file_read and other in IN_FILE and other not in args.explicit:
                continue
            if isinstance(allowed, bool):
                if bool(value) != allowed:
                    return f"argument {parser.spelling(name)}: has no effect {'without' if allowed else 'with'} {flag}"
            elif value not in allowed:
                choices = " or ".join(map(str, allowed))
                return f"argument {parser.spelling(name)}: has no effect with {flag} {value}, only with {choices}"
    return None
