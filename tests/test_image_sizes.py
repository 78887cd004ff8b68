"""Images of other sides than the paper's 32 and 224 pixels: networks, costs, early exit, export, data, runs and mistakes."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_early_exit import assert_as_simulated, everything, quantile_thresholds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit
from args import choose_network, parse_args, require_unchanged
from dataloader import build_data
from models import BoostedNet, MSDNet, RANet, ResNet
from op_counter import measure_model
from utils import export
from utils.core.errors import STOPPED, UserError
from utils.data.augment import CIFAR_STATISTICS, IMAGENET_STATISTICS, CropFlip, statistics_of
from utils.evaluation import programs
from utils.evaluation.classify import read_images
from utils.evaluation.early_exit import Exits
from utils.evaluation.fast_form import load_model, load_teacher, prepare_for_inference
from utils.evaluation.onnx_exit import open_session
from utils.methods import Method
from utils.methods.imta import Collaboration
from utils.methods.l2w import SampleWeighting
from utils.options.network import NetworkSpec, stem_of
from utils.reports.finished_runs import read_evaluation, read_run
from utils.runs import checkpoint
from utils.runs.restore import take_over

SIDES = [48, 64, 96, 160]


def build(family: str, side: int, **more) -> nn.Module:
    """A small network with the number of scales that the paper has with its first layer."""
    torch.manual_seed(3)
    scales = [1, 2, 4] if side < 97 else [1, 2, 4, 4]
    if family == "msdnet":
        return MSDNet(**{**dict(n_blocks=3, n_channels=4, base=2, gr_factor=scales, bn_factor=scales, num_classes=5,
                                image_size=side), **more})
    return RANet(n_blocks=1, block_step=1, n_channels=4, step=2, scale_list=[1, 2, 3, 4][:len(scales)], gr_factor=scales[::-1],
                 bn_factor=scales[::-1], num_classes=5, image_size=side, **more)


@pytest.fixture(scope="module", params=[(family, side) for family in ("msdnet", "ranet") for side in SIDES],
                ids=lambda setting: "-".join(map(str, setting)))
def network(request):
    """(model with statistics as after training, side of its images)"""
    family, side = request.param
    backbone = build(family, side, rescale_gradients=True).train()
    with torch.no_grad():
        for _ in range(3):
            backbone(torch.randn(8, 3, side, side))
        for classifier in backbone.classifier:
            classifier.linear.weight.mul_(6)
    return BoostedNet(backbone, [0.5] * backbone.n_exits).eval(), side


def test_costs_agree_with_torchs_counter_and_with_hooks(network):
    check_costs(*network)


@pytest.mark.parametrize("side", SIDES)
def test_costs_of_a_resnet_too(side):
    check_costs(BoostedNet(ResNet("resnet18", num_classes=5, image_size=side), [0.5] * 4).eval(), side)


def check_costs(model: BoostedNet, side: int) -> None:
    extra = 0

    def count(module, inputs, output):
        nonlocal extra
        window = {nn.ReLU: 1, nn.MaxPool2d: 9}.get(type(module)) or math.prod(inputs[0].shape[2:])   # of an output of the mean
        extra += output.numel() * window

    kinds = nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    biases = sum(module.out_features for module in model.modules() if isinstance(module, nn.Linear))
    assert not any(isinstance(module, nn.AvgPool2d) for module in model.modules())
    assert measure_model(model, side, side)[0][-1] == counter.get_total_flops() // 2 + extra + biases


@pytest.mark.parametrize("form", ["growing", "folded"])
def test_early_exit_leaves_where_the_simulation_says_in_every_form(network, form):
    model, side = network
    ready, images = prepare_for_inference(model, form), torch.randn(24, 3, side, side)
    confidence, prediction = everything(ready, images)
    assert np.abs(confidence - everything(model, images)[0]).max() < 1e-5
    thresholds = quantile_thresholds(confidence, 0.4)
    parts = [EarlyExit(ready, thresholds)(part) for part in (images[:1], images[1:])]
    results = Exits(*(torch.cat(column) for column in zip(*parts)))
    assert len(set(results.exit.tolist())) > 1
    assert_as_simulated(results, confidence, prediction, thresholds)


def test_exported_programs_compute_the_same(network):
    model, side = network
    for number, step in enumerate(programs.export_steps(model, side)):
        inputs = tuple(torch.cat([tensor, tensor]) for tensor in step.inputs)   # another batch size than it was made with
        for got, want in zip(step.program.module()(*inputs), step.outputs, strict=True):
            torch.testing.assert_close(got[:3], want, rtol=1e-4, atol=1e-5)
        if number == 0:
            with torch.inference_mode():
                torch.testing.assert_close(step.outputs[0], model(step.inputs[0])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [48, 160])
def test_onnx_programs_compute_the_same(side, tmp_path):
    model = BoostedNet(build("msdnet", side, n_blocks=1), [0.5]).eval()
    files = [path for path, _ in programs.write_programs(model, side, tmp_path, "onnx")]   # each checked against PyTorch
    session = open_session(files[0].read_bytes())
    images = np.random.default_rng(0).normal(size=(5, 3, side, side)).astype(np.float32)
    got = session.run(None, {session.get_inputs()[0].name: images})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(got, model(torch.from_numpy(images))[0].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("side", "kernel", "pooling"), [
    (32, 3, nn.AvgPool2d), (33, 3, nn.AdaptiveAvgPool2d), (96, 3, nn.AdaptiveAvgPool2d),
    (97, 7, nn.AdaptiveAvgPool2d), (224, 7, nn.AvgPool2d), (384, 7, nn.AdaptiveAvgPool2d)])
@pytest.mark.parametrize("family", ["msdnet", "ranet"])
def test_the_first_layer_follows_the_side_and_only_the_last_pooling_is_new(family, side, kernel, pooling):
    with torch.device("meta"):
        net, paper = build(family, side), build(family, 32 if side < 97 else 224)
    first, = {module.kernel_size for name, module in net.named_modules()
              if isinstance(module, nn.Conv2d) and name.endswith(".layers.0.net.0" if kernel == 3 else ".layers.0.0")
              and module.in_channels == 3}
    assert first == (kernel, kernel) and type(net.classifier[-1].m[2]) is pooling
    widths = {classifier.linear.in_features == 128 for classifier in net.classifier}
    assert widths == {side < 97}   # behind a large first layer the classifiers keep the width of what they read
    assert [(name, tensor.shape) for name, tensor in net.state_dict().items()] \
        == [(name, tensor.shape) for name, tensor in paper.state_dict().items()]   # weights of one side start another


@pytest.mark.parametrize(("side", "stem"), [(48, "large"), (160, "small"), (32, "large"), (224, "small")])
def test_another_first_layer_than_that_of_the_side(side, stem):
    scales = [1, 2] if stem == "large" else [1, 2, 4]
    net = build("msdnet", side, n_blocks=1, base=1, gr_factor=scales, bn_factor=scales, stem=stem).eval()
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    assert first.kernel_size == ((7, 7) if stem == "large" else (3, 3))
    with torch.no_grad():
        features, _ = net.advance(0, net.start(torch.randn(2, 3, side, side)))
        torch.testing.assert_close(net.classifier[0].pool(features), net.classifier[0].m[:2](features).mean(dim=(2, 3)))


@pytest.mark.parametrize(("family", "change", "message"), [
    ("msdnet", dict(image_size=48, gr_factor=[1] * 6, bn_factor=[1] * 6), "2x2 map.*gr_factor and bn_factor.*larger image_size$"),
    ("msdnet", dict(image_size=48, stem="large", gr_factor=[1] * 4, bn_factor=[1] * 4), "2x2 map.*image_size or stem small"),
    ("ranet", dict(image_size=48, scale_list=[1, 2, 3, 4, 5, 6], gr_factor=[1] * 6, bn_factor=[1] * 6), "entries of scale_list"),
    ("ranet", dict(image_size=64, scale_list=[2, 2, 3]), "sub-network 3 to a 16x16 map; sub-network 1 ends in 32x32"),
])
def test_a_side_too_small_for_the_scales_is_refused_with_what_to_change(family, change, message):
    more = dict(base=1) if family == "msdnet" else dict(growth_rate=8)
    with pytest.raises(ValueError, match=message):
        (MSDNet if family == "msdnet" else RANet)(**{**dict(n_blocks=1, n_channels=4), **more, **change})


# Command line and stored runs

@pytest.mark.parametrize(("line", "stem"), [
    ("--dataset cifar100", "small"), ("--dataset imagenet", "large"), ("--dataset folder --image_size 96", "small"),
    ("--dataset folder --image_size 97", "large"), ("--dataset folder --image_size 128 --stem small", "small"),
    ("--dataset folder --image_size 64 --stem large --grFactor 1-2 --bnFactor 1-2", "large")])
def test_the_command_line_chooses_the_first_layer_and_with_it_the_papers_network(line, stem):
    args = parse_args(line.split())
    assert args.stem == stem
    if "--grFactor" not in line:
        choose_network(args)
        assert len(args.grFactor) == {"small": 3, "large": 4}[stem] and args.stem == stem
        assert NetworkSpec.from_args(args).stem == stem


def test_a_run_from_before_the_choice_goes_on_with_the_first_layer_of_its_side(capsys):
    args = parse_args("--result_dir r --dataset folder --image_size 224 --resume".split(), task="training")
    choose_network(args)
    before = {name: value for name, value in vars(args).items() if name not in ("stem", "explicit", "resume")}
    choose_network(args, before)
    require_unchanged(args, before, epochs_begun=1)
    assert args.stem == "large"
    other = parse_args("--result_dir r --dataset folder --image_size 224 --stem small --resume".split(), task="training")
    with pytest.raises(SystemExit):
        require_unchanged(other, before, epochs_begun=1)
    assert "--stem 'small' (was 'large')" in capsys.readouterr().err
    again = parse_args("--result_dir r --dataset folder --image_size 160 --resume".split(), task="training")
    choose_network(again, {**before, "image_size": 160, "stem": "small"})
    assert again.stem == "small"   # as the rest of the network


@pytest.mark.parametrize(("stored", "stem"), [
    ({"image_size": 32}, "small"), ({"image_size": 224}, "large"), ({"image_size": 64, "stem": "large"}, "large"), ({}, "small")])
def test_the_first_layer_of_stored_settings(stored, stem):
    assert stem_of(stored) == stem


# Data

@pytest.mark.parametrize("side", [48, 64, 96])
def test_crops_are_padded_by_an_eighth_of_the_side(side):
    crop_flip, generator = CropFlip(side), torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (6, 3, side, side), dtype=torch.uint8, generator=generator)
    choice = torch.randint(crop_flip.n_choices, (6,), generator=generator)
    pad = side // 8
    padded = torch.zeros(6, 3, side + 2 * pad, side + 2 * pad, dtype=torch.uint8)
    padded[:, :, pad:-pad, pad:-pad] = images
    assert crop_flip.n_choices == 2 * (2 * pad + 1) ** 2
    for got, image, dy, dx, flip in zip(crop_flip(images, choice), padded, *crop_flip.decode(choice)):
        cut = image[:, dy:dy + side, dx:dx + side]
        assert torch.equal(got, cut.flip(2) if flip else cut)


def test_sides_and_first_layers_settle_statistics_and_whether_images_are_cropped(tmp_path):
    for dataset, side, stem, cropped in (("folder", 64, None, False), ("folder", 128, None, True), ("folder", 64, "large", True),
                                         ("folder", 128, "small", False), ("cifar100", 32, "large", False)):
        assert statistics_of(dataset, side, stem) == (IMAGENET_STATISTICS if cropped else CIFAR_STATISTICS)
    images = tiny.make_images(tmp_path / "images", classes=2, train=2, test=1, side=48)
    whole = build_data(dataset="folder", data_root=images, image_size=48, quiet=True)
    batch = next(iter(whole.test())).images
    assert batch.shape == (2, 3, 48, 48) and not whole.cropped
    files = sorted(str(path) for path in (images / "test").rglob("*.png"))
    torch.testing.assert_close(read_images(files, "folder", 48), batch)
    middle = build_data(dataset="folder", data_root=images, image_size=48, stem="large", val_workers=0)
    crops = next(iter(middle.test())).images
    assert crops.shape == (2, 3, 48, 48) and middle.cropped and not torch.allclose(crops, batch)
    torch.testing.assert_close(read_images(files, "folder", 48, "large"), crops)
    with pytest.raises(UserError, match="48x48 pixels, but --image_size 64 needs every image to be 64x64; --stem large"):
        build_data(dataset="folder", data_root=images, image_size=64, quiet=True)


# Runs

@pytest.fixture(scope="module", params=SIDES)
def folder(request, tmp_path_factory):
    """A run on images of one side, evaluated, in `run`; the images in `images`."""
    folder = tmp_path_factory.mktemp(f"side{request.param}")
    tiny.make_images(folder / "images", side=request.param)
    assert train_cifar100.main(line(folder, request.param)) == 0
    assert eval_cifar100.main(["--data-root", str(folder / "images"), "--evaluate-from", str(folder / "run" / "model_best.pth"),
                               "--device", "cpu", "--evalmode", "dynamic"]) == 0
    return folder


def line(folder: Path, side: int, *more: str, name: str = "run") -> list[str]:
    return tiny.command(folder / "images", folder / name, "--image_size", str(side), "--workers", "0", "--val_workers", "0",
                        *more)


def side_of(folder: Path) -> int:
    return checkpoint.load(folder / "run" / "model_best.pth")["architecture"]["image_size"]


def test_a_run_goes_on_with_the_same_bits(folder, monkeypatch):
    side = side_of(folder)
    with monkeypatch.context() as patch:
        tiny.signal_at_step(patch, 7)
        assert train_cifar100.main(line(folder, side, name="cut")) == STOPPED
    assert train_cifar100.main(line(folder, side, "--resume", name="cut")) == 0
    assert not list(tiny.differences(tiny.outcome(folder / "cut"), tiny.outcome(folder / "run")))


def test_an_exported_run_says_how_images_are_read(folder, tmp_path):
    side = side_of(folder)
    assert export.main([str(folder / "run"), str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (about["image_size"], about["short_side"]) == (side, 182 if side == 160 else side)
    assert about["mean"] == list((IMAGENET_STATISTICS if side == 160 else CIFAR_STATISTICS)[0]) and about["macs"] == json.loads(
        (folder / "run" / "dynamic.json").read_text())["macs"]
    model, saved = load_model(folder / "run" / "model_best.pth")
    for stem, short in (("large", side * 8 // 7), ("small", side)):
        saved["architecture"]["stem"] = stem
        assert programs.describe(model, saved, [], [], "torch")["short_side"] == short


def test_files_from_before_the_choice_are_of_the_same_network(folder, tmp_path):
    side = side_of(folder)
    saved = torch.load(folder / "run" / "model_best.pth", weights_only=True)
    stem = saved["architecture"].pop("stem")
    torch.save(saved, tmp_path / "old.pth")
    model, _ = load_model(tmp_path / "old.pth")
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert all(map(torch.equal, model(x), load_model(folder / "run" / "model_best.pth")[0](x)))
    args = parse_args(["--evaluate-from", str(tmp_path / "old.pth")])
    take_over(args, checkpoint.load(tmp_path / "old.pth"))
    assert (args.image_size, args.stem) == (side, stem) == (side, "large" if side == 160 else "small")
    saved["architecture"]["stem"] = "medium"
    torch.save(saved, tmp_path / "changed.pth")
    with pytest.raises(UserError, match="its stem makes no sense"):
        load_model(tmp_path / "changed.pth")
    for name, read in (("results.json", lambda path: read_run(path.parent).settings),
                       ("dynamic.json", lambda path: read_evaluation(path)["config"])):
        new, content = folder / "run" / name, json.loads((folder / "run" / name).read_text())
        assert content["config"].pop("stem") == stem
        (tmp_path / name).write_text(json.dumps(content))
        assert read(new) == read(tmp_path / name)


def test_a_teacher_that_reads_images_otherwise_is_refused(folder):
    side, teacher = side_of(folder), folder / "run" / "model_best.pth"
    options = dict(dataset="folder", data_root=folder / "images", image_size=side, use_valid=True, valid_size=8, val_workers=0,
                   workers=0, quiet=True)
    load_teacher(teacher, build_data(**options))
    other = "small" if side == 160 else "large"
    with pytest.raises(UserError, match=f"is for images that are {'' if side == 160 else 'not '}cropped"):
        load_teacher(teacher, build_data(**options, stem=other))


# One image on a map of 1x1

def test_the_smallest_pass_of_each_method():
    assert [Method.smallest_pass(n) for n in (1, 2, 3)] == [1, 2, 3]
    assert [SampleWeighting.smallest_pass(n) for n in (1, 2, 3, 4)] == [1, 1, 1, 2]
    assert [Collaboration.smallest_pass(n) for n in (1, 2)] == [2, 2]


@pytest.mark.parametrize(("n_train", "world", "smallest"), [(40, 1, 8), (41, 1, 1), (42, 1, 2), (5, 1, 5), (34, 2, 1),
                                                            (33, 2, 8)])
def test_the_smallest_batch_of_an_epoch(tmp_path, n_train, world, smallest):
    images = tiny.make_images(tmp_path / "images", classes=1, train=n_train, test=1)
    ranks = [build_data(dataset="folder", data_root=images, batch_size=8, rank=rank, world=world, quiet=True)
             for rank in range(world)]
    assert {data.smallest_batch for data in ranks} == {smallest}
    assert min(len(batch.labels) for data in ranks for batch in data.train(0)) == smallest


ONE_PIXEL = "--image_size 48 --stem large --grFactor 1-2-4 --bnFactor 1-2-4 --workers 0 --val_workers 0".split()


def test_a_batch_of_one_image_on_a_map_of_one_pixel_is_one_line_before_the_run_begins(tmp_path, capsys):
    tiny.make_images(tmp_path / "images", side=48)   # 48 images, 8 of them held out
    alone = [*tiny.command(tmp_path / "images", tmp_path / "run", *ONE_PIXEL), "--epochs", "1", "--batch-size"]
    message = tiny.one_line_error(capsys, lambda: train_cifar100.main([*alone, "39"]))
    assert "--batch-size" in message and "one image on a map of 1x1" in message
    assert not (tmp_path / "run" / "split.pth").exists()   # which a run leaves that begins
    assert "one image on a map" in tiny.one_line_error(
        capsys, lambda: train_cifar100.main([*alone, "19", "--method", "l2w"]))   # a half of the last two
    assert train_cifar100.main([*alone, "38"]) == 0


def test_a_batch_that_loses_all_images_but_one_is_one_line_too(tmp_path, capsys):
    images = tiny.make_images(tmp_path / "images", side=48)
    broken = sorted((images / "train").rglob("*.png"))
    for path in broken[::2] + broken[1:-1:2]:
        path.write_bytes(b"no image")
    command = tiny.command(images, tmp_path / "run", *ONE_PIXEL, "--skip_unreadable", "--batch-size", "48")
    command = [word for word in command if word not in ("--use-valid", "--valid_size")]
    command.pop(command.index(str(tmp_path / "run")) + 1)   # the size
    message = tiny.one_line_error(capsys, lambda: train_cifar100.main(command))
    assert "one image on a map of 1x1" in message


# Real images

@pytest.mark.slow
@pytest.mark.realdata
def test_a_network_for_64_pixels_learns_from_real_images(real_data, tmp_path):
    classes = ("aquarium_fish", "bicycle", "plain", "sunflower")
    for part, n in (("train", 40), ("test", 20)):
        for name in classes:
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for file in sorted((real_data / "cifar100" / part / name).glob("*.png"))[:n]:
                image = Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
                image.save(tmp_path / "images" / part / name / file.name)
    flags = ("--dataset folder --image_size 64 --nBlocks 2 --base 1 --nChannels 8 --batch-size 16 --epochs 6 --lr_milestones 4 "
             "--device cpu --threads 1").split()
    assert train_cifar100.main(["--data-root", str(tmp_path / "images"), "--result_dir", str(tmp_path / "run"), *flags]) == 0
    test = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert min(test["top1"]) > 50   # chance is 25
