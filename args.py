"""The command line and every check of its values and combinations; `utils.options.flags` lists the flags.

    from args import parse_args
    args = parse_args("--dataset cifar100 --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16".split())

All scripts share these flags. A mistake ends the program with one line on stderr and exit code 2.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from utils.options.catalog import ANYTIME_NETWORKS, DATASETS, METHODS, family_of, title_of
from utils.options.effects import EVALUATION, TRAINING, without_effect
from utils.options.flags import BEFORE_THE_FLAG, FREE_ON_RESUME, Milliseconds, build_parser, implied
from utils.options.network import MAX_LAYERS, NETWORK, NetworkSpec, is_msdnet, n_layers, stem_of
from utils.options.parser import shown

# What a script cannot do without.
NEEDED = {TRAINING: "result_dir", EVALUATION: "evaluate_from"}


def parse_args(argv: Sequence[str] | None = None, *, datasets: Sequence[str] = tuple(DATASETS),
               task: str | None = None) -> Namespace:
    """Parse and check a command line (`sys.argv[1:]` when None).

    Beside the flags the namespace holds `num_classes` (None for --dataset folder: the data says) and `explicit`, the
    frozenset of the dest names that were really given.

    Args:
        datasets: limits --dataset, see `build_parser`.
        task: what the script does, "training" or "evaluation"; None for a command line of either.
    Raises:
        SystemExit: code 2 and one line on stderr for a mistake, code 0 for --help.
    """
    parser = build_parser(datasets)
    args, args.explicit = parser.parse_given(argv)
    _fill_in(args)
    if task and not getattr(args, NEEDED[task]):
        parser.error(f"{task} needs {parser.spelling(NEEDED[task])}")
    task = EVALUATION if args.evaluate_from and not task else task
    mistake = without_effect(args, parser, task, file_read=not args.evaluate_from) or _mistake(args)
    if not mistake and not args.evaluate_from and not _chooses_no_network(args):
        mistake = _no_network(args)
    if mistake:
        parser.error(mistake)
    return args


def _fill_in(args: Namespace) -> None:
    """Values that follow from other flags."""
    args.num_classes = DATASETS[args.dataset].num_classes
    for name, value in implied(args.dataset, args.method, args.image_size).items():
        if name not in args.explicit:
            setattr(args, name, value)
    if "cost" not in args.explicit and any(isinstance(value, Milliseconds) for value in args.budget or []):
        args.cost = "latency"
    in_time = args.cost == "latency" and not args.images   # `_mistake` refuses it for --images
    if in_time and args.evalmode == "dynamic":   # time is measured, not simulated
        args.evalmode = "realtime"
    if "evalmode" not in args.explicit and (args.cost == "latency" or args.budget or args.sweep or args.flat_curve
                                            or args.images or args.policy != "confidence"
                                            or args.thresholds != "geometric" or args.max_drop):
        args.evalmode = "realtime" if in_time else "dynamic"


def _mistake(args: Namespace) -> str | None:
    """What is wrong with the combination of the flags, apart from those that have no effect; None where nothing is."""
    dataset, method, given = DATASETS[args.dataset], METHODS[args.method], args.explicit
    training = not args.evaluate_from
    # Data.
    # In evaluation the checkpoint says which data set it is.
    if (training or "dataset" in given) and dataset.image_size not in (None, args.image_size):
        return (f"argument --image_size: {args.dataset} has images of {dataset.image_size} pixels, got {args.image_size}; only "
                "--dataset folder leaves the choice")
    if args.dataset == "imagenet" and args.stem != "large":
        return f"argument --stem: images of imagenet are scaled and cropped, which goes with large, got {args.stem}"
    if dataset.n_train and args.valid_size >= dataset.n_train:
        return (f"argument --valid_size: {args.valid_size} leaves nothing to train on: {args.dataset} has {dataset.n_train} "
                "images")
    # Network and method.
    if {"grFactor", "bnFactor"} <= given and len(args.grFactor) != len(args.bnFactor):
        return f"--grFactor has {len(args.grFactor)} entries, --bnFactor {len(args.bnFactor)}; both need one per scale"
    if training and "groups" in method.flags and (args.groups is None) == (args.overlap is None):
        return f"--method {args.method} takes either --groups, such as 3-4, or --overlap, where 1 is local error"
    if training and method.second_stage and not (args.checkpoint or args.resume):
        return f"--method {args.method} builds on a trained network; name its file with --checkpoint"
    if training and method.second_stage and args.batch_size < 2:
        return (f"argument --batch-size: --method {args.method} needs at least 2 images in a step, for batch normalisation of "
                "vectors")
    if training and args.freeze_backbone and family_of(args.arch) != "own" and not (args.checkpoint or args.resume):
        return "argument --freeze_backbone: would freeze a network that has not been trained; name its weights with --checkpoint"
    if training and method.sgd_only and args.optimizer != "sgd":
        return f"argument --optimizer: --method {args.method} works with sgd only, got {args.optimizer}"
    # Training.
    if training and args.start_epoch >= args.epochs:
        return f"argument --start-epoch: {args.start_epoch} leaves nothing to do with --epochs {args.epochs}"
    if training and args.warmup_epochs >= args.epochs:
        return f"argument --warmup_epochs: {args.warmup_epochs:g} leaves no epoch at the full rate with --epochs {args.epochs}"
    if any(after <= before for before, after in pairwise(args.lr_milestones)):
        return f"argument --lr_milestones: must increase, got {shown(args.lr_milestones)}"
    if len(args.weight_decay) > 2:
        return f"argument --weight-decay: takes one value or two, got {len(args.weight_decay)}"
    if len(args.weight_decay) == 2 and (family_of(args.arch) == "ranet" or method.second_stage):
        return (f"argument --weight-decay: two values are interpolated over a chain of blocks, such as MSDNet's; --arch "
                f"{args.arch} --method {args.method} takes one")
    # Evaluation.
    if args.budget and args.sweep:
        return "argument --budget: chooses the budgets, --sweep has its own exit distributions; give one of them"
    if not training and args.use_valid and args.evalmode == "anytime" and not args.calibrate:
        return "argument --use-valid: has no effect with --evalmode anytime, only with dynamic, realtime or --calibrate"
    if any(isinstance(budget, Milliseconds) != (args.cost == "latency") for budget in args.budget or []):
        unit = "milliseconds, such as 3.5ms" if args.cost == "latency" else "MACs"
        return f"argument --budget: --cost {args.cost} takes budgets in {unit}"
    if args.policy == "patience" and (args.images or args.evalmode == "realtime"):
        return "argument --policy: patience is simulated only, and takes neither --images nor --evalmode realtime"
    if not args.images and args.evalmode == "dynamic" and (alone := {"runtime", "predictions"} & given):
        return f"argument --{min(alone)}: has no effect with --evalmode dynamic, only with realtime or --images"
    if args.predictions and not args.images and len(args.budget or []) != 1 and args.max_drop is None:
        return "argument --predictions: is of one operating point; give one --budget, or --max_drop"
    if args.images and (len(args.budget or []) > 1 or args.cost == "latency"):
        return "argument --images: takes at most one --budget, in MACs"
    return None


def _chooses_no_network(args: Namespace) -> bool:
    """Whether nothing is said about the network, or only its family and its first layer."""
    return args.explicit.isdisjoint(set(NETWORK) - {"arch", "stem"})


def _no_network(args: Namespace) -> str | None:
    """Why the flags make no network, or none that the method's flags fit; None where they do.

    The network itself is asked, on a device without storage.
    """
    if n_layers(args) > MAX_LAYERS:
        return (f"argument --nBlocks: makes a network of {n_layers(args)} layers with --step {args.step} --stepmode "
                f"{args.stepmode}; at most {MAX_LAYERS} are allowed")
    if is_msdnet(args) and args.nBlocks == 1 and (idle := {"step", "stepmode"} & args.explicit):
        return f"argument --{min(idle)}: has no effect with --nBlocks 1, only with more blocks"
    from models import build_shapes  # here, because it loads torch, which --help can do without

    try:
        n_exits = build_shapes(replace(NetworkSpec.from_args(args), num_classes=args.num_classes or 2)).n_exits
    except ValueError as error:
        return str(error)
    if len(args.ensemble_reweight) not in (1, 2, n_exits):
        return (f"argument --ensemble_reweight: has {len(args.ensemble_reweight)} values; pass one, two to interpolate, or one "
                f"per exit, which makes {n_exits} here")
    if args.groups and sum(args.groups) != n_exits:
        return (f"argument --groups: {'-'.join(map(str, args.groups))} makes {sum(args.groups)} blocks; the network has "
                f"{n_exits}")
    if args.overlap and args.overlap > n_exits:
        return (f"argument --overlap: {args.overlap} is more than the {n_exits} blocks of the network, which --method joint "
                "trains all")
    return None


def choose_network(args: Namespace, before: dict[str, Any] | None = None) -> str | None:
    """Where no flag says what the network is, or --arch and --stem alone, take the one of the run that goes on, else the paper's.

    Ends the program (one line, exit code 2) if the other flags do not fit it.

    Args:
        before: flags of the run that is to be resumed, by dest name.
    Returns:
        A line that names the paper's network where that was taken.
    """
    if not _chooses_no_network(args):
        return None
    parser = build_parser()
    defaults = parser.defaults()
    if before:
        before = {"stem": args.stem, **before}   # a run from before there was a choice has the one of its image size
        chosen, note = {name: before.get(name, defaults[name]) for name in NETWORK if name not in args.explicit}, None
        if family_of(chosen.get("arch", "")) == "own":
            parser.error(f"--resume: the network of the run in {args.result_dir} was made by {chosen['arch']}; code runs only "
                         f"where its user names it: pass the file again, --arch FOLDER/{chosen['arch']}")
    elif (family_of(args.arch), args.stem) not in ANYTIME_NETWORKS:   # its name says all
        chosen, note = {}, None
    else:
        chosen = ANYTIME_NETWORKS[family_of(args.arch), args.stem]
        flags = " ".join(f"{parser.spelling(name)} {'-'.join(map(str, value)) if isinstance(value, list) else value}"
                         for name, value in chosen.items())
        note = f"no flag of the network is given: taking the paper's for {title_of(args.dataset)}, --arch {args.arch} {flags}"
    for name, value in chosen.items():
        setattr(args, name, value)
    if mistake := _no_network(args):
        parser.error(mistake)
    return note


def keep_lr_step(args: Namespace, before: dict[str, Any]) -> None:
    """Unless --lr_step is given, take that of the run that goes on, whose flags `before` has by dest name."""
    if "lr_step" not in args.explicit:
        args.lr_step = {**BEFORE_THE_FLAG, **before}["lr_step"]


def require_effect(args: Namespace) -> None:
    """End the program (one line, exit code 2) if a flag has no effect with what the evaluated file says of itself."""
    parser = build_parser()
    if mistake := without_effect(args, parser, EVALUATION):
        parser.error(mistake)


def require_unchanged(args: Namespace, before: dict[str, Any], epochs_begun: int) -> None:
    """End the program (one line, exit code 2) if flags contradict those of the run that is to be resumed.

    Args:
        before: flags of that run by dest name; a flag that did not exist then had its default, or what `BEFORE_THE_FLAG` says.
        epochs_begun: epochs of that run that are complete or under way.
    """
    parser, before = build_parser(), {**BEFORE_THE_FLAG, **before}
    falls_to_0 = args.lr_type != "multistep" or "meta_lr" in METHODS[args.method].flags   # over all epochs
    free = FREE_ON_RESUME if falls_to_0 else FREE_ON_RESUME | {"epochs"}
    if before.get("on_nan", "stop") != "stop":
        parser.error(f"--resume: the run in {args.result_dir} leaves bad steps out (--on_nan {before['on_nan']}), which only "
                     "version 0.1 can do; resume it with that version")
    before = {"stem": stem_of(before), **before}
    changed = []
    for name, default in parser.defaults().items():
        now, then = getattr(args, name), before.get(name, default)
        if now != then and name not in free:
            changed.append(f"{parser.spelling(name)} {shown(now)} (was {shown(then)})")
    if changed:
        parser.error(f"--resume: this is not the command of the run in {args.result_dir}: {', '.join(changed)}; give these flags "
                     "as before, or another --result_dir for a new run")
    if args.epochs < epochs_begun:
        parser.error(f"--resume: the run in {args.result_dir} has begun epoch {epochs_begun} already; pass a larger --epochs "
                     f"than {args.epochs}")
