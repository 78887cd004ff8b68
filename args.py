"""The command line and every check of its values and combinations; `utils.options.flags` lists the flags.

    from args import parse_args
    args = parse_args("--dataset cifar100 --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16".split())

All scripts share these flags. A mistake ends the program with one line on stderr and exit code 2.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from utils.options.catalog import DATASETS, MAX_LAYERS, METHODS, n_layers
from utils.options.flags import FREE_ON_RESUME, IMAGE_SIZES, NETWORK, Milliseconds, build_parser
from utils.options.parser import Rule, each, is_path, is_utf8, rising, shown

# A classifier halves the coarsest map twice and pools it to one value: the map is 8x8 (32 pixels) or 7x7 (224).
N_SCALES = {32: 3, 224: 4}


def _is_msdnet(args: Namespace) -> bool:
    return args.arch.startswith("msdnet")


def _n_exits(args: Namespace) -> int:
    return args.nBlocks + (0 if _is_msdnet(args) else args.block_step * (len(args.scale_list) - 1))


def _fits_images(args: Namespace, n_scales: int) -> bool:
    # Without any flag about the network (someone may only want the data) the default network is left to the model.
    return n_scales == N_SCALES[args.image_size] or args.explicit.isdisjoint(NETWORK)


# Everything that must hold, in one table: single values first, then combinations, which may rely on them. With
# --evaluate-from the network comes from the file, so a rule marked if_given does not judge a default in its place.
# What only shows while a network is built (a width that ends at 0, say) the model refuses with a ValueError.
RULES: tuple[Rule, ...] = (
    *each("nBlocks base step nChannels growthRate grFactor bnFactor block_step scale_list epochs batch_size "
          "print_freq valid_size lr_milestones groups overlap meta_net_hidden_size meta_interval",
          lambda x: 1 <= x <= 1_000_000, "at least 1 and at most 1000000"),
    *each("threads meta_net_num_layers", lambda x: 1 <= x <= 1024, "at least 1 and at most 1024"),
    *each("start_epoch workers val_workers local_rank", lambda x: 0 <= x <= 1_000_000, "at least 0 and at most 1000000"),
    *each("weight_decay ensemble_reweight meta_weight_decay", lambda x: 0 <= x <= 1e30, "at least 0 and at most 1e30"),
    *each("lr_f budget meta_lr distill_T save_every_minutes", lambda x: 0 < x <= 1e30, "above 0 and at most 1e30"),
    *each("epsilon distill_weight", lambda x: 0 <= x <= 1, "from 0 to 1"),
    *each("target_p_index", lambda x: 1 <= x <= 39, "from 1 to 39"),
    *each("seed", lambda x: 0 <= x < 2**32, "from 0 to 4294967295"),
    *each("momentum", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    *each("decay_rate reduction", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    *each("compress_factor", lambda x: 0 < x < 1, "above 0 and below 1"),
    *each("image_size", lambda x: x in IMAGE_SIZES, "32 or 224"),
    *each("gpu", lambda x: re.fullmatch(r"[0-9]+(,[0-9]+)*", x) and len(set(x.split(","))) == x.count(",") + 1,
          "different device numbers such as 0 or 0,1 (--device cpu for none)"),
    *each("save_suffix", lambda x: is_path(f"_{x}") and not re.search(r"[/\\]", x), "a part of a file name, without / and \\"),
    *each("result_dir tensorboard_dir checkpoint data_root evaluate_from teacher publish", is_path, "a path"),
    *each("result_dir tensorboard_dir publish", is_utf8, "a path in UTF-8, as the files in it"),
    # Data.
    Rule(("image_size", "dataset"),
         lambda a: DATASETS[a.dataset].image_size in (None, a.image_size),
         lambda a: f"{a.dataset} has images of {DATASETS[a.dataset].image_size} pixels, got {a.image_size}; "
                   "only --dataset folder leaves the choice"),
    *(Rule((name, "image_size", "dataset"),
           lambda a, n=name: n not in a.explicit or a.image_size != 32,
           lambda a: f"is for images of 224 pixels, which are decoded during training; those of {a.dataset} have 32 here",
           if_given=True)
      for name in ("decoder", "skip_unreadable")),
    Rule(("valid_size", "use_valid"),
         lambda a: "valid_size" not in a.explicit or a.use_valid,
         lambda a: "has no effect without --use-valid"),
    Rule(("valid_size", "dataset"),
         lambda a: DATASETS[a.dataset].n_train is None or a.valid_size < DATASETS[a.dataset].n_train,
         lambda a: f"{a.valid_size} leaves nothing to train on: {a.dataset} has {DATASETS[a.dataset].n_train} images"),
    # Network.
    Rule(("bnFactor", "grFactor"),
         lambda a: len(a.bnFactor) == len(a.grFactor),
         lambda a: f"has {len(a.bnFactor)} entries, --grFactor has {len(a.grFactor)}; both need one per scale",
         if_given=True),
    Rule(("scale_list", "grFactor", "arch"),
         lambda a: _is_msdnet(a) or len(a.scale_list) == len(a.grFactor),
         lambda a: f"has {len(a.scale_list)} entries, --grFactor has {len(a.grFactor)}; both need one per sub-network",
         if_given=True),
    Rule(("scale_list", "arch"),
         lambda a: _is_msdnet(a) or (a.scale_list[0] == 1 and all(step >= 0 for step in rising(a.scale_list))),
         lambda a: f"must start at 1 and never fall, got {shown(a.scale_list)}",
         if_given=True),
    Rule(("scale_list", "arch", "dataset"),
         lambda a: _is_msdnet(a) or _fits_images(a, len(set(a.scale_list))),
         lambda a: f"needs {N_SCALES[a.image_size]} different entries for images of {a.image_size} pixels, "
                   f"got {shown(a.scale_list)}",
         if_given=True),
    Rule(("grFactor", "arch", "dataset"),
         lambda a: not _is_msdnet(a) or _fits_images(a, len(a.grFactor)),
         lambda a: f"images of {a.image_size} pixels need {N_SCALES[a.image_size]} scales, "
                   f"got {len(a.grFactor)} entries",
         if_given=True),
    Rule(("grFactor", "growthRate", "arch"),
         lambda a: not _is_msdnet(a) or all(a.growthRate * factor % 2 == 0 for factor in a.grFactor[1:]),
         lambda a: f"--growthRate times each entry but the first must be even, got {a.growthRate} times "
                   f"{shown(a.grFactor[1:])}",
         if_given=True),
    Rule(("compress_factor", "growthRate", "grFactor", "arch"),
         lambda a: _is_msdnet(a) or all(a.compress_factor * a.growthRate * f >= 1 for f in a.grFactor[1:]),
         lambda a: f"{a.compress_factor:g} leaves a fusion layer no channel of the {a.growthRate} (--growthRate) times "
                   f"{shown(a.grFactor[1:])} that it adds",
         if_given=True),
    Rule(("nBlocks", "base", "step", "stepmode", "prune", "arch", "grFactor"),
         lambda a: not _is_msdnet(a) or a.prune == "max" or n_layers(a) >= len(a.grFactor) - 1,
         lambda a: f"--prune min needs at least {len(a.grFactor) - 1} layers for {len(a.grFactor)} scales, "
                   f"got {n_layers(a)}",
         if_given=True),
    Rule(("nBlocks", "step", "stepmode", "arch"),
         lambda a: n_layers(a) <= MAX_LAYERS,
         lambda a: f"makes a network of {n_layers(a)} layers with --step {a.step} --stepmode {a.stepmode}; "
                   f"at most {MAX_LAYERS} are allowed",
         if_given=True),
    # Method.
    Rule(("ensemble_reweight", "arch", "nBlocks", "block_step", "scale_list"),
         lambda a: len(a.ensemble_reweight) in (1, 2, _n_exits(a)),
         lambda a: f"has {len(a.ensemble_reweight)} values; pass one, two to interpolate, or one per exit, "
                   f"which makes {_n_exits(a)} here",
         if_given=True),
    *(Rule((name, "method"),
           lambda a, n=name: n not in a.explicit or n in METHODS[a.method].flags,
           lambda a, n=name: f"has no meaning with --method {a.method}; it is for "
                             + " and ".join(method for method, facts in METHODS.items() if n in facts.flags),
           if_given=True)
      for name in sorted(frozenset().union(*(facts.flags for facts in METHODS.values())))),
    Rule(("method", "groups", "overlap"),
         lambda a: "groups" not in METHODS[a.method].flags or (a.groups is None) != (a.overlap is None) or a.evaluate_from,
         lambda a: f"{a.method} takes either --groups, such as 3-4, or --overlap, where 1 is local error"),
    Rule(("groups", "arch", "nBlocks", "block_step", "scale_list"),
         lambda a: a.groups is None or sum(a.groups) == _n_exits(a),
         lambda a: f"{'-'.join(map(str, a.groups))} makes {sum(a.groups)} blocks; the network has {_n_exits(a)}",
         if_given=True),
    Rule(("overlap", "arch", "nBlocks", "block_step", "scale_list"),
         lambda a: a.overlap is None or a.overlap <= _n_exits(a),
         lambda a: f"{a.overlap} is more than the {_n_exits(a)} blocks of the network, which --method joint trains all",
         if_given=True),
    Rule(("include_final", "overlap"),
         lambda a: not a.include_final or a.overlap is not None,
         lambda a: "goes with --overlap"),
    Rule(("teacher", "distill_weight", "method"),
         lambda a: not a.teacher or a.distill_weight,
         lambda a: "has no effect with --distill_weight 0"),
    Rule(("checkpoint", "method", "resume", "evaluate_from"),
         lambda a: not METHODS[a.method].second_stage or a.checkpoint or a.resume or a.evaluate_from,
         lambda a: f"--method {a.method} builds on a trained network; name its file"),
    Rule(("batch_size", "method", "evaluate_from"),
         lambda a: a.batch_size > 1 or not METHODS[a.method].second_stage or a.evaluate_from,
         lambda a: f"--method {a.method} needs at least 2 images in a step, for batch normalisation of vectors"),
    Rule(("optimizer", "method"),
         lambda a: a.optimizer == "sgd" or not METHODS[a.method].sgd_only,
         lambda a: f"--method {a.method} works with sgd only, got {a.optimizer}"),
    # Training.
    Rule(("start_epoch", "epochs"),
         lambda a: a.start_epoch < a.epochs,
         lambda a: f"{a.start_epoch} leaves nothing to do with --epochs {a.epochs}"),
    Rule(("lr_milestones",),
         lambda a: all(step > 0 for step in rising(a.lr_milestones)),
         lambda a: f"must increase, got {shown(a.lr_milestones)}"),
    Rule(("weight_decay",),
         lambda a: len(a.weight_decay) <= 2,
         lambda a: f"takes one value or two, got {len(a.weight_decay)}"),
    Rule(("weight_decay", "arch"),
         lambda a: len(a.weight_decay) == 1 or _is_msdnet(a),
         lambda a: f"two values are interpolated over MSDNet's blocks; {a.arch} takes one",
         if_given=True),
    Rule(("weight_decay", "method"),
         lambda a: len(a.weight_decay) == 1 or not METHODS[a.method].second_stage,
         lambda a: f"two values are interpolated over MSDNet's blocks, which --method {a.method} does not train",
         if_given=True),
    Rule(("resume", "checkpoint"),
         lambda a: not (a.resume and a.checkpoint),
         lambda a: "continues from the run's own checkpoint, --checkpoint starts from another; give one of them"),
    Rule(("resume", "start_epoch"),
         lambda a: not (a.resume and "start_epoch" in a.explicit),
         lambda a: "takes the epoch from the checkpoint; leave out --start-epoch"),
    *(Rule((name, "method"),
           lambda a, n=name: n not in a.explicit or METHODS[a.method].one_call,
           lambda a: "is for " + ", ".join(method for method, facts in METHODS.items() if facts.one_call)
                     + f"; --method {a.method} goes through the network in its own way")
      for name in ("amp", "channels_last", "compile", "cuda_graphs")),
    Rule(("cuda_graphs", "device"),
         lambda a: not (a.cuda_graphs and a.device == "cpu"),
         lambda a: "needs a CUDA device, got --device cpu"),
    Rule(("paper_protocol", "evaluate_from", "evalmode"),
         lambda a: not (a.paper_protocol and a.evaluate_from) or a.evalmode == "dynamic",
         lambda a: "changes in evaluation what thresholds are fitted on, and belongs to --evalmode dynamic"),
    Rule(("paper_protocol", "images"),
         lambda a: not (a.paper_protocol and a.images),
         lambda a: "chooses what thresholds are fitted on, and --images takes those that have been fitted; leave it out"),
    # Evaluation.
    *(Rule((name, "evaluate_from"),
           lambda a, n=name: not (getattr(a, n) and a.evaluate_from),
           lambda a: "is for training, --evaluate-from for evaluation; give one of them")
      for name in ("checkpoint", "resume")),
    Rule(("publish", "evalmode"),
         lambda a: not a.publish or a.evalmode in ("anytime", "dynamic"),
         lambda a: f"has no meaning with --evalmode {a.evalmode}; it belongs to anytime and dynamic"),
    *(Rule(("publish", name),
           lambda a, n=name: not a.publish or n not in a.explicit,
           lambda a, n=name: f"writes whole curves under fixed names; leave --{n} out")
      for name in ("budget", "sweep", "flat_curve", "save_suffix", "result_dir", "paper_protocol", "ensemble", "policy",
                   "images")),
    Rule(("budget", "sweep"),
         lambda a: not (a.budget and a.sweep),
         lambda a: "chooses the budgets, --sweep has its own exit distributions; give one of them"),
    Rule(("budget", "cost"),
         lambda a: all(isinstance(x, Milliseconds) == (a.cost == "latency") for x in a.budget or []),
         lambda a: f"--cost {a.cost} takes budgets in {'milliseconds, such as 3.5ms' if a.cost == 'latency' else 'MACs'}"),
    Rule(("cost", "evalmode"),
         lambda a: a.cost == "macs" or a.evalmode != "anytime",
         lambda a: "budgets in time have no meaning with --evalmode anytime; use --evalmode realtime"),
    Rule(("policy", "evalmode"),
         lambda a: a.policy == "confidence" or a.evalmode != "anytime",
         lambda a: "has no meaning with --evalmode anytime, where nothing leaves; use --evalmode dynamic or realtime"),
    Rule(("policy", "budget", "sweep", "flat_curve", "images", "evalmode", "cost"),
         lambda a: a.policy != "patience" or not (a.budget or a.sweep or a.flat_curve or a.images
                                                or a.evalmode == "realtime" or a.cost == "latency"),
         lambda a: "patience is simulated at operating points of its own, one for each number of exits that agree; it takes no "
                   "--budget, --cost, --sweep, --flat_curve, --images or --evalmode realtime"),
    Rule(("budget", "evalmode"),
         lambda a: not a.budget or a.evalmode != "anytime",
         lambda a: "has no meaning with --evalmode anytime; use --evalmode dynamic or realtime"),
    *(Rule((name, "evalmode", "cost"),
           lambda a, n=name: not getattr(a, n) or (a.evalmode == "dynamic" and a.cost == "macs"),
           lambda a: f"has no meaning with --evalmode {a.evalmode} --cost {a.cost}; it belongs to --evalmode dynamic in MACs")
      for name in ("sweep", "flat_curve")),
    Rule(("images", "budget", "cost", "sweep", "flat_curve"),
         lambda a: not a.images or not (len(a.budget or []) > 1 or a.cost == "latency" or a.sweep or a.flat_curve),
         lambda a: "takes at most one --budget, in MACs, and neither --sweep nor --flat_curve"),
)


def parse_args(argv: Sequence[str] | None = None, *, datasets: Sequence[str] = tuple(DATASETS)) -> Namespace:
    """Parse and check a command line (`sys.argv[1:]` when None).

    Beside the flags the namespace holds `num_classes` (None for --dataset folder: the data says) and `explicit`, the
    frozenset of the dest names that were really given. `datasets` limits --dataset, see `build_parser`.

    Raises:
        SystemExit: code 2 and one line on stderr for a mistake, code 0 for --help.
    """
    parser = build_parser(datasets)
    args, explicit = parser.parse_given(argv)
    args.explicit = explicit
    _fill_in(args)
    for rule in RULES:
        left_to_file = rule.if_given and args.evaluate_from and not explicit.issuperset(rule.flags)
        if not left_to_file and not rule.holds(args):
            parser.error(f"argument {parser.spelling(rule.flags[0])}: {rule.message(args)}")
    return args


def _fill_in(args: Namespace) -> None:
    """Values that follow from other flags."""
    dataset = DATASETS[args.dataset]
    args.num_classes = dataset.num_classes
    if args.image_size is None:
        args.image_size = dataset.image_size or IMAGE_SIZES[0]
    if args.valid_size is None:
        args.valid_size = dataset.valid_size
    for name, value in METHODS[args.method].defaults.items():
        if name not in args.explicit:
            setattr(args, name, value)
    if "cost" not in args.explicit and any(isinstance(value, Milliseconds) for value in args.budget or []):
        args.cost = "latency"
    if args.cost == "latency" and args.evalmode == "dynamic":   # time is measured, not simulated
        args.evalmode = "realtime"
    if "evalmode" not in args.explicit and (
            args.cost == "latency" or args.budget or args.sweep or args.flat_curve or args.policy != "confidence"):
        args.evalmode = "realtime" if args.cost == "latency" else "dynamic"


def require(args: Namespace, *names: str) -> None:
    """End the program (one line, exit code 2) unless every flag of `names` (dest names) has a value."""
    parser = build_parser()
    missing = [parser.spelling(name) for name in names if not getattr(args, name)]
    if missing:
        parser.error(f"this script needs {' and '.join(missing)}")


def forbid(args: Namespace, *names: str) -> None:
    """End the program (one line, exit code 2) if a flag of `names` (dest names), of no use to a script, was given."""
    parser = build_parser()
    present = [parser.spelling(name) for name in names if name in args.explicit]
    if present:
        parser.error(f"this script has no use for {' and '.join(present)}")


def require_unchanged(args: Namespace, before: dict[str, Any], epochs_begun: int) -> None:
    """End the program (one line, exit code 2) if flags contradict those of the run that is to be resumed.

    Args:
        before: flags of that run by dest name; a flag that did not exist then had its default.
        epochs_begun: epochs of that run that are complete or under way.
    """
    parser = build_parser()
    cosine = args.lr_type == "cosine" or "meta_lr" in METHODS[args.method].flags   # which falls to 0 at the last epoch
    free = FREE_ON_RESUME if cosine else FREE_ON_RESUME | {"epochs"}
    if before.get("on_nan", "stop") != "stop":
        parser.error(f"--resume: the run in {args.result_dir} leaves bad steps out (--on_nan {before['on_nan']}), which only "
                     "version 0.1 can do; resume it with that version")
    changed = []
    for name, default in vars(parser.parse_args([])).items():
        now, then = getattr(args, name), before.get(name, default)
        if now != then and name not in free:
            changed.append(f"{parser.spelling(name)} {shown(now)} (was {shown(then)})")
    if changed:
        parser.error(f"--resume: this is not the command of the run in {args.result_dir}: {', '.join(changed)}; give these flags "
                     "as before, or another --result_dir for a new run")
    if args.epochs < epochs_begun:
        parser.error(f"--resume: the run in {args.result_dir} has begun epoch {epochs_begun} already; pass a larger --epochs "
                     f"than {args.epochs}")
