"""The command line: every flag, its default and every check of values and combinations.

    from args import parse_args
    args = parse_args("--dataset cifar100 --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16".split())

All scripts share these flags. A mistake ends the program with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from utils.catalog import DATASETS
from utils.cli import OneLineParser, Rule, each, is_path, list_of, number, rising, shown, true_false, whole

IMAGE_SIZES = (32, 224)
DECODERS = ("pillow", "torchcodec")   # those of utils/decoders.py, which need torch
# A classifier halves the coarsest map twice and pools it to one value: the map is 8x8 (32 pixels) or 7x7 (224).
N_SCALES = {32: 3, 224: 4}
# A mistyped number of blocks should be an error, not a machine that swaps. The largest published network has 160.
MAX_LAYERS = 1000

# The flags that describe the network.
NETWORK = frozenset((
    "arch", "nBlocks", "base", "step", "stepmode", "nChannels", "growthRate", "grFactor", "bnFactor", "bottleneck",
    "prune", "reduction", "block_step", "scale_list", "compress_factor",
))

per_scale = list_of(whole, "-", "1-2-4")


class Milliseconds(float):
    """A budget in milliseconds per image, on the command line with its unit: 3.5ms."""


def budget(text: str) -> float:
    return Milliseconds(number(text.strip()[:-2])) if text.strip().endswith("ms") else number(text)


def build_parser(datasets: Sequence[str] = tuple(DATASETS)) -> OneLineParser:
    """The parser of every script.

    Args:
        datasets: data sets the script works on; the default is cifar100 where it is among them, else the first.
    """
    parser = OneLineParser(
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
        description="BoostNet: boosted early-exit networks (arXiv:2211.16726). All scripts share these flags.",
    )
    default_dataset = "cifar100" if "cifar100" in datasets else datasets[0]

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--result_dir", metavar="DIR", help="everything the run writes goes here; training needs it")
    add("--tensorboard_dir", metavar="DIR", help="TensorBoard event files (default: inside --result_dir)")
    add("--resume", action="store_true", help="continue the run in --result_dir from its latest good checkpoint")
    add("--checkpoint", metavar="FILE", help="start training from the weights in this file")
    add("--seed", type=whole, default=0, metavar="N",
        help="seed of weights, data order, augmentation and hold-out split (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto is cuda where there is one, else cpu (default: %(default)s)")
    add("--gpu", default="0", metavar="N[,N]", help="GPUs to use, no effect on the CPU (default: %(default)s)")
    add("--threads", type=whole, metavar="N", help="CPU threads of PyTorch (default: PyTorch's own choice)")
    add("--deterministic", action="store_true",
        help="make CUDA give the same bits in every run, at some cost in speed; the CPU always does")
    add("--print-freq", "-p", type=whole, default=10, metavar="N",
        help="steps between two looks at the running loss (default: %(default)s)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--dataset", choices=tuple(datasets), default=default_dataset,
        help="glyphs is synthetic and needs no files; folder is DATA_ROOT/{train,test}/CLASS/IMAGE "
             "(default: %(default)s)")
    add("--data-root", default="data", metavar="DIR", help="folder of the data set (default: %(default)s)")
    add("--image_size", type=whole, metavar="N",
        help="side of the images in pixels, 32 or 224; only --dataset folder leaves the choice (default there: 32)")
    add("--use-valid", action="store_true",
        help="hold part of the training set out, for model choice and exit thresholds")
    add("--valid_size", type=whole, metavar="N",
        help="images to hold out (default: 5000 of CIFAR, 50000 of ImageNet, 2000 of glyphs, a tenth of a folder)")
    add("--workers", type=whole, default=4, metavar="N",
        help="processes that load training images; 32-pixel data sets live on the device and use none "
             "(default: %(default)s)")
    add("--val_workers", type=whole, default=1, metavar="N",
        help="the same for hold-out and test images (default: %(default)s)")
    add("--decoder", choices=DECODERS, default="pillow",
        help="what decodes and scales images of 224 pixels: pillow as in the paper, or torchcodec, which is faster and rounds a "
             "few pixels differently (default: %(default)s)")
    add("--skip_unreadable", action="store_true",
        help="count, log and leave out images of 224 pixels that cannot be read, instead of stopping at the first one")

    network = parser.add_argument_group("network", "lists have one entry per scale (MSDNet) or sub-network (RANet)")
    add = network.add_argument
    add("--arch", choices=("msdnet", "msdnet_ge", "ranet", "ranet_ge"), default="msdnet_ge",
        help="_ge: with gradient rescaling (default: %(default)s)")
    add("--nBlocks", type=whole, default=1, metavar="N",
        help="MSDNet: blocks, each with an exit; RANet: blocks of the first sub-network (default: %(default)s)")
    add("--base", type=whole, default=4, metavar="N", help="MSDNet: layers of the first block (default: %(default)s)")
    add("--step", type=whole, default=1, metavar="N",
        help="layers of a further block (MSDNet) or of every block (RANet); lin_grow: how many more each block has "
             "than the one before (default: %(default)s)")
    add("--stepmode", choices=("even", "lin_grow"), default="even",
        help="blocks of equal or of growing depth (default: %(default)s)")
    add("--nChannels", type=whole, default=32, metavar="N", help="channels of the first layer (default: %(default)s)")
    add("--growthRate", type=whole, default=6, metavar="N", help="channels a layer adds (default: %(default)s)")
    add("--grFactor", type=per_scale, default="1-2-4", metavar="N-N-N",
        help="factors on --nChannels and --growthRate (default: %(default)s)")
    add("--bnFactor", type=per_scale, default="1-2-4", metavar="N-N-N",
        help="width of the bottlenecks in outputs of their layer (default: %(default)s)")
    add("--bottleneck", type=true_false, default=True, metavar="true|false",
        help="1x1 convolution before each 3x3 one (default: true)")
    add("--prune", choices=("max", "min"), default="max",
        help="MSDNet: drop the finest scales as early or as late as possible (default: %(default)s)")
    add("--reduction", type=number, default=0.5, metavar="X",
        help="share of the channels that a transition keeps (default: %(default)s)")
    add("--block-step", type=whole, default=2, metavar="N",
        help="RANet: blocks that each sub-network has more than the one before (default: %(default)s)")
    add("--scale-list", type=per_scale, default="1-2-3", metavar="N-N-N",
        help="RANet: scale of each sub-network, coarsest first (default: %(default)s)")
    add("--compress-factor", type=number, default=0.25, metavar="X",
        help="RANet: share of a fusion layer's output that the coarser sub-network gives (default: %(default)s)")
    add("--bnAfter", action="store_true", default=True,
        help="accepted for old command lines: batch normalisation always follows its convolution")

    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--method", choices=("boost", "joint"), default="boost",
        help="boost: each exit corrects the sum of those before it; joint: every exit alone, the paper's baseline "
             "(default: %(default)s)")
    add("--ensemble_reweight", type=list_of(number, ",", "0.3,0.7"), default="0.5", metavar="X[,X]",
        help="temperature t_n on the earlier exits' sum: one value, two to interpolate from first to last exit, or "
             "one per exit; --method joint puts 0 in its place (default: %(default)s)")
    add("--trainable_ensemble", action="store_true", help="let gradients through the earlier exits' sum (an ablation)")
    add("--loss_equal", action="store_true", help="scale every exit's loss to the moving average of all exits' losses")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--epochs", type=whole, default=300, metavar="N", help="epochs in all (default: %(default)s)")
    add("--start-epoch", type=whole, default=0, metavar="N",
        help="epochs taken as done, for weights from --checkpoint (default: %(default)s)")
    add("--batch-size", type=whole, default=64, metavar="N", help="images per process and step (default: %(default)s)")
    add("--optimizer", choices=("sgd", "rmsprop", "adam"), default="sgd", help="torch.optim's (default: %(default)s)")
    add("--lr_f", "--lr", "--learning-rate", type=number, default=0.1, metavar="X",
        help="learning rate at the start (default: %(default)s)")
    add("--lr-type", choices=("multistep", "cosine"), default="multistep",
        help="multistep: drops at --lr_milestones; cosine: falls to 0 at the last epoch (default: %(default)s)")
    add("--lr_milestones", type=list_of(whole, ",", "150,225"), default="100,200", metavar="N[,N]",
        help="epochs after which the learning rate drops (default: %(default)s)")
    add("--decay-rate", type=number, default=0.1, metavar="X",
        help="factor of each drop (default: %(default)s)")
    add("--on_nan", choices=("stop", "skip"), default="stop",
        help="NaN or infinite loss: stop, or leave such steps out and count them, which waits for the device in every step "
             "(default: %(default)s)")
    add("--momentum", type=number, default=0.9, metavar="X", help="of sgd and rmsprop (default: %(default)s)")
    add("--weight-decay", "--wd", type=list_of(number, ",", "1e-4,5e-4"), default="1e-4", metavar="X[,X]",
        help="two values: from the first to the last of MSDNet's blocks (default: %(default)s)")

    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate-from", metavar="FILE",
        help="checkpoint to evaluate; network, method, temperatures and split come from it, and a flag that "
             "contradicts it is an error")
    add("--evalmode", choices=("anytime", "dynamic", "realtime"), default="anytime",
        help="anytime: accuracy of every exit; dynamic: budgeted batch, simulated; realtime: the same, with images that "
             "really leave, and timed (default: anytime; dynamic where --budget or --sweep is given; realtime for "
             "budgets in time)")
    add("--budget", type=list_of(budget, ",", "40e6,60e6 or 3.5ms"), metavar="X[,X]",
        help="dynamic, realtime: mean cost per image to solve for, MACs or milliseconds such as 3.5ms (default: 40, in "
             "real time 5, budgets between the costs of the first and of the last exit)")
    add("--cost", choices=("macs", "latency"), default="macs",
        help="what budgets count; latency measures every exit on this device, with batches of --batch-size, and runs "
             "--evalmode realtime (default: macs; latency for budgets in milliseconds)")
    add("--images", nargs="+", metavar="PATH",
        help="classify these image files and say at which exit each one left; takes one --budget in MACs")
    add("--sweep", choices=("released",), help="dynamic: the 39 exit distributions of the authors' program instead")
    add("--flat_curve", action="store_true",
        help="dynamic: keep the previous thresholds where a larger budget does not raise hold-out accuracy")
    add("--save_suffix", default="", metavar="TEXT", help="appended to the names of the result files")

    distributed = parser.add_argument_group("several processes", "torchrun's environment decides; see README")
    add = distributed.add_argument
    add("--distributed", action="store_true", help="accepted for old command lines")
    add("--dist_backend", choices=("nccl", "gloo"), help="(default: nccl on GPUs, gloo on the CPU)")
    add("--local_rank", "--local-rank", type=whole, default=0, metavar="N", help="accepted for old launchers")
    return parser


# What a resumed run may be told anew: where it runs, what it shows, how it meets trouble, and what only evaluation reads. All
# other flags make the model, the data or the schedule; --epochs has a rule of its own.
FREE_ON_RESUME = frozenset((
    "result_dir", "tensorboard_dir", "data_root", "resume", "checkpoint", "start_epoch", "workers", "val_workers", "device",
    "gpu", "threads", "deterministic", "print_freq", "on_nan", "skip_unreadable", "distributed", "dist_backend", "local_rank",
    "bnAfter", "evaluate_from", "evalmode", "budget", "cost", "images", "sweep", "flat_curve", "save_suffix",
))


def _is_msdnet(args: Namespace) -> bool:
    return args.arch.startswith("msdnet")


def _n_layers(args: Namespace) -> int:
    """Layers of an MSDNet, or of all sub-networks of a RANet."""
    if _is_msdnet(args):
        later = args.nBlocks - 1
        growing = args.step * args.nBlocks * later // 2 + later
        return args.base + (args.step * later if args.stepmode == "even" else growing)
    blocks = [args.nBlocks + args.block_step * s for s in range(len(args.scale_list))]
    return args.step * sum(n if args.stepmode == "even" else n * (n + 1) // 2 for n in blocks)


def _n_exits(args: Namespace) -> int:
    return args.nBlocks + (0 if _is_msdnet(args) else args.block_step * (len(args.scale_list) - 1))


def _fits_images(args: Namespace, n_scales: int) -> bool:
    # Without any flag about the network (someone may only want the data) the default network is left to the model.
    return n_scales == N_SCALES[args.image_size] or not args.explicit & NETWORK


# Everything that must hold, in one table: single values first, then combinations, which may rely on them. With
# --evaluate-from the network comes from the file, so a rule marked if_given does not judge a default in its place.
# What only shows while a network is built (a width that ends at 0, say) the model refuses with a ValueError.
RULES: tuple[Rule, ...] = (
    *each("nBlocks base step nChannels growthRate grFactor bnFactor block_step scale_list epochs batch_size "
          "print_freq valid_size lr_milestones", lambda x: 1 <= x <= 1_000_000, "at least 1 and at most 1000000"),
    *each("threads", lambda x: 1 <= x <= 1024, "at least 1 and at most 1024"),
    *each("start_epoch workers val_workers local_rank", lambda x: 0 <= x <= 1_000_000, "at least 0 and at most 1000000"),
    *each("weight_decay ensemble_reweight", lambda x: 0 <= x <= 1e30, "at least 0 and at most 1e30"),
    *each("lr_f budget", lambda x: 0 < x <= 1e30, "above 0 and at most 1e30"),
    *each("seed", lambda x: 0 <= x < 2**32, "from 0 to 4294967295"),
    *each("momentum", lambda x: 0 <= x < 1, "at least 0 and below 1"),
    *each("decay_rate reduction", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    *each("compress_factor", lambda x: 0 < x < 1, "above 0 and below 1"),
    *each("image_size", lambda x: x in IMAGE_SIZES, "32 or 224"),
    *each("gpu", lambda x: re.fullmatch(r"[0-9]+(,[0-9]+)*", x) and len(set(x.split(","))) == x.count(",") + 1,
          "different device numbers such as 0 or 0,1 (--device cpu for none)"),
    *each("save_suffix", lambda x: is_path(f"_{x}") and not re.search(r"[/\\]", x), "a part of a file name, without / and \\"),
    *each("result_dir tensorboard_dir checkpoint data_root evaluate_from", is_path, "a path"),
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
         lambda a: not _is_msdnet(a) or a.prune == "max" or _n_layers(a) >= len(a.grFactor) - 1,
         lambda a: f"--prune min needs at least {len(a.grFactor) - 1} layers for {len(a.grFactor)} scales, "
                   f"got {_n_layers(a)}",
         if_given=True),
    Rule(("nBlocks", "step", "stepmode", "arch"),
         lambda a: _n_layers(a) <= MAX_LAYERS,
         lambda a: f"makes a network of {_n_layers(a)} layers with --step {a.step} --stepmode {a.stepmode}; "
                   f"at most {MAX_LAYERS} are allowed",
         if_given=True),
    # Method.
    Rule(("ensemble_reweight", "arch", "nBlocks", "block_step", "scale_list"),
         lambda a: len(a.ensemble_reweight) in (1, 2, _n_exits(a)),
         lambda a: f"has {len(a.ensemble_reweight)} values; pass one, two to interpolate, or one per exit, "
                   f"which makes {_n_exits(a)} here",
         if_given=True),
    Rule(("trainable_ensemble", "method"),
         lambda a: not (a.trainable_ensemble and a.method == "joint"),
         lambda a: "--method joint has no ensemble to train"),
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
    Rule(("resume", "checkpoint"),
         lambda a: not (a.resume and a.checkpoint),
         lambda a: "continues from the run's own checkpoint, --checkpoint starts from another; give one of them"),
    Rule(("resume", "start_epoch"),
         lambda a: not (a.resume and "start_epoch" in a.explicit),
         lambda a: "takes the epoch from the checkpoint; leave out --start-epoch"),
    # Evaluation.
    *(Rule((name, "evaluate_from"),
           lambda a, n=name: not (getattr(a, n) and a.evaluate_from),
           lambda a: "is for training, --evaluate-from for evaluation; give one of them")
      for name in ("checkpoint", "resume")),
    Rule(("budget", "sweep"),
         lambda a: not (a.budget and a.sweep),
         lambda a: "chooses the budgets, --sweep has its own exit distributions; give one of them"),
    Rule(("budget", "cost"),
         lambda a: all(isinstance(x, Milliseconds) == (a.cost == "latency") for x in a.budget or []),
         lambda a: f"--cost {a.cost} takes budgets in {'milliseconds, such as 3.5ms' if a.cost == 'latency' else 'MACs'}"),
    Rule(("cost", "evalmode"),
         lambda a: a.cost == "macs" or a.evalmode != "anytime",
         lambda a: "budgets in time have no meaning with --evalmode anytime; use --evalmode realtime"),
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
    if "cost" not in args.explicit and any(isinstance(value, Milliseconds) for value in args.budget or []):
        args.cost = "latency"
    if "evalmode" not in args.explicit and (args.cost == "latency" or args.budget or args.sweep or args.flat_curve):
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


def require_unchanged(args: Namespace, before: dict[str, Any], epochs_done: int) -> None:
    """End the program (one line, exit code 2) if flags contradict those of the run that is to be resumed.

    Args:
        before: flags of that run by dest name; a flag that did not exist then had its default.
        epochs_done: complete epochs of that run.
    """
    parser = build_parser()
    free = FREE_ON_RESUME | ({"epochs"} if args.lr_type == "multistep" else set())
    changed = []
    for name, default in vars(parser.parse_args([])).items():
        now, then = getattr(args, name), before.get(name, default)
        if now != then and name not in free:
            changed.append(f"{parser.spelling(name)} {shown(now)} (was {shown(then)})")
    if changed:
        parser.error(f"--resume: this is not the command of the run in {args.result_dir}: {', '.join(changed)}; give these flags "
                     "as before, or another --result_dir for a new run")
    if args.epochs < epochs_done:
        parser.error(f"--resume: the run in {args.result_dir} has done {epochs_done} epochs already; pass a larger --epochs than "
                     f"{args.epochs}")
