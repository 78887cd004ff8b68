"""Every flag of the scripts: spelling, form, default and help. What values and combinations make sense, `args` says."""
from __future__ import annotations

import argparse
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from functools import partial
from typing import Any

from utils.options.catalog import (
    ARCHITECTURES,
    DATASETS,
    DECODERS,
    ENSEMBLES,
    LARGE_FROM,
    LARGEST_SIDE,
    LEAST_SIDE,
    METHOD_ALIASES,
    METHODS,
    POLICIES,
    RUNTIMES,
    STEMS,
    THRESHOLDS,
    stem_for,
)
from utils.options.network import OwnNetwork
from utils.options.parser import OneLineParser, list_of, number, path, true_false, whole, within, written_path

# What a resumed run may be told anew: where it runs, what it shows, how it meets trouble, and what only evaluation reads. All
# other flags make the model, the data or the schedule; --epochs has a rule of its own.
FREE_ON_RESUME = frozenset((
    "result_dir", "tensorboard_dir", "data_root", "resume", "checkpoint", "checkpoint_key", "new_classifier", "start_epoch",
    "workers", "val_workers", "device", "gpu", "threads", "deterministic", "print_freq", "save_every_minutes",
    "skip_unreadable", "distributed", "dist_backend", "local_rank", "bnAfter", "evaluate_from", "evalmode", "ensemble",
    "policy", "budget", "cost", "images", "runtime", "predictions", "thresholds", "max_drop", "confidence_level", "calibrate",
    "sweep", "flat_curve", "publish", "publish_details", "save_suffix",
))

# What a run did whose version did not know the flag yet, where that is not the default now.
BEFORE_THE_FLAG = {"lr_step": "epoch"}

# What may differ between the processes of one run: what is different on another machine. The files behind the paths are compared.
MAY_DIFFER = frozenset((
    "result_dir", "tensorboard_dir", "data_root", "checkpoint", "teacher", "workers", "val_workers", "gpu", "threads",
    "distributed", "local_rank", "bnAfter",
))

MOST = 1_000_000
count = within(whole, 1, MOST)
count_or_none = within(whole, 0, MOST)
small_count = within(whole, 1, 1024)
per_scale = list_of(count, "-", "1-2-4")
share = within(number, 0, 1)
positive = within(number, 0, 1e30, above=True)
not_negative = within(number, 0, 1e30)
factor = within(number, 0, 1, above=True)


def implied(dataset: str, method: str, image_size: int | None = None) -> dict[str, Any]:
    """Values of flags that are not given, where they follow from others, by dest name."""
    facts = DATASETS[dataset]
    side = image_size or facts.image_size or LEAST_SIDE
    return {"image_size": side, "stem": stem_for(side), "valid_size": facts.valid_size, **METHODS[method].defaults}


class Milliseconds(float):
    """A budget in milliseconds per image, on the command line with its unit: 3.5ms."""


def budget(text: str) -> float:
    return Milliseconds(positive(text.strip()[:-2])) if text.strip().endswith("ms") else positive(text)


def devices(text: str) -> str:
    listed = text.split(",")
    if not all(re.fullmatch(r"[0-9]+", index) for index in listed) or len(set(listed)) < len(listed):
        raise ArgumentTypeError(f"must be different device numbers such as 0 or 0,1 (--device cpu for none), got {text!r}")
    return text


def csv_file(text: str) -> str:
    """A file to write a table to; the ending keeps a mistyped word from replacing a checkpoint."""
    if not written_path(text).lower().endswith(".csv"):
        raise ArgumentTypeError(f"must be a file name that ends in .csv, got {text!r}")
    return text


def suffix(text: str) -> str:
    if re.search(r"[/\\]", path(f"_{text}")):
        raise ArgumentTypeError(f"must be a part of a file name, without / and \\, got {text!r}")
    return text


def architecture(text: str) -> str:
    """The name of a network, or an `OwnNetwork`."""
    if text in ARCHITECTURES:
        return text
    if not OwnNetwork.FORM.fullmatch(text):
        raise ArgumentTypeError(f"choose one of {', '.join(ARCHITECTURES)}, or FILE.py:FUNCTION, got {text!r}")
    return OwnNetwork(written_path(text))


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
    _run_flags(parser)
    _data_flags(parser, datasets)
    _network_flags(parser)
    _method_flags(parser)
    _training_flags(parser)
    _speed_flags(parser)
    _evaluation_flags(parser)
    _distributed_flags(parser)
    return parser


def _run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--result_dir", type=written_path, metavar="DIR", help="everything the run writes goes here; training needs it")
    add("--tensorboard_dir", type=written_path, metavar="DIR", help="TensorBoard event files (default: inside --result_dir)")
    add("--resume", action="store_true", help="continue the run in --result_dir from its latest good checkpoint")
    add("--checkpoint", type=path, metavar="FILE", help="start training from the weights in this file")
    add("--checkpoint_key", metavar="NAME",
        help="which weights of --checkpoint or --evaluate-from, where the file of another program has several, such as model_ema")
    add("--new_classifier", action="store_true",
        help="start the classifiers' tensors anew that the file of --checkpoint lacks or has in another shape, for other "
             "classes; and ResNet's first layer where it is another one")
    add("--seed", type=within(whole, 0, 2**32 - 1), default=0, metavar="N",
        help="seed of weights, data order, augmentation and hold-out split (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto is cuda where there is one, else cpu (default: %(default)s)")
    add("--gpu", type=devices, default="0", metavar="N[,N]", help="GPUs to use, no effect on the CPU (default: %(default)s)")
    add("--threads", type=small_count, metavar="N", help="CPU threads of PyTorch (default: PyTorch's own choice)")
    add("--deterministic", action="store_true",
        help="make CUDA give the same bits in every run, at some cost in speed; the CPU always does")
    add("--print-freq", "-p", type=count, default=10, metavar="N",
        help="steps between two looks at the running loss (default: %(default)s)")


def _data_flags(parser: argparse.ArgumentParser, datasets: Sequence[str]) -> None:
    add = parser.add_argument_group("data").add_argument
    default_dataset = "cifar100" if "cifar100" in datasets else datasets[0]
    add("--dataset", choices=tuple(datasets), default=default_dataset,
        help="glyphs is synthetic and needs no files; folder is DATA_ROOT/{train,test}/CLASS/IMAGE "
             "(default: %(default)s)")
    add("--data-root", type=path, default="data", metavar="DIR", help="folder of the data set (default: %(default)s)")
    add("--image_size", type=within(whole, LEAST_SIDE, LARGEST_SIDE), metavar="N",
        help=f"side of the images in pixels, from {LEAST_SIDE} on; only --dataset folder leaves the choice (default there: "
             f"{LEAST_SIDE})")
    add("--use-valid", action="store_true",
        help="hold part of the training set out, for model choice and exit thresholds")
    add("--valid_size", type=count, metavar="N",
        help="images to hold out (default: 5000 of CIFAR, 50000 of ImageNet, 2000 of glyphs, a tenth of a folder)")
    add("--images_per_class", type=count, metavar="N",
        help="train on N images of each class, drawn by --seed from those that are not held out (default: all)")
    add("--workers", type=count_or_none, default=4, metavar="N",
        help="processes that load training images; data sets that are not cropped live on the device and use none "
             "(default: %(default)s)")
    add("--val_workers", type=count_or_none, default=1, metavar="N",
        help="the same for hold-out and test images (default: %(default)s)")
    add("--decoder", choices=DECODERS, default="pillow",
        help="what decodes and scales images that are cropped: pillow as in the paper, or torchcodec, which is faster and rounds "
             "a few pixels differently (default: %(default)s)")
    add("--skip_unreadable", action="store_true",
        help="count, log and leave out images to be cropped that cannot be read, instead of stopping at the first one")


def _network_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network", "lists have one entry per scale (MSDNet) or sub-network (RANet)").add_argument
    add("--arch", type=architecture, default="msdnet_ge", metavar="NAME",
        help=f"{', '.join(ARCHITECTURES)}: resnets are torchvision's, with an exit after each stage, _ge has gradient rescaling; "
             "or FILE.py:FUNCTION, a network of your own, see docs/own_network.md (default: %(default)s)")
    add("--stem", choices=tuple(STEMS),
        help="first layer: small is a 3x3 convolution, large a 7x7 one with stride 2 and max pooling; images of --dataset folder "
             f"have to be of --image_size for small, and are scaled and cropped for large (default: large from {LARGE_FROM} "
             "pixels on, else small)")
    add("--nBlocks", type=count, default=1, metavar="N",
        help="MSDNet: blocks, each with an exit; RANet: blocks of the first sub-network (default: %(default)s)")
    add("--base", type=count, default=4, metavar="N", help="MSDNet: layers of the first block (default: %(default)s)")
    add("--step", type=count, default=1, metavar="N",
        help="layers of a further block (MSDNet) or of every block (RANet); lin_grow: how many more each block has "
             "than the one before (default: %(default)s)")
    add("--stepmode", choices=("even", "lin_grow"), default="even",
        help="blocks of equal or of growing depth (default: %(default)s)")
    add("--nChannels", type=count, default=32, metavar="N", help="channels of the first layer (default: %(default)s)")
    add("--growthRate", type=count, default=6, metavar="N", help="channels a layer adds (default: %(default)s)")
    add("--grFactor", type=per_scale, default="1-2-4", metavar="N-N-N",
        help="factors on --nChannels and --growthRate (default: %(default)s)")
    add("--bnFactor", type=per_scale, default="1-2-4", metavar="N-N-N",
        help="width of the bottlenecks in outputs of their layer (default: %(default)s)")
    add("--bottleneck", type=true_false, default=True, metavar="true|false",
        help="1x1 convolution before each 3x3 one (default: true)")
    add("--prune", choices=("max", "min"), default="max",
        help="MSDNet: drop the finest scales as early or as late as possible (default: %(default)s)")
    add("--reduction", type=factor, default=0.5, metavar="X",
        help="share of the channels that a transition keeps (default: %(default)s)")
    add("--block-step", type=count, default=2, metavar="N",
        help="RANet: blocks that each sub-network has more than the one before (default: %(default)s)")
    add("--scale-list", type=per_scale, default="1-2-3", metavar="N-N-N",
        help="RANet: scale of each sub-network, coarsest first (default: %(default)s)")
    add("--compress-factor", type=within(number, 0, 1, above=True, below=True), default=0.25, metavar="X",
        help="RANet: share of a fusion layer's output that the coarser sub-network gives (default: %(default)s)")
    add("--bnAfter", action="store_true", default=True,
        help="accepted for old command lines: batch normalisation always follows its convolution")


def _method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add("--method", type=lambda name: METHOD_ALIASES.get(name, name), choices=tuple(METHODS), default="boost",
        help="boost: each exit corrects the sum of those before it; joint (or conventional): every exit alone, the paper's "
             "baseline; l2w: weights for samples, learnt; block_losses: an exit trains only the last blocks before it; imta: "
             "collaborating exits on the trained network of --checkpoint; boost_l2w, boost_distill: boosted exits with learnt "
             "weights or distillation (default: %(default)s)")
    add("--ensemble_reweight", type=list_of(not_negative, ",", "0.3,0.7"), default="0.5", metavar="X[,X]",
        help="temperature t_n on the earlier exits' sum: one value, two to interpolate from first to last exit, or "
             "one per exit; methods whose exits predict alone put 0 in its place (default: %(default)s)")
    add("--trainable_ensemble", action="store_true",
        help="boosted exits: let gradients through the earlier exits' sum (an ablation)")
    add("--loss_equal", action="store_true",
        help="boost, joint, boost_distill: scale every exit's loss to the moving average of all exits' losses")
    add("--groups", type=list_of(count, "-", "3-4"), metavar="N[-N]",
        help="block_losses: sizes of groups of blocks, summing to the number of exits; a loss trains its own group")
    add("--overlap", type=count, metavar="N",
        help="block_losses: number of blocks that a loss trains, its own the last of them; 1 is local error")
    add("--include_final", action="store_true", help="with --overlap: the last exit's loss trains all blocks")
    add("--distill_weight", type=share, metavar="X",
        help="weight of distillation from the last exit to the others (default: 0.35 of boost_distill, 0.9 of imta, 0 of "
             "block_losses)")
    add("--distill_T", type=positive, metavar="X",
        help="temperature of distillation (default: 2.5; 3 of imta)")
    add("--teacher", type=path, metavar="FILE",
        help="block_losses, boost_distill: checkpoint of the network to distill from, instead of the last exit")
    _weighting_flags(parser)


def _weighting_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning to weight samples", "--method l2w and boost_l2w").add_argument
    add("--meta_net_hidden_size", type=count, default=500, metavar="N",
        help="units of a hidden layer of the weight network (default: %(default)s)")
    add("--meta_net_num_layers", type=small_count, default=1, metavar="N", help="its hidden layers (default: %(default)s)")
    add("--meta_net_input_type", choices=("loss", "conf", "both"), default="loss",
        help="what it reads of a sample: loss or confidence at every exit (default: %(default)s)")
    add("--constraint_dimension", choices=("row", "col", "mat"), default="mat",
        help="what its output is centred over: samples, exits or both (default: %(default)s)")
    add("--epsilon", type=share, default=0.3, metavar="X",
        help="weight of a sample = 1 + X * centred output (default: %(default)s)")
    add("--target_p_index", type=within(whole, 1, 39), default=15, metavar="N",
        help="held-out halves leave at the exits in shares proportional to q^n, q = N/20 (default: %(default)s)")
    add("--meta_interval", type=count, default=1, metavar="N",
        help="batches from one step of the weight network to the next (default: %(default)s)")
    add("--meta_lr", type=positive, default=1e-4, metavar="X",
        help="learning rate of the weight network at the start, falling to 0 as a cosine (default: %(default)s)")
    add("--meta_weight_decay", type=not_negative, default=1e-4, metavar="X",
        help="weight decay of the weight network (default: %(default)s)")


def _training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, default=300, metavar="N", help="epochs in all (default: %(default)s)")
    add("--start-epoch", type=count_or_none, default=0, metavar="N",
        help="epochs taken as done, for weights from --checkpoint (default: %(default)s)")
    add("--batch-size", type=count, default=64, metavar="N", help="images per process and step (default: %(default)s)")
    add("--paper_protocol", action="store_true",
        help="judge as the released code does, for comparison with the paper only: the hold-out is read with training "
             "augmentation, and the test set, read after every epoch, chooses model_test_best.pth; in evaluation "
             "(dynamic) thresholds are fitted on the augmented hold-out")
    add("--freeze_backbone", action="store_true",
        help="train the exits only: all else keeps its weights and its batch-norm statistics")
    add("--optimizer", choices=("sgd", "rmsprop", "adam"), default="sgd", help="torch.optim's (default: %(default)s)")
    add("--lr_f", "--lr", "--learning-rate", type=positive, default=0.1, metavar="X",
        help="learning rate at the start (default: %(default)s)")
    add("--lr-type", choices=("multistep", "cosine", "linear"), default="multistep",
        help="multistep: drops at --lr_milestones; cosine, linear: falls to 0 over all epochs (default: %(default)s)")
    add("--lr_step", choices=("batch", "epoch"), default="batch",
        help="cosine, linear: what the learning rate stays the same for; a resumed run of an older version keeps its "
             "rate per epoch (default: %(default)s)")
    add("--warmup_epochs", type=not_negative, default=0.0, metavar="X",
        help="epochs, or a part of one, in which the learning rate is also multiplied by a factor that rises from 0 to 1, "
             "linearly and batch by batch, for large batches (default: 0)")
    add("--lr_milestones", type=list_of(count, ",", "150,225"), default="100,200", metavar="N[,N]",
        help="epochs after which the learning rate drops (default: %(default)s)")
    add("--decay-rate", type=factor, default=0.1, metavar="X",
        help="factor of each drop (default: %(default)s)")
    add("--save_every_minutes", type=positive, metavar="M",
        help="save in the middle of an epoch too, when M minutes have passed since the last save (looked at every --print-freq "
             "steps; default: at the end of an epoch)")
    add("--momentum", type=within(number, 0, 1, below=True), default=0.9, metavar="X",
        help="of sgd and rmsprop (default: %(default)s)")
    add("--label_smoothing", type=within(number, 0, 1, below=True), default=0.0, metavar="X",
        help="share of every target that is spread evenly over the classes, in all cross entropies of training (default: 0)")
    add("--ema", type=within(number, 0, 1, above=True, below=True), metavar="D",
        help="average the weights over the steps, with this decay in every step of the optimiser, such as 0.999; all figures of "
             "hold-out and test, and what is evaluated, published and exported, are then of the average")
    add("--nesterov", action="store_true", help="sgd: Nesterov's momentum")
    add("--weight-decay", "--wd", type=list_of(not_negative, ",", "1e-4,5e-4"), default="1e-4", metavar="X[,X]",
        help="two values: from the first to the last block of MSDNet or ResNet (default: %(default)s)")


def _speed_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed of training", "each changes the rounding of results; see docs/performance.md")
    add = group.add_argument
    add("--amp", choices=("off", "bf16"), default="off",
        help="bf16: convolutions in bfloat16; weights, losses and sums over exits stay float32 (default: %(default)s)")
    add("--channels_last", action="store_true", help="keep feature maps in the channels_last layout")
    add("--compile", action="store_true",
        help="through torch.compile, which takes minutes at the start of a run and needs a C++ compiler (on a GPU, Triton)")
    add("--cuda_graphs", action="store_true", help="record a step's kernels once and replay them; one process on a GPU")


def _evaluation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate-from", type=path, metavar="FILE",
        help="checkpoint to evaluate; network, method, temperatures and split come from it, and a flag that "
             "contradicts it is an error")
    add("--evalmode", choices=("anytime", "dynamic", "realtime"), default="anytime",
        help="anytime: accuracy of every exit; dynamic: budgeted batch, simulated; realtime: the same, with images that "
             "really leave, and timed (default: anytime; dynamic where --budget or --sweep is given; realtime for "
             "budgets in time)")
    add("--budget", type=list_of(budget, ",", "40e6,60e6 or 3.5ms"), metavar="X[,X]",
        help="dynamic, realtime: mean cost per image to solve for, MACs or milliseconds such as 3.5ms (default: 40, in "
             "real time 5, budgets between the costs of the first and of the last exit)")
    add("--ensemble", choices=tuple(ENSEMBLES),
        help="read exit n from the raw outputs of exits 1 to n: alone, added up with the temperatures of --ensemble_reweight, "
             "averaged as probabilities, or multiplied (product of experts); default: as the checkpoint's method says")
    add("--policy", choices=tuple(POLICIES), default="confidence",
        help="dynamic, realtime: what tells an answer certain enough to leave; patience: that many exits in a row agree, "
             "simulated for every number of them (default: %(default)s)")
    add("--cost", choices=("macs", "latency"), default="macs",
        help="what budgets count; latency measures every exit on this device, with batches of --batch-size, and runs "
             "--evalmode realtime (default: macs; latency for budgets in milliseconds)")
    add("--runtime", choices=RUNTIMES, default="torch",
        help="what runs early exit (--evalmode realtime, --images): PyTorch, or ONNX Runtime, which is faster for single images; "
             "its programs are written beside the checkpoint once (default: %(default)s)")
    add("--predictions", type=csv_file, metavar="FILE.csv",
        help="realtime with one --budget, --images: write class, confidence, exit and cost of every image to this CSV file; an "
             "existing file is replaced only if it is such a table")
    add("--images", nargs="+", metavar="PATH",
        help="classify these image files and say at which exit each one left; takes one --budget in MACs")
    add("--thresholds", choices=tuple(THRESHOLDS), default="geometric",
        help="how exit thresholds follow from a budget: shares of inputs that fall geometrically from exit to exit (eq. 9 of the "
             "paper), or those with the largest accuracy on the held-out images (default: %(default)s)")
    add("--max_drop", type=within(number, 0, 100, above=True, below=True), metavar="P",
        help="dynamic, realtime, --images: instead of a budget, the cheapest thresholds whose accuracy lies at most P points "
             "below the whole network's, with the probability of --confidence_level over the draw of the held-out images")
    add("--confidence_level", type=within(number, 0.5, 1, below=True), default=0.95, metavar="C",
        help="probability of --max_drop (default: %(default)s)")
    add("--calibrate", action="store_true",
        help="fit a temperature for every exit on the hold-out, by likelihood, that divides its outputs for the confidence "
             "alone; no answer changes")
    add("--sweep", choices=("released",), help="dynamic: the 39 exit distributions of the authors' program instead")
    add("--flat_curve", action="store_true",
        help="dynamic: keep the previous thresholds where a larger budget does not raise hold-out accuracy")
    add("--publish", type=written_path, metavar="DIR",
        help="anytime, dynamic: write the network in half precision, its curves and the arrays behind them to DIR; "
             "python -m utils.publish DIR draws the curves again")
    add("--publish_details", action="store_true",
        help="with --publish: keep in the arrays also predicted class, margin, entropy, log-probability of the true class and "
             "sum of squared probabilities")
    add("--save_suffix", type=suffix, default="", metavar="TEXT", help="appended to the names of the result files")


def _distributed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several processes", "torchrun's environment decides; see docs/imagenet.md").add_argument
    add("--distributed", action="store_true", help="accepted for old command lines")
    add("--dist_backend", choices=("nccl", "gloo"), help="(default: nccl on GPUs, gloo on the CPU)")
    add("--local_rank", "--local-rank", type=count_or_none, default=0, metavar="N", help="accepted for old launchers")
