"""Weights as other programs save them are read in all their usual shapes; what is no checkpoint is called by its name."""
from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pathlib
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import eval_cifar100
import eval_imagenet
import train_cifar100
from args import parse_args
from dataloader import build_data
from models import BoostedNet
from utils.core.errors import UserError
from utils.data.split import Split
from utils.evaluation.predict import predict
from utils.methods.l2w import WeightNet
from utils.options.network import NetworkSpec
from utils.runs import checkpoint
from utils.runs.restore import build_model

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


def saved(path: pathlib.Path, content: object, **options) -> pathlib.Path:
    torch.save(content, path / "a.pth", **options)
    return path / "a.pth"


def refusal(path: pathlib.Path, key: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, key)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    # Torch's own message recommends to read the file without protection.
    assert not any(words in message for words in ("weights_only", "safe_globals", "allowlist", "trust")), message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("content", [
    WEIGHTS, OrderedDict(WEIGHTS), prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."),
    prefixed("_orig_mod.module.module."), *({key: WEIGHTS, "epoch": 3, "note": "x"} for key in (
        "state_dict", "model", "net", "state_dict_ema", "model_ema")),
    {"state_dict": {"model": prefixed("module.")}, "best_acc": 70.5},
    {"model": {name: nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}, "optimizer": {"state": {}}},
    {"net": WEIGHTS, "format": None, "architecture": "resnet"}, {"state_dict": WEIGHTS, "architecture": {"name": "resnet"}},
], ids=str)
def test_weights_are_found_in_every_usual_shape(tmp_path, content):
    found = checkpoint.load(saved(tmp_path, content))
    assert list(found["state_dict"]) == list(WEIGHTS)
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in WEIGHTS.items())
    assert set(found) <= {"state_dict", "epoch"}   # nothing else of them is believed


def test_of_several_networks_one_is_chosen_by_its_key(tmp_path):
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    path = saved(tmp_path, {"model": WEIGHTS, "model_ema": other, "state_dict": {"net": other}, "epoch": 7})
    message = refusal(path)
    assert "several networks" in message and message.endswith("--checkpoint_key: state_dict.net, model, model_ema")
    assert torch.equal(checkpoint.load(path, "model")["state_dict"]["a.bias"], torch.ones(2))
    for key in ("model_ema", "state_dict.net", "state_dict"):
        assert torch.equal(checkpoint.load(path, key)["state_dict"]["a.bias"], torch.full((2,), 2.0))
    message = refusal(path, "ema")
    assert "nothing under --checkpoint_key ema" in message and "'model_ema' (a dict)" in message
    assert "something else (int)" in refusal(path, "epoch")


def test_a_name_that_is_there_with_and_without_its_prefix_is_refused(tmp_path):
    assert "twice" in refusal(saved(tmp_path, {**WEIGHTS, **prefixed("module.")}))


def numpy_values(dotted: str) -> dict:
    """Values as NumPy saves them, under the names of the package before version 2 ("numpy.core") or since."""
    return {"accuracy": np.float64(70.5), "epoch": np.int64(3), "curve": np.arange(4), "names": np.array(["a"]),
            "kind": np.dtype("f4"), "core": dotted}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("archive", [True, False])
def test_harmless_objects_beside_the_weights_are_passed_over(tmp_path, monkeypatch, old, archive):
    about = {"args": argparse.Namespace(lr=0.1, folder=pathlib.PurePosixPath("x/y"), path=tmp_path), **numpy_values("")}
    path = saved(tmp_path, {"state_dict": WEIGHTS, **about}, _use_new_zipfile_serialization=archive)
    if old:   # the names have different lengths, but the pickle ends them with a line
        if archive:
            with zipfile.ZipFile(path) as source:
                entries = {name: source.read(name) for name in source.namelist()}
            with zipfile.ZipFile(path, "w") as target:
                for name, data in entries.items():
                    target.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))
        else:
            path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert list(checkpoint.load(path)) == ["state_dict"]


class Runs:
    """Runs a command when it is read carelessly."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("archive", [True, False])
def test_other_objects_stay_refused_and_never_run(tmp_path, archive):
    marker = tmp_path / "marker"
    for content, name in (({"state_dict": WEIGHTS, "x": Runs(marker)}, "posix.system"),
                          ({"state_dict": WEIGHTS, "x": argparse.Namespace(y=Runs(marker))}, "posix.system"),
                          (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")):
        message = refusal(saved(tmp_path, content, _use_new_zipfile_serialization=archive))
        assert f"holds more than tensors and plain values ({name})" in message and "state_dict()" in message
        assert "damaged" not in message
    assert not marker.exists()


def test_a_file_without_checksums_is_read_and_one_with_a_wrong_one_is_not(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"state_dict": WEIGHTS})
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip(), "this version of torch writes checksums all the same: the test proves nothing"
    assert list(checkpoint.load(path)["state_dict"]) == list(WEIGHTS)
    path = saved(tmp_path, {"state_dict": WEIGHTS})
    data = path.read_bytes()
    path.write_bytes(data.replace(torch.arange(6.0).numpy().tobytes(), torch.arange(1, 7.0).numpy().tobytes()))
    assert "damaged: the checksum" in refusal(path)


def packed_tar(content: bytes = b"") -> bytes:
    stream, entry = io.BytesIO(), tarfile.TarInfo("model.pth")
    entry.size = len(content)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def in_memory(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(("stored", "kind"), [
    (b"", "it is empty"),
    (packed_tar(), "a tar archive"),
    (packed_tar(in_memory(WEIGHTS)), "a tar archive"),   # which ends like a zip archive
    (b"\x89PNG\r\n\x1a\n" + bytes(60), "an image"),
    (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
    (b'\x40\0\0\0\0\0\0\0{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    ' + bytes(4), "a safetensors file"),
    (pickle.dumps({"a": 1}, protocol=4), "a pickle that was not written by torch.save"),
    (pickle.dumps({"a": 1}, protocol=2), "a pickle that was not written by torch.save"),
    (gzip.compress(b"x" * 100, mtime=0), "a gzip archive"),
    (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
    (b"\n  <html lang=en>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git-LFS pointer"),
    (b'{"epoch": 3}\n', "a text file"),
    (b"PK\x03\x04" + bytes(60), "a zip archive without its end"),
])
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, stored, kind):
    (tmp_path / "a.pth").write_bytes(stored)
    message = refusal(tmp_path / "a.pth")
    assert kind in message and ("damaged" in message) == stored.startswith(b"PK")


def test_archives_and_folders_are_called_by_their_names(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(3))
    assert "zip archive that torch.save did not write; it holds 'x.npy'" in refusal(path)
    saved(tmp_path, WEIGHTS)
    assert "is a folder; name the checkpoint in it: a.pth" in refusal(tmp_path)
    path = tmp_path / "b.pth"
    path.write_bytes(pickle.dumps(WEIGHTS, protocol=4))
    assert "not written by torch.save" in refusal(path)
    message = refusal(saved(tmp_path, WEIGHTS, pickle_protocol=4))
    assert "another pickle_protocol" in message and "damaged" not in message


def test_what_is_in_a_file_without_weights_is_listed(tmp_path):
    message = refusal(saved(tmp_path, {"epoch": 3, "state_dict": {"a": torch.ones(1), "b": 1.0}, "model": torch.ones(1)}))
    for words in ("'epoch' (int)", "'state_dict' (a dict, in which 'b' is float)", "'model' (a tensor of type torch.float32)"):
        assert words in message


def test_batch_normalisation_without_counters_is_loaded_and_other_holes_are_not():
    source, target = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weights = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    assert checkpoint.load_weights(target, weights, "a.pth") == []
    assert torch.equal(target[0].weight, source[0].weight)
    del weights["1.running_mean"]
    with pytest.raises(UserError, match="it has no 1.running_mean .*; it has 5 of the 7 tensors"):
        checkpoint.load_weights(target, weights, "a.pth")
    two = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    weights = two.state_dict()
    del weights["1.num_batches_tracked"]   # torch writes all of them or none
    with pytest.raises(UserError, match="it has no 1.num_batches_tracked"):
        checkpoint.load_weights(two, weights, "a.pth")


def test_whole_numbers_in_place_of_weights_are_refused():
    with pytest.raises(UserError, match="bias is of type torch.int64, expected torch.float32"):
        checkpoint.load_weights(nn.Linear(3, 2), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2, dtype=torch.int64)}, "a")


# Weights of another program, evaluated and trained on here.

NETWORK = "--arch msdnet_ge --nBlocks 2 --base 1 --step 1 --nChannels 4".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train_cifar100.main(tiny.command(images, folder, "--epochs", "1")) == 0
    return folder


@pytest.fixture
def weights(run, tmp_path):
    """A file of the run's weights that says nothing of itself."""
    trained = checkpoint.load(run / "model_best.pth")["state_dict"]
    torch.save({"net": {f"module.{name}": tensor for name, tensor in trained.items()}, "epoch": 7},
               tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def evaluate(images, weights, *more):
    return eval_cifar100.main(["--dataset", "folder", "--data-root", str(images), "--evaluate-from", str(weights), *NETWORK,
                               "--device", "cpu", "--threads", "1", *more])


def test_weights_without_a_split_are_evaluated_under_a_budget_on_images_that_are_drawn(images, run, weights, capsys, caplog):
    assert evaluate(images, weights, "--evalmode", "dynamic", "--use-valid", "--seed", "3", "--valid_size", "8") == 0
    result = json.loads((weights.parent / "dynamic.json").read_text())
    labels = torch.arange(3).repeat_interleave(16)
    assert result["split_hash"] == Split.draw(labels, 8, seed=3).hash and result["n_valid"] == 8
    [warning] = [message for message in caplog.messages if "hold-out" in message]
    assert "drawn with seed 3" in warning and "may have been trained on them" in warning
    capsys.readouterr()
    assert evaluate(images, weights) == 0   # anytime needs none
    assert "epoch 7, 12 test images" in capsys.readouterr().out   # how that epoch was chosen, the file does not say
    assert json.loads((weights.parent / "anytime.json").read_text())["top1"] == json.loads(
        (run / "anytime.json").read_text())["top1"]
    capsys.readouterr()
    message = tiny.one_line_error(capsys, lambda: evaluate(images, weights, "--evalmode", "dynamic"))
    assert "let --use-valid draw" in message
    for mode in ("dynamic", "realtime"):   # a promise is not made on images that were drawn afterwards
        message = tiny.one_line_error(capsys, lambda mode=mode: evaluate(
            images, weights, "--evalmode", mode, "--use-valid", "--seed", "3", "--valid_size", "8", "--max_drop", "40"))
        assert "surely held out of training" in message
    message = tiny.one_line_error(capsys, lambda: evaluate(images, weights, "--evalmode", "dynamic", "--seed", "3"))
    assert "--seed has no effect without --use-valid" in message


def test_the_order_of_images_beside_the_weights_says_what_is_held_out(images, weights, capsys, caplog):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    torch.save(order, weights.parent / "index.pth")
    assert evaluate(images, weights, "--evalmode", "dynamic", "--use-valid", "--valid_size", "8") == 0
    result = json.loads((weights.parent / "dynamic.json").read_text())
    labels = torch.arange(3).repeat_interleave(16)
    assert result["split_hash"] == Split.from_permutation(labels, order, 8).hash
    assert "last 8 images of" in caplog.text and "index.pth" in caplog.text
    capsys.readouterr()
    message = tiny.one_line_error(capsys, lambda: evaluate(images, weights, "--max_drop", "40", "--use-valid", "--valid_size",
                                                           "8"))
    assert "surely held out of training" in message
    message = tiny.one_line_error(capsys, lambda: evaluate(images, weights, "--evalmode", "dynamic", "--use-valid"))
    assert "pass --use-valid --valid_size" in message
    torch.save(order[:40], weights.parent / "index.pth")
    message = tiny.one_line_error(capsys, lambda: evaluate(images, weights, "--evalmode", "dynamic", "--use-valid",
                                                           "--valid_size", "8"))
    assert "not one of the 48 training images" in message


def test_the_held_out_images_of_an_order_are_its_last():
    order = torch.tensor([3, 0, 4, 1, 2])
    assert Split.from_permutation(torch.zeros(5, dtype=torch.int64), order, 2).valid_index.tolist() == [1, 2]
    for wrong in (order[:4], order.float(), torch.tensor([0, 0, 1, 2, 3]), "no tensor"):
        with pytest.raises(UserError, match="not one of the 5 training images"):
            Split.from_permutation(torch.zeros(5, dtype=torch.int64), wrong, 2)


def test_an_order_of_the_archives_images_is_refused_for_class_folders_of_cifar(images):
    with pytest.raises(UserError, match="numbers the images as in the python archive of cifar10"):
        build_data(dataset="cifar10", data_root=images, order=torch.arange(48), valid_size=8, quiet=True)


def test_a_network_is_fine_tuned_to_other_classes(images, run, tmp_path, capsys):
    other = tiny.make_images(tmp_path / "other", classes=4)
    line = tiny.command(other, tmp_path / "run", "--checkpoint", str(run / "model_best.pth"), "--epochs", "1")
    assert "classifier.0.linear" in tiny.one_line_error(capsys, lambda: train_cifar100.main(line))
    line = tiny.command(other, tmp_path / "run2", "--checkpoint", str(run / "model_best.pth"), "--epochs", "1")
    assert train_cifar100.main([*line, "--new_classifier"]) == 0
    assert "--new_classifier: 4 tensors of the classifiers start anew" in capsys.readouterr().out   # weight, bias of two exits
    assert len(json.loads((tmp_path / "run2" / "anytime.json").read_text())["top1"]) == 2


def test_only_classifiers_start_anew():
    class Net(nn.Module):
        def __init__(self, n_classes: int) -> None:
            super().__init__()
            self.blocks, self.classifier = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, n_classes), nn.Linear(2, n_classes)])

    old, new = Net(3), Net(4)
    start = new.classifier[0].weight.clone()
    left = checkpoint.load_weights(new, old.state_dict(), "a.pth", new_classifier=True)
    assert left == [f"classifier.{n}.{name}" for n in range(2) for name in ("weight", "bias")]
    assert torch.equal(new.blocks.weight, old.blocks.weight) and torch.equal(new.classifier[0].weight, start)
    weights = old.state_dict()
    del weights["blocks.bias"]
    with pytest.raises(UserError, match="it has no blocks.bias"):
        checkpoint.load_weights(new, weights, "a.pth", new_classifier=True)


# Checkpoints as the released program of L2W-DEN writes them.

def l2w_den(folder: pathlib.Path, flags: list[str], *, prefix: str = "") -> tuple[pathlib.Path, nn.Module]:
    """A file of the released form with a new network, and that network."""
    args = parse_args(["--method", "l2w", *flags])
    args.num_classes = args.num_classes or 3
    torch.manual_seed(0)
    backbone = build_model(NetworkSpec.from_args(args)).backbone
    net = WeightNet(backbone.n_exits, backbone.n_exits, 500, 1)
    optimizer = torch.optim.SGD(backbone.parameters(), 0.8, momentum=0.9, weight_decay=1e-4)
    meta_optimizer = torch.optim.Adam(net.parameters(), 1e-4, weight_decay=1e-4)
    for parameter in backbone.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(()).expand_as(parameter)   # which takes no room in the file
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    meta_optimizer.step()
    torch.save({"epoch": 100, "arch": "msdnet", "state_dict": {prefix + k: v for k, v in backbone.state_dict().items()},
                "optimizer": optimizer.state_dict(), "best_prec1": 0.1, "is_best": np.True_,
                "meta_state_dict": net.state_dict(), "meta_optimizer": meta_optimizer.state_dict()},
               folder / "checkpoint.pth.tar")
    return folder / "checkpoint.pth.tar", backbone.eval()


def check_l2w_den(program, images: pathlib.Path, folder: pathlib.Path, flags: list[str], prefix: str, n_valid: int) -> dict:
    """Evaluate such a file with the flags of its network alone, in both modes, and compare with the network itself."""
    path, backbone = l2w_den(folder, flags, prefix=prefix)
    line = [*flags, "--data-root", str(images), "--evaluate-from", str(path), "--device", "cpu", "--threads", "1",
            "--batch-size", "4"]
    assert program.main(line) == 0
    assert program.main([*line, "--evalmode", "dynamic", "--use-valid", "--valid_size", str(n_valid), "--seed", "1"]) == 0
    anytime, dynamic = (json.loads((folder / f"{mode}.json").read_text()) for mode in ("anytime", "dynamic"))
    args = parse_args(flags)
    test = build_data(dataset=args.dataset, data_root=images, image_size=args.image_size, eval_batch_size=4, quiet=True).test()
    found = predict(BoostedNet(backbone, [0.0] * backbone.n_exits), test)
    assert anytime["top1"] == pytest.approx(found.top1) and anytime["epoch"] == 100
    for result in (anytime, dynamic):
        assert result["method"] == "l2w" and not any(result["temperatures"])
    assert dynamic["n_valid"] == n_valid and len(dynamic["points"]) == 40
    return anytime


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_l2w_den_tells_its_method(images, tmp_path, capsys, prefix):
    flags = "--dataset folder --arch msdnet --nBlocks 3 --stepmode lin_grow --step 1 --base 1 --nChannels 4".split()
    check_l2w_den(eval_cifar100, images, tmp_path, flags, prefix, n_valid=8)
    assert set(checkpoint.load(tmp_path / "checkpoint.pth.tar")) == {"state_dict", "epoch", "method"}
    line = [*flags, "--data-root", str(images), "--evaluate-from", str(tmp_path / "checkpoint.pth.tar"), "--device", "cpu"]
    capsys.readouterr()
    message = tiny.one_line_error(capsys, lambda: eval_cifar100.main([*line, "--method", "boost"]))
    assert "was trained with method l2w, but the command line says boost" in message


@pytest.mark.slow
@pytest.mark.parametrize(("step", "prefix"), [(4, ""), (6, "module."), (7, "")])
def test_checkpoints_of_l2w_den_on_imagenet_evaluate_with_their_architecture_flags(tmp_path, step, prefix):
    images = tiny.make_images(tmp_path / "images", classes=2, train=4, test=2, side=64)
    flags = (f"--dataset imagenet --workers 0 --val_workers 0 --arch msdnet --nBlocks 5 --stepmode even --step {step} "
             f"--base {step} --nChannels 32 --growthRate 16 --grFactor 1-2-4-4 --bnFactor 1-2-4-4").split()
    found = check_l2w_den(eval_imagenet, images, tmp_path, flags, prefix, n_valid=4)
    known = json.loads((pathlib.Path(__file__).parent / "data/macs.json").read_text())["configs"]
    assert found["macs"] == next(config["macs"] for config in known if config["name"] == f"msdnet_imagenet_step{step}")
