"""The command line: frozen flags and defaults, released command lines, and one clear line for every mistake."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import args as cli
import eval_cifar100
import train_cifar100
from args import build_parser, choose_network, parse_args, require_effect
from utils.core.errors import UserError
from utils.data import decoders
from utils.methods import Method, method_class
from utils.options import catalog
from utils.options.effects import EFFECTS, EVALUATION, TRAINING, without_effect
from utils.options.network import NETWORK, NetworkSpec
from utils.runs.restore import build_model

ROOT = Path(__file__).resolve().parent.parent

# People's scripts depend on these spellings: add to the list, take nothing away.
FLAGS = """
--amp --arch --base --batch-size --block-step --bnAfter --bnFactor --bottleneck --budget --calibrate --channels_last --checkpoint
--checkpoint_key --compile --compress-factor --confidence_level --constraint_dimension --cost --cuda_graphs --data-root
--dataset --decay-rate --decoder
--deterministic --device --dist_backend --distill_T --distill_weight --distributed --ema --ensemble --ensemble_reweight
--epochs --epsilon --evalmode --evaluate-from --flat_curve --freeze_backbone --gpu --grFactor --groups --growthRate --help
--image_size --images --images_per_class --include_final --label_smoothing --learning-rate
--local-rank --local_rank --loss_equal --lr --lr-type --lr_f --lr_milestones --lr_step --max_drop
--meta_interval --meta_lr --meta_net_hidden_size --meta_net_input_type --meta_net_num_layers --meta_weight_decay
--method --momentum --nBlocks --nChannels --nesterov --new_classifier --optimizer --overlap --paper_protocol --policy
--predictions
--print-freq --prune --publish --publish_details --reduction --result_dir --resume --runtime --save_every_minutes --save_suffix
--scale-list --seed
--skip_unreadable --start-epoch --stem --step --stepmode --sweep --target_p_index --teacher --tensorboard_dir --threads
--thresholds --trainable_ensemble --use-valid --val_workers --valid_size --warmup_epochs --wd --weight-decay --workers -h -p
"""

DEFAULTS = dict(
    result_dir=None, tensorboard_dir=None, resume=False, checkpoint=None, checkpoint_key=None, new_classifier=False,
    freeze_backbone=False, seed=0, device="auto", gpu="0", threads=None, deterministic=False, print_freq=10,
    save_every_minutes=None,
    dataset="cifar100", data_root="data", image_size=32, stem="small", num_classes=100, use_valid=False,
    valid_size=5000, images_per_class=None, workers=4, val_workers=1, decoder="pillow", skip_unreadable=False,
    arch="msdnet_ge", nBlocks=1, base=4, step=1, stepmode="even", nChannels=32, growthRate=6,
    grFactor=[1, 2, 4], bnFactor=[1, 2, 4], bottleneck=True, prune="max", reduction=0.5,
    block_step=2, scale_list=[1, 2, 3], compress_factor=0.25, bnAfter=True, method="boost", ensemble_reweight=[0.5],
    trainable_ensemble=False, loss_equal=False, groups=None, overlap=None, include_final=False, distill_weight=None,
    distill_T=None, teacher=None, meta_net_hidden_size=500, meta_net_num_layers=1, meta_net_input_type="loss",
    constraint_dimension="mat", epsilon=0.3, target_p_index=15, meta_interval=1, meta_lr=1e-4, meta_weight_decay=1e-4,
    paper_protocol=False, epochs=300, start_epoch=0, batch_size=64, optimizer="sgd", lr_f=0.1,
    lr_type="multistep", lr_milestones=[100, 200], decay_rate=0.1, momentum=0.9, weight_decay=[1e-4],
    lr_step="batch", warmup_epochs=0.0, nesterov=False, label_smoothing=0.0, ema=None,
    amp="off", channels_last=False, compile=False, cuda_graphs=False,
    evaluate_from=None, evalmode="anytime", ensemble=None, policy="confidence", budget=None, cost="macs",
    images=None, runtime="torch",
    predictions=None, sweep=None,
    flat_curve=False, publish=None, publish_details=False,
    save_suffix="", thresholds="geometric", max_drop=None, confidence_level=0.95, calibrate=False,
    distributed=False, dist_backend=None, local_rank=0,
)

# (command line, flag that the message has to name)
MISTAKES = [
    ("--evaluate-from f --evalmode dynamic --runtime onnx", "--runtime"),
    ("--evaluate-from f --evalmode realtime --predictions p.csv", "--predictions"),
    ("--evaluate-from f --evalmode realtime --budget 1e6 --predictions model_best.pth", "--predictions"),
    ("--no-such-flag", "--no-such-flag"),
    ("--batch 64", "--batch"),  # no abbreviations
    ("stray", "stray"),
    ("--epochs", "--epochs"),
    ("--epochs 1.5", "--epochs"),
    ("--epochs 1_000", "--epochs"),
    ("--epochs ten", "--epochs"),
    ("--seed -1", "--seed"),
    ("--seed 4294967296", "--seed"),
    ("--lr_f nan", "--lr_f"),
    ("--lr inf", "--lr"),
    ("--learning-rate 1e999", "--lr"),
    ("--momentum 1", "--momentum"),
    ("--momentum nan", "--momentum"),
    ("--decay-rate 0", "--decay-rate"),
    ("--decay-rate 1.5", "--decay-rate"),
    ("--reduction 0", "--reduction"),
    ("--reduction 2", "--reduction"),
    ("--compress-factor 1", "--compress-factor"),
    ("--bottleneck maybe", "--bottleneck"),
    ("--bottleneck", "--bottleneck"),
    ("--arch resnet", "--arch"),
    ("--arch=--", "--arch"),
    ("--method=--", "--method"),
    ("--dataset mnist", "--dataset"),
    ("--stepmode odd", "--stepmode"),
    ("--optimizer adamw", "--optimizer"),
    ("--optimizer adam --momentum 0.9", "--momentum"),
    ("--lr-type cosine --decay-rate 0.1", "--decay-rate"),
    ("--lr-type linear --decay-rate 0.1", "--decay-rate"),
    ("--lr_step batch", "--lr_step"),
    ("--lr-type multistep --lr_step epoch", "--lr_step"),
    ("--lr-type cosine --lr_step step", "--lr_step"),
    ("--optimizer adam --nesterov", "--nesterov"),
    ("--momentum 0 --nesterov", "--nesterov"),
    ("--epochs 3 --warmup_epochs 3", "--warmup_epochs"),
    ("--warmup_epochs=-1", "--warmup_epochs"),
    ("--label_smoothing 1", "--label_smoothing"),
    ("--ema 0", "--ema"),
    ("--ema 1", "--ema"),
    ("--label_smoothing=-0.1", "--label_smoothing"),
    ("--arch ranet --prune min", "--prune"),
    ("--arch resnet18 --nBlocks 2", "--nBlocks"),
    ("--arch resnet34_ge --bnFactor 1-2-4", "--bnFactor"),
    ("--arch resnet18 --stem tiny", "--stem"),
    ("--arch resnet18.py", "--arch"),
    ("--arch net.py:", "--arch"),
    ("--arch net.py:1st", "--arch"),
    ("--arch=net.py\0.py:build", "--arch"),
    ("--arch no_such_file.py:build --nBlocks 2", "--nBlocks"),
    ("--freeze_backbone", "--freeze_backbone"),
    ("--freeze_backbone --checkpoint a.pth --method imta", "--freeze_backbone"),
    ("--freeze_backbone --checkpoint a.pth --method block_losses --overlap 2", "--freeze_backbone"),
    ("--arch ranet --base 4", "--base"),
    ("--arch msdnet --block-step 2", "--block-step"),
    ("--scale-list 1-2-3", "--scale-list"),
    ("--nBlocks 2 --compress-factor 0.5", "--compress-factor"),
    ("--evaluate-from a.pth --evalmode realtime --images b.png", "--images"),
    ("--evaluate-from a.pth --sweep released --evalmode dynamic --cost latency", "--sweep"),
    ("--evaluate-from a.pth --evalmode anytime --cost macs", "--cost"),
    ("--bottleneck false --bnFactor 1-2-4", "--bnFactor"),
    ("--start-epoch 3", "--start-epoch"),
    ("--checkpoint_key net", "--checkpoint_key"),
    ("--new_classifier", "--new_classifier"),
    ("--method imta --checkpoint a.pth --new_classifier", "--new_classifier"),
    ("--method block_losses --overlap 1 --distill_T 2", "--distill_T"),
    *((f"--evaluate-from a.pth {flag}", flag.split()[0]) for flag in (
        "--amp bf16", "--compile", "--epochs 3", "--tensorboard_dir t", "--print-freq 3", "--deterministic", "--lr_f 1")),
    ("--evaluate-from a.pth --method l2w --epsilon 0.1", "--epsilon"),
    ("--evaluate-from a.pth --use-valid", "--use-valid"),
    ("--lr-type step", "--lr-type"),
    ("--device tpu", "--device"),
    ("--gpu zero", "--gpu"),
    ("--gpu 0,", "--gpu"),
    ("--gpu 0,0", "--gpu"),
    ("--save_suffix a/b", "--save_suffix"),
    ("--result_dir=", "--result_dir"),
    *((f"{flag}=n\udcff", flag) for flag in ("--result_dir", "--tensorboard_dir", "--publish")),
    ("--tensorboard_dir=", "--tensorboard_dir"),
    ("--data-root=", "--data-root"),
    ("--checkpoint=", "--checkpoint"),
    ("--evaluate-from=", "--evaluate-from"),
    # Data.
    ("--dataset folder --image_size 31", "--image_size"),
    ("--dataset folder --image_size 5000", "--image_size"),
    ("--dataset imagenet --stem small", "--stem"),
    ("--dataset folder --stem medium", "--stem"),
    ("--dataset folder --image_size 64 --decoder torchcodec", "--stem"),
    ("--dataset folder --image_size 96 --stem small --skip_unreadable", "--stem"),
    ("--dataset cifar100 --image_size 224", "--image_size"),
    ("--dataset imagenet --decoder nvjpeg", "--decoder"),
    ("--dataset cifar100 --decoder torchcodec", "--decoder"),
    ("--dataset folder --skip_unreadable", "--skip_unreadable"),
    ("--valid_size 100", "--valid_size"),
    ("--use-valid --valid_size 50000", "--valid_size"),
    ("--dataset glyphs --use-valid --valid_size 20000", "--valid_size"),
    # Network.
    ("--grFactor 1,2,4", "--grFactor"),
    ("--grFactor 1--2", "--grFactor"),
    ("--grFactor 1-2-x", "--grFactor"),
    ("--grFactor 1-2-4-4", "--bnFactor"),
    ("--bnFactor 1-2", "--bnFactor"),
    ("--grFactor 1-2 --bnFactor 1-2", "--grFactor"),
    ("--dataset imagenet --arch msdnet --nBlocks 5", "--grFactor"),
    ("--arch ranet --dataset imagenet --nBlocks 2", "--scale-list"),
    ("--grFactor 1-1-1 --growthRate 5", "--grFactor"),
    ("--dataset folder --image_size 64 --nBlocks 2 --grFactor 1-1-1-1-1-1 --bnFactor 1-1-1-1-1-1", "--image_size"),
    ("--dataset folder --image_size 64 --nBlocks 2 --grFactor 1-1-1-1-1-1 --bnFactor 1-1-1-1-1-1", "--bnFactor"),
    ("--nBlocks 2 --stem large --grFactor 1-1-1 --bnFactor 1-1-1", "--stem"),
    ("--dataset folder --image_size 33 --arch ranet --scale-list 1-2-3-4-5-6 --grFactor 1-1-1-1-1-1 --bnFactor 1-1-1-1-1-1",
     "--scale-list"),
    ("--dataset folder --image_size 48 --arch ranet --scale-list 2-2-3", "--scale-list"),
    ("--arch ranet --scale-list 1-2", "--scale-list"),
    ("--arch ranet --scale-list 2-2-3", "--scale-list"),
    ("--arch ranet --scale-list 1-3-2", "--scale-list"),
    ("--arch ranet --scale-list 1-2-2", "--scale-list"),
    ("--arch ranet --growthRate 1 --grFactor 4-2-1", "--compress-factor"),
    ("--prune min --base 1", "--nBlocks"),
    ("--base 2 --step 2", "--step"),
    ("--nBlocks 1000000000", "--nBlocks"),
    ("--nBlocks 1000000000 --stepmode lin_grow", "--nBlocks"),
    ("--arch ranet --nBlocks 1000000000", "--nBlocks"),
    # Method.
    ("--ensemble_reweight 0.5,", "--ensemble_reweight"),
    ("--ensemble_reweight nan", "--ensemble_reweight"),
    ("--ensemble_reweight=-0.1", "--ensemble_reweight"),
    ("--nBlocks 5 --ensemble_reweight 0.1,0.2,0.3", "--ensemble_reweight"),
    ("--arch ranet --nBlocks 2 --ensemble_reweight 0.1,0.2,0.3", "--ensemble_reweight"),
    ("--method joint --trainable_ensemble", "--trainable_ensemble"),
    ("--method meta_gf", "--method"),
    ("--method l2w --loss_equal", "--loss_equal"),
    ("--method joint --teacher a.pth", "--teacher"),
    ("--method joint --distill_weight 0.3", "--distill_weight"),
    ("--method l2w --distill_T 3", "--distill_T"),
    ("--method boost --groups 1", "--groups"),
    ("--method boost --overlap 1", "--overlap"),
    ("--method joint --include_final", "--include_final"),
    *((f"--method boost_distill {flag}", flag.split()[0]) for flag in (
        "--meta_net_hidden_size 9", "--meta_net_num_layers 2", "--meta_net_input_type conf", "--constraint_dimension row",
        "--epsilon 0.1", "--target_p_index 9", "--meta_interval 9", "--meta_lr 1", "--meta_weight_decay 1")),
    *((f"--method l2w {flag}", re.split("[ =]", flag)[0]) for flag in (
        "--meta_net_hidden_size 0", "--meta_net_num_layers 0", "--meta_net_num_layers 1025", "--meta_net_input_type all",
        "--constraint_dimension rows", "--epsilon 1.1", "--epsilon=-0.1", "--target_p_index 0", "--target_p_index 40",
        "--meta_interval 0", "--meta_lr 0", "--meta_weight_decay=-1")),
    ("--method l2w --optimizer adam", "--optimizer"),
    ("--method boost_l2w --optimizer rmsprop", "--optimizer"),
    ("--method block_losses", "--method"),
    ("--method block_losses --nBlocks 3 --groups 1-2 --overlap 1", "--method"),
    ("--method block_losses --nBlocks 3 --groups 1,2", "--groups"),
    ("--method block_losses --nBlocks 3 --groups 3-0", "--groups"),
    ("--method block_losses --nBlocks 3 --groups 1-3", "--groups"),
    ("--method block_losses --arch ranet --nBlocks 2 --groups 1-1", "--groups"),   # six exits
    ("--method block_losses --nBlocks 3 --overlap 0", "--overlap"),
    ("--method block_losses --nBlocks 3 --overlap 4", "--overlap"),
    ("--method block_losses --groups 1 --include_final", "--include_final"),
    ("--method block_losses --groups 1 --teacher a.pth", "--teacher"),
    ("--method boost_distill --distill_weight 0 --teacher a.pth", "--teacher"),
    ("--method boost_distill --distill_weight 1.5", "--distill_weight"),
    ("--method boost_distill --distill_T 0", "--distill_T"),
    ("--method boost_distill --teacher=", "--teacher"),
    ("--method imta", "--checkpoint"),
    ("--method imta --checkpoint a.pth --teacher a.pth", "--teacher"),
    ("--method imta --checkpoint a.pth --weight-decay 1e-4,2e-4", "--weight-decay"),
    # Training.
    ("--checkpoint a.pth --epochs 10 --start-epoch 10", "--start-epoch"),
    ("--lr_milestones 9,6", "--lr_milestones"),
    ("--lr_milestones 6,6", "--lr_milestones"),
    ("--lr_milestones 6,", "--lr_milestones"),
    ("--weight-decay 1e-4,2e-4,3e-4", "--weight-decay"),
    ("--wd x", "--weight-decay"),
    ("--arch ranet --weight-decay 1e-4,2e-4", "--weight-decay"),
    ("--resume --checkpoint a.pth", "--resume"),
    ("--resume --start-epoch 0", "--resume"),
    ("--amp fp16", "--amp"),
    ("--amp", "--amp"),
    ("--cuda_graphs --device cpu", "--cuda_graphs"),
    ("--method imta --checkpoint a.pth --batch-size 1", "--batch-size"),
    ("--method l2w --amp bf16", "--amp"),
    ("--method block_losses --nBlocks 4 --overlap 3 --channels_last", "--channels_last"),
    ("--method boost_l2w --compile", "--compile"),
    ("--method imta --checkpoint a.pth --cuda_graphs", "--cuda_graphs"),
    ("--evaluate-from a.pth --paper_protocol", "--paper_protocol"),
    ("--evaluate-from a.pth --publish b --evalmode realtime", "--publish"),
    ("--evaluate-from a.pth --publish b --budget 1e6", "--publish"),
    ("--evaluate-from a.pth --publish b --sweep released", "--publish"),
    ("--evaluate-from a.pth --publish b --save_suffix _a", "--publish"),
    ("--evaluate-from a.pth --publish b --flat_curve", "--publish"),
    ("--evaluate-from a.pth --publish b --result_dir c", "--publish"),
    ("--evaluate-from a.pth --publish b --evalmode dynamic --paper_protocol", "--publish"),
    ("--evaluate-from a.pth --publish=", "--publish"),
    ("--evaluate-from a.pth --paper_protocol --evalmode realtime", "--paper_protocol"),
    ("--evaluate-from a.pth --paper_protocol --evalmode dynamic --images b.png", "--paper_protocol"),
    ("--evaluate-from a.pth --publish b --ensemble average", "--publish"),
    ("--evaluate-from a.pth --publish b --policy entropy", "--publish"),
    ("--evaluate-from a.pth --publish b --images c.png", "--publish"),
    # Evaluation.
    ("--evaluate-from a.pth --checkpoint b.pth", "--checkpoint"),
    ("--evaluate-from a.pth --resume", "--resume"),
    ("--evaluate-from a.pth --grFactor 1-2-4 --bnFactor 1-2", "--bnFactor"),
    ("--evalmode fast", "--evalmode"),
    ("--budget nan", "--budget"),
    ("--budget inf", "--budget"),
    ("--budget 40e6,,60e6", "--budget"),
    ("--budget 40e6 --sweep released", "--budget"),
    ("--ensemble mean", "--ensemble"),
    ("--policy patient", "--policy"),
    ("--evalmode anytime --policy entropy", "--policy"),
    *((f"--policy patience {more}", "--policy") for more in (
        "--budget 40e6", "--budget 3.5ms", "--sweep released", "--flat_curve", "--images a.png", "--evalmode realtime",
        "--evalmode dynamic --cost latency")),
    ("--evalmode anytime --budget 40e6", "--budget"),
    ("--evalmode anytime --sweep released", "--sweep"),
    ("--evalmode anytime --flat_curve", "--flat_curve"),
    ("--evalmode realtime --flat_curve", "--flat_curve"),
    ("--cost latency --budget 40e6", "--budget"),
    ("--cost macs --budget 3.5ms", "--budget"),
    ("--budget 3.5ms,40e6", "--budget"),
    ("--budget 3.5s", "--budget"),
    ("--budget ms", "--budget"),
    ("--cost seconds", "--cost"),
    ("--evalmode anytime --cost latency", "--cost"),
    ("--thresholds best", "--thresholds"),
    *((f"--thresholds optimised {more}", "--thresholds") for more in (
        "--evalmode anytime", "--sweep released", "--flat_curve", "--policy patience", "--max_drop 1")),
    *((f"--max_drop {value}", "--max_drop") for value in ("0", "100", "nan", "x")),
    ("--max_drop 1 --confidence_level 1", "--confidence_level"),
    ("--max_drop 1 --confidence_level 0.4", "--confidence_level"),
    ("--confidence_level 0.9", "--confidence_level"),
    *((f"--max_drop 1 {more}", "--max_drop") for more in (
        "--evalmode anytime", "--budget 4e6", "--flat_curve",
        "--sweep released", "--policy patience --evalmode dynamic", "--evaluate-from a.pth --paper_protocol --evalmode dynamic")),
    ("--evaluate-from a.pth --publish b --thresholds optimised", "--publish"),
    ("--evaluate-from a.pth --publish b --max_drop 1", "--publish"),
    ("--evaluate-from a.pth --publish b --calibrate", "--calibrate"),
    *((f"--calibrate {more}", "--calibrate") for more in (
        "--policy patience", "--sweep released", "--evaluate-from a.pth --paper_protocol --evalmode dynamic")),
    ("--evaluate-from a.pth --use-valid", "--use-valid"),
    ("--images a.png --budget 40e6,60e6", "--images"),
    ("--images a.png --budget 3.5ms", "--images"),
    ("--images a.png --sweep released", "--images"),
    ("--images", "--images"),
    ("--nChannels 1000001", "--nChannels"),
    ("--nBlocks 1001", "--nBlocks"),
    ("--threads 999999999999", "--threads"),
    ("--lr_f 1e31", "--lr_f"),
    ("--epochs 1000001 --start-epoch 5", "--epochs"),
    ("--sweep mine", "--sweep"),
    *((f"{flag}=0", flag) for flag in (
        "--nBlocks --base --step --nChannels --growthRate --grFactor --bnFactor --block-step --scale-list --epochs "
        "--batch-size --print-freq --threads --lr_milestones --lr_f --budget --image_size").split()),
    ("--use-valid --valid_size 0", "--valid_size"),
    *((f"{flag}=-1", flag) for flag in (
        "--start-epoch --workers --val_workers --local_rank --weight-decay --momentum").split()),
]

# Command lines as the released scripts have them, but for paths.
RELEASED = [
    "--data-root d --dataset cifar100 --result_dir r --use-valid --arch ranet --ensemble_reweight 0.5 --batch-size 64 "
    "--nBlocks 2 --stepmode lin_grow --step 2 --scale-list 1-2-3 --grFactor 4-2-1 --bnFactor 4-2-1 --nChannels 16 "
    "--workers 8 --lr_f 0.1 --lr_milestones 150,225 --epochs 300 --weight-decay 1e-4",
    "--local-rank=3 --distributed --data-root d --dataset imagenet --result_dir r --tensorboard_dir r/log "
    "--arch msdnet_ge --ensemble_reweight 0.5 --batch-size 64 --nBlocks 5 --stepmode even --step 7 --base 7 "
    "--nChannels 32 --growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4 --workers 16 --lr_f 0.1 "
    "--lr_milestones 30,60 --gpu 0,1,2,3 --epochs 90 --weight-decay 1e-4 --dist_backend nccl --local_rank 0",
    "--data-root d --dataset imagenet --result_dir r --arch msdnet_ge --save_suffix _use_reweight "
    "--ensemble_reweight 0.5 --batch-size 1024 --nBlocks 5 --stepmode even --step 7 --base 7 --nChannels 32 "
    "--growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4 --flat_curve --evalmode dynamic "
    "--evaluate-from r/model_best.pth --use-valid --val_workers 16 --gpu 0",
    "--data-root d --dataset cifar100 --result_dir r --arch ranet --save_suffix _use_reweight --ensemble_reweight 0.5 "
    "--batch-size 128 --nBlocks 2 --stepmode even --step 4 --nChannels 16 --scale-list 1-2-3-3 --grFactor 4-2-1-1 "
    "--bnFactor 4-2-1-1 --evalmode anytime --evaluate-from r/model_best.pth --val_workers 4 --gpu 0",
    "--method joint --ensemble_reweight 0.5 --bottleneck True --bnAfter -p 5 --wd 1e-4,5e-4 --lr 0.1 --lr-type cosine",
]


def refused(capsys: pytest.CaptureFixture, call, *arguments) -> str:
    """The one line on stderr of a call that ends the program with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_the_flags_are_frozen():
    spelled = {option for action in build_parser()._actions for option in action.option_strings}
    assert spelled == set(FLAGS.split())


def test_the_defaults_are_frozen():
    assert vars(parse_args([])) == {**DEFAULTS, "explicit": frozenset()}


def test_the_decoders_of_the_command_line_are_those_there_are():
    assert tuple(decoders.DECODERS) == catalog.DECODERS


def test_every_flag_has_a_help_text_with_its_default():
    for action in build_parser()._actions:
        assert action.help, action.dest
        if action.default not in (None, False, True, "", 0, "==SUPPRESS=="):
            assert "default" in action.help, action.dest


@pytest.mark.parametrize(("line", "flag"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_with_one_line_that_names_the_flag(capsys, line, flag):
    message = refused(capsys, parse_args, line.split())
    assert ": error: " in message
    assert re.search(rf"{re.escape(flag)}(?![\w-])", message), message   # --step is not named by --stepmode


def test_every_check_of_a_combination_refuses_some_mistake_of_the_list(capsys):
    refusals = {}   # function -> lines where it returns a message
    for function in (cli._mistake, cli._no_network):
        lines, first = inspect.getsourcelines(function)
        refusals[function.__code__] = {first + i for i, line in enumerate(lines) if re.match(r"\s+return [^N]", line)}
    seen = set()

    def trace(frame, event, argument):
        if frame.f_code not in refusals:
            return None
        return lambda frame, event, argument: seen.add((frame.f_code, frame.f_lineno))

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for line, _ in MISTAKES:
            refused(capsys, parse_args, line.split())
    finally:
        sys.settrace(before)
    missing = [line for code, lines in refusals.items() for line in lines if (code, line) not in seen]
    assert len(refusals[cli._mistake.__code__]) > 12 and not missing


def test_the_table_of_effects_is_of_all_flags():
    assert set(EFFECTS) == set(build_parser().defaults())
    of_one_task = {task: {name for name, effect in EFFECTS.items() if set(effect) == {task}} for task in (TRAINING, EVALUATION)}
    assert of_one_task[EVALUATION] == set("evaluate_from evalmode budget ensemble policy cost images runtime predictions "
                                          "thresholds max_drop "
                                          "confidence_level calibrate sweep flat_curve publish publish_details "
                                          "save_suffix".split())
    assert of_one_task[TRAINING] == set(
        "tensorboard_dir resume checkpoint new_classifier deterministic print_freq save_every_minutes epochs start_epoch "
        "freeze_backbone images_per_class optimizer lr_f lr_type lr_milestones decay_rate momentum weight_decay amp "
        "lr_step warmup_epochs nesterov label_smoothing ema "
        "channels_last compile cuda_graphs loss_equal groups overlap include_final distill_weight distill_T teacher "
        "meta_net_hidden_size meta_net_num_layers "
        "meta_net_input_type constraint_dimension epsilon target_p_index meta_interval meta_lr meta_weight_decay".split())
    free = {name for name, effect in EFFECTS.items() if effect == {TRAINING: {}, EVALUATION: {}}}
    assert free == set("workers val_workers gpu distributed dist_backend local_rank bnAfter ensemble_reweight seed device "
                       "threads dataset data_root use_valid image_size batch_size method arch stem".split())


@pytest.mark.parametrize("task", [TRAINING, EVALUATION])
@pytest.mark.parametrize("name", EFFECTS)
def test_a_flag_is_accepted_where_it_has_an_effect_and_refused_everywhere_else(name, task):
    parser, needs = build_parser(), EFFECTS[name].get(task)
    start = f"argument {parser.spelling(name)}: has no effect "
    good = {other: allowed[0] if isinstance(allowed, tuple) else allowed for other, allowed in (needs or {}).items()}

    def verdict(**values):
        return without_effect(Namespace(**{**parser.defaults(), **good, **values, "explicit": {name}}), parser, task)

    if needs is None:
        assert verdict() == f"{start}in {task}"
        return
    assert verdict() is None
    for other, allowed in needs.items():
        flag = parser.spelling(other)
        if isinstance(allowed, bool):
            assert verdict(**{other: not allowed}) == f"{start}{'without' if allowed else 'with'} {flag}"
        else:
            assert verdict(**{other: "another"}).startswith(f"{start}with {flag} another, only with {allowed[0]}")


def test_both_tasks_ask_the_table(capsys):
    for task, flag, line in ((TRAINING, "--save_suffix", "--result_dir r --save_suffix a"),
                             (EVALUATION, "--compile", "--evaluate-from e.pth --compile")):
        assert f"{flag}: has no effect in {task}" in refused(
            capsys, lambda line=line, task=task: parse_args(line.split(), task=task))


@pytest.mark.parametrize("line", [
    "--method joint --lr-type cosine --optimizer adam --ensemble_reweight 0.5 --lr_milestones 150,225",
    "--workers 9 --val_workers 9 --gpu 0 --distributed --dist_backend gloo --local_rank 0 --bnAfter"])
def test_what_old_command_lines_and_the_scripts_always_pass_is_accepted_without_an_effect(line):
    parse_args(["--result_dir", "r", *line.split()], task="training")


def test_what_a_file_settles_is_judged_when_it_has_been_read(capsys):
    args = parse_args("--evaluate-from a.pth --decoder torchcodec --base 4".split(), task="evaluation")
    args.dataset, args.image_size, args.stem = "folder", 224, "large"
    require_effect(args)
    args.arch = "ranet"
    assert "--base: has no effect with --arch ranet" in refused(capsys, require_effect, args)


def test_the_decoder_of_small_images_in_a_file_is_refused(capsys):
    args = parse_args("--evaluate-from a.pth --decoder torchcodec".split(), task="evaluation")
    assert "--decoder: has no effect with --dataset cifar100" in refused(capsys, require_effect, args)
    args.dataset = "folder"
    assert "--decoder: has no effect with --stem small" in refused(capsys, require_effect, args)


def test_a_message_stays_one_line_when_the_value_has_a_line_break(capsys):
    assert "unrecognized" in refused(capsys, parse_args, ["two\nlines"])
    assert "--epochs" in refused(capsys, parse_args, ["--epochs", "1\n2"])


def test_a_misspelt_flag_is_answered_with_the_near_one(capsys):
    assert "did you mean --nBlocks?" in refused(capsys, parse_args, ["--n-blocks", "4"])


@pytest.mark.parametrize("line", RELEASED)
def test_released_command_lines_run_unchanged(line):
    parse_args(line.split())


def test_a_method_has_the_defaults_of_its_own_and_an_alias():
    assert parse_args(["--method", "conventional"]).method == "joint"
    args = parse_args("--method imta --checkpoint a.pth --distill_T 1".split())
    assert (args.distill_weight, args.distill_T) == (0.9, 1.0)
    assert parse_args("--method block_losses --overlap 1".split()).distill_weight == 0.0


def test_the_methods_of_the_command_line_are_those_there_are():
    assert all(issubclass(method_class(name), Method) for name in catalog.METHODS)
    assert not set(catalog.METHOD_ALIASES) & set(catalog.METHODS)


def test_lists_and_switches_are_converted():
    args = parse_args("--nBlocks 3 --budget 40e6,6.5e7 --ensemble_reweight 0.3,0.5,0.7 --weight-decay 1e-4,5e-4 "
                      "--bottleneck false --lr_milestones 150,225".split())
    assert args.budget == [40e6, 65e6]
    assert args.ensemble_reweight == [0.3, 0.5, 0.7]
    assert args.weight_decay == [1e-4, 5e-4]
    assert args.lr_milestones == [150, 225]
    assert args.bottleneck is False


def test_explicit_holds_what_was_given_even_where_it_equals_the_default():
    args = parse_args("--lr 0.1 --batch-size 64 --use-valid --local-rank 0".split())
    assert args.explicit == {"lr_f", "batch_size", "use_valid", "local_rank"}


@pytest.mark.parametrize(("line", "classes", "side", "valid_size"), [
    ("--dataset cifar10", 10, 32, 5000),
    ("--dataset cifar100", 100, 32, 5000),
    ("--dataset imagenet", 1000, 224, 50_000),
    ("--dataset glyphs", 36, 32, 2000),
    ("--dataset folder", None, 32, None),
    ("--dataset folder --image_size 224 --use-valid --valid_size 7", None, 224, 7),
])
def test_the_data_set_settles_classes_size_and_hold_out(line, classes, side, valid_size):
    args = parse_args(line.split())
    assert (args.num_classes, args.image_size, args.valid_size) == (classes, side, valid_size)


def test_a_script_can_limit_the_data_sets_and_has_the_first_as_default(capsys):
    assert parse_args([], datasets=("imagenet", "folder")).num_classes == 1000
    assert "--dataset" in refused(capsys, lambda: parse_args(["--dataset", "glyphs"], datasets=("imagenet", "folder")))


def test_a_budget_or_sweep_alone_means_dynamic_evaluation():
    assert parse_args(["--budget", "40e6"]).evalmode == "dynamic"
    assert parse_args(["--sweep", "released"]).evalmode == "dynamic"
    assert parse_args(["--thresholds", "optimised"]).evalmode == parse_args(["--max_drop", "1"]).evalmode == "dynamic"
    assert parse_args(["--flat_curve"]).evalmode == "dynamic"
    assert parse_args(["--policy", "margin"]).evalmode == "dynamic"


@pytest.mark.parametrize("more", ["--budget 3ms", "--cost latency", "--budget 3ms --evalmode dynamic"])
def test_images_with_a_budget_in_milliseconds_are_told_of_no_flag_that_is_not_there(more, capsys):
    error = refused(capsys, parse_args, f"--evaluate-from a.pth --images b.png {more}".split())
    assert "--images: takes at most one --budget, in MACs" in error and "realtime" not in error


def test_a_budget_in_milliseconds_means_evaluation_in_real_time():
    args = parse_args(["--budget", "3.5ms, 4 ms"])
    assert (args.budget, args.cost, args.evalmode) == ([3.5, 4.0], "latency", "realtime")


def test_an_evaluation_is_not_held_to_defaults_that_its_file_replaces():
    # Of a RANet with four sub-networks: the default --scale-list has three entries, but the file's counts.
    parse_args("--evaluate-from a.pth --arch ranet --grFactor 4-2-1-1".split())
    parse_args("--evaluate-from a.pth --ensemble_reweight 0.1,0.2,0.3,0.4".split())


def test_a_script_says_what_it_cannot_do_without(capsys):
    assert "training needs --result_dir" in refused(capsys, lambda: parse_args([], task="training"))
    assert "evaluation needs --evaluate-from" in refused(capsys, lambda: parse_args(["--result_dir", "r"], task="evaluation"))


@pytest.mark.parametrize(("line", "script", "dataset"), [
    ("--dataset cifar100", "msdnet", "cifar100"), ("--dataset glyphs --arch msdnet", "msdnet", "cifar100"),
    ("--dataset imagenet", "msdnet", "imagenet"), ("--dataset folder --image_size 224 --arch ranet_ge", "ranet", "imagenet"),
    ("--dataset cifar10 --arch ranet", "ranet", "cifar100")])
def test_without_a_flag_of_the_network_it_is_the_papers_for_anytime_prediction(line, script, dataset):
    recipe = subprocess.run(["bash", "-c", f"source {script}_scripts/recipes.sh; network {dataset} any"], cwd=ROOT, timeout=60,
                            capture_output=True, text=True, check=True).stdout
    args, expected = parse_args(line.split()), parse_args(["--dataset", dataset, *recipe.split()])
    arch = args.arch
    note = choose_network(args)
    assert {name: getattr(args, name) for name in NETWORK} == {name: getattr(expected, name) for name in NETWORK} | {"arch": arch}
    assert f"--arch {arch}" in note and f"--nBlocks {args.nBlocks}" in note


def test_a_flag_of_the_network_or_a_run_that_goes_on_keeps_the_network():
    args = parse_args(["--nBlocks", "2"])
    assert choose_network(args) is None and (args.nBlocks, args.step) == (2, 1)
    args = parse_args(["--resume"])
    assert choose_network(args, {"nChannels": 8}) is None   # the rest were the defaults of that run
    assert (args.nBlocks, args.step, args.nChannels) == (1, 1, 8)


def test_training_and_evaluation_of_bare_weights_name_the_network_they_take(tmp_path, capsys):
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    missing = ["--dataset", "folder", "--data-root", str(tmp_path / "nowhere")]
    for call in (lambda: train_cifar100.main([*missing, "--result_dir", str(tmp_path / "run")]),
                 lambda: eval_cifar100.main([*missing, "--evaluate-from", str(tmp_path / "w.pth")])):
        with pytest.raises(SystemExit):
            call()
        note = "taking the paper's for own images, --arch msdnet_ge --nBlocks 10 --step 2 --nChannels 16"
        assert note in capsys.readouterr().out


def test_flags_that_do_not_fit_the_papers_network_are_refused(capsys):
    args = parse_args("--ensemble_reweight 0.1,0.2,0.3".split())
    assert "10" in refused(capsys, choose_network, args).split("makes")[1]


def test_importing_args_parses_nothing_and_loads_no_torch():
    program = "import sys; sys.argv.append('--no-such-flag'); import args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def parsed(words: list[str]):
    """What parse_args makes of the words; None where it refuses them, which has to be with exit code 2 and one line."""
    error = io.StringIO()
    with redirect_stderr(error), redirect_stdout(io.StringIO()):
        try:
            return parse_args(words)
        except SystemExit as ended:
            if ended.code == 0 and any(word.startswith(("-h", "--help")) for word in words):
                return None
            assert ended.code == 2 and len(error.getvalue().splitlines()) == 1, error.getvalue()


VALUES = st.one_of(
    st.sampled_from("0 1 2 3 -1 1-2-4 1-1-1 4-2-1 1-2-4-4 0.5 1,2 0.1,0.2,0.3 1e-4 1e400 nan -inf true max boost".split()),
    st.sampled_from("ranet ranet_ge msdnet cifar10 imagenet folder adam cosine lin_grow dynamic skip = - -- , 1- a/b".split()),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
)
WORDS = st.one_of(st.sampled_from(FLAGS.split()), VALUES)
FLAGS_WITH_VALUES = st.lists(st.tuples(st.sampled_from(FLAGS.split()), VALUES).map("=".join), max_size=6)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8) | FLAGS_WITH_VALUES)
def test_any_list_of_words_is_parsed_or_refused_with_one_line(words):
    args = parsed(words)
    assert args is None or set(vars(args)) == {*DEFAULTS, "explicit"}


def small(*values: int):
    return st.sampled_from(values).map(str)


PER_SCALE = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(lambda values: "-".join(map(str, values)))
NETWORKS = st.fixed_dictionaries({"--dataset": st.sampled_from(["cifar10", "imagenet"])}, optional={
    "--arch": st.sampled_from(["msdnet", "msdnet_ge", "ranet", "ranet_ge"]), "--nBlocks": small(1, 2, 3),
    "--base": small(1, 2, 5), "--step": small(1, 2, 3), "--stepmode": st.sampled_from(["even", "lin_grow"]),
    "--nChannels": small(1, 2, 3, 8),
    "--growthRate": small(1, 2, 3), "--grFactor": PER_SCALE, "--bnFactor": PER_SCALE, "--prune": st.sampled_from(["max", "min"]),
    "--bottleneck": st.sampled_from(["true", "false"]), "--reduction": st.sampled_from(["0.01", "0.5", "1"]),
    "--block-step": small(1, 2), "--scale-list": PER_SCALE, "--compress-factor": st.sampled_from(["0.01", "0.5", "0.99"]),
    "--ensemble_reweight": st.sampled_from(["0.5", "0.1,0.2", "0.1,0.2,0.3"])})


@settings(deadline=None, max_examples=50)
@given(NETWORKS)
def test_flags_that_are_accepted_make_a_network_that_runs_or_are_refused_with_a_reason(flags):
    args = parsed([word for pair in flags.items() for word in pair])
    if args is not None:
        try:
            model = build_model(NetworkSpec.from_args(args))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            with torch.device("meta"):   # shapes only
                predictions = model.to("meta").eval()(torch.empty(2, 3, args.image_size, args.image_size))
            assert [p.shape for p in predictions] == [(2, args.num_classes)] * model.n_exits
