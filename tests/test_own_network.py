"""A person's own network through the programs: --arch FILE.py:FUNCTION, load_model(backbone=...), --freeze_backbone."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_chain import build
from tiny import command, differences, make_images, one_line_error, outcome, signal_at_step

import eval_cifar100
import train_cifar100
from adaptive_inference import exit_index
from args import parse_args
from models import MSDNet
from utils import export, plots, report
from utils.core.errors import STOPPED, UserError
from utils.data import glyphs
from utils.evaluation.fast_form import load_model
from utils.options.network import NetworkSpec, OwnNetwork
from utils.runs import checkpoint

FILE = Path(__file__).parent / "small_chain.py"
ARCH = f"{FILE}:build"
METHODS = {"boost": "", "joint": "--method joint --weight-decay 1e-4,1e-3",
           "l2w": "--method l2w --meta_net_hidden_size 8 --lr-type cosine",
           "boost_l2w": "--method boost_l2w --meta_net_hidden_size 8",
           "block_losses": "--method block_losses --overlap 2 --include_final",
           "boost_distill": "--method boost_distill --teacher {boost}/model_best.pth",
           "imta": "--method imta --checkpoint {joint}/model_best.pth"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def line(images: Path, folder: Path, *more: str, arch: str = ARCH) -> list[str]:
    """Flags of a run of two epochs; of the network nothing is said but the file."""
    flags = command(images, folder, *more)
    start, end = flags.index("--arch"), flags.index("--batch-size")
    return [*flags[:start], *flags[end:], "--arch", arch]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """Folders of uninterrupted runs, trained when first asked for."""
    folder, known = tmp_path_factory.mktemp("finished"), {}

    def run(method: str) -> Path:
        if method not in known:
            known[method] = folder / method
            flags = METHODS[method].format(**{name: run(name) for name in ("boost", "joint") if f"{{{name}}}" in METHODS[method]})
            assert train_cifar100.main(line(images, known[method], *flags.split())) == 0
        return known[method]

    return run


def evaluated(images: Path, run: Path, out: Path, *more: str, arch: str = ARCH) -> list[str]:
    return ["--data-root", str(images), "--evaluate-from", str(run / "model_best.pth"), "--result_dir", str(out),
            "--device", "cpu", "--threads", "1", "--arch", arch, *more]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_evaluates_it(images, finished, tmp_path, method):
    run = finished(method)
    assert eval_cifar100.main(evaluated(images, run, tmp_path, "--evalmode", "realtime")) == 0
    result = json.loads((tmp_path / "realtime.json").read_text())
    assert [point["n_differ"] - point["n_differ_by_rounding"] for point in result["points"]] == [0] * 5
    assert (result["arch"], result["method"], len(result["macs"])) == ("small_chain.py:build", method, 3)
    trained = json.loads((run / "results.json").read_text())
    assert trained["config"]["arch"] == "small_chain.py:build" and len(trained["test"]["top1"]) == 3
    if method == "joint":
        groups = checkpoint.load(run / "model_latest.pth")["training"]["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == pytest.approx([1e-4, 5.5e-4, 1e-3])


def test_a_method_that_makes_no_sense_says_why(images, finished, tmp_path, capsys):
    arch = f"{FILE}:without_pool"
    assert train_cifar100.main(line(images, tmp_path / "joint", "--method", "joint", "--epochs", "1", arch=arch)) == 0
    start = ["--method", "imta", "--checkpoint", str(tmp_path / "joint/model_best.pth")]
    mistake = one_line_error(capsys, lambda: train_cifar100.main(line(images, tmp_path / "imta", *start, arch=arch)))
    assert "Sequential has not the parts `pool` and `linear`" in mistake


@pytest.mark.parametrize("flags", ["", "--amp bf16 --channels_last", "--freeze_backbone",
                                   "--freeze_backbone --method boost_l2w --meta_net_hidden_size 8 --ema 0.5"])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(images, tmp_path, monkeypatch, flags):
    for name in ("whole", "stopped"):
        flags_of_run = line(images, tmp_path / name, *flags.split())
        if name == "whole":
            assert train_cifar100.main(flags_of_run) == 0
            continue
        with monkeypatch.context() as patch:
            signal_at_step(patch, 3)
            assert train_cifar100.main(flags_of_run) == STOPPED
        assert train_cifar100.main([*flags_of_run, "--resume"]) == 0
    assert not list(differences(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")))


@pytest.mark.parametrize("method", ["boost", "l2w", "boost_distill --teacher {joint}/model_best.pth"])
def test_freezing_trains_the_exits_only(images, finished, tmp_path, method):
    start = finished("joint")
    flags = f"--freeze_backbone --checkpoint {start}/model_best.pth --method {method.format(joint=start)}".split()
    assert train_cifar100.main(line(images, tmp_path, *flags)) == 0
    before, after = (checkpoint.load(folder / name)["state_dict"] for folder, name in ((start, "model_best.pth"),
                                                                                       (tmp_path, "model_latest.pth")))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier"}


# Where its code runs, and where it does not.

def test_a_checkpoint_runs_no_code_and_asks_for_the_file(images, finished, tmp_path, capsys):
    run = finished("boost")
    saved = checkpoint.load(run / "model_best.pth")
    assert saved["architecture"]["arch"] == "small_chain.py:build"
    assert saved["architecture"]["file_hash"] == OwnNetwork(ARCH).file_hash()
    without = evaluated(images, run, tmp_path)
    del without[without.index("--arch"):]
    asks = "small_chain.py:build; code runs only where its user names it: pass the file again, --arch FOLDER/small_chain.py:build"
    assert asks in one_line_error(capsys, lambda: eval_cifar100.main(without))
    with pytest.raises(UserError, match="code runs only where its user names it"):
        load_model(run / "model_best.pth")
    for other in ("msdnet_ge", f"{FILE}:without_pool"):
        mistake = one_line_error(capsys, lambda other=other: eval_cifar100.main(evaluated(images, run, tmp_path, arch=other)))
        assert "was trained with arch small_chain.py:build" in mistake
    resumed = line(images, run, "--resume", "--epochs", "3")
    assert "pass the file again" in one_line_error(capsys, lambda: train_cifar100.main(resumed[:-2]))


def test_a_file_that_has_changed_is_a_warning_in_evaluation_and_an_end_to_a_run(images, tmp_path, capsys):
    file = Path(shutil.copy(FILE, tmp_path))
    run = tmp_path / "run"
    assert train_cifar100.main(line(images, run, "--epochs", "1", arch=f"{file}:build")) == 0
    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    shutil.copy(file, moved)
    capsys.readouterr()
    assert eval_cifar100.main(evaluated(images, run, tmp_path, arch=f"{moved}:build")) == 0
    assert "has changed" not in capsys.readouterr().err
    moved.write_text(moved.read_text() + "\n# A comment.\n")
    assert eval_cifar100.main(evaluated(images, run, tmp_path, arch=f"{moved}:build")) == 0
    assert "has changed since" in capsys.readouterr().err
    again = line(images, run, "--resume", "--epochs", "2", arch=f"{moved}:build")
    assert "has changed since it began" in one_line_error(capsys, lambda: train_cifar100.main(again))
    again[-1] = f"{file}:build"
    assert train_cifar100.main(again) == 0


@pytest.mark.parametrize("text, message", [
    ("def build(num_classes, image_size):\n    return undefined\n", "line 2, NameError: name 'undefined' is not defined"),
    ("def build(num_classes, image_size):\n    return 1 +\n", "line 2, SyntaxError"),
    ("\0", ": SyntaxError: "),
    ("from small_chain import build as chain\n\ndef build(num_classes, image_size):\n"
     "    return chain(num_classes, image_size).double()\n", "in torch.float64; the programs compute in torch.float32"),
    ("import sys\nsys.exit('no')\n", "line 2, SystemExit: no"),
    ("def build(classes):\n    pass\n", "TypeError: build() got an unexpected keyword argument 'num_classes'"),
    ("def make():\n    pass\n", "has no function build"),
    ("from torch import nn\n\ndef build(num_classes, image_size):\n    return nn.Linear(1, 1)\n",
     "Linear has no n_exits, start, step"),
    ("import blocks\n\ndef build(num_classes, image_size):\n    return blocks.net(num_classes)\n", None),
    ("from models import ChainNet\nfrom torch import nn\n\nclass Stage(nn.Module):\n    def forward(self, x):\n"
     "        return x[:, 4]\n\ndef build(num_classes, image_size):\n    return ChainNet([Stage()], [Stage()])\n",
     "line 6, IndexError"),
])
def test_what_is_wrong_with_a_file_is_one_line_that_says_where(tmp_path, capsys, text, message):
    (tmp_path / "blocks.py").write_text("from small_chain import build\n\ndef net(classes):\n    return build(classes, 32)\n")
    file = tmp_path / "net.py"
    file.write_text(text)
    arguments = f"--dataset cifar100 --result_dir {tmp_path / 'run'} --arch {file}:build".split()
    if message is None:   # it finds what lies beside it
        assert train_cifar100.choose_network(parse_args(arguments)) is None
    else:
        mistake = one_line_error(capsys, lambda: train_cifar100.main(arguments))
        assert message in mistake and "--arch" in mistake
    assert not (tmp_path / "run" / "model_latest.pth").exists()


def test_a_file_that_is_missing_is_one_line(tmp_path, capsys):
    arguments = ["--result_dir", str(tmp_path / "run"), "--arch", "no.py:build"]
    mistake = one_line_error(capsys, lambda: train_cifar100.main(arguments))
    assert "--arch no.py:build: the file cannot be read: No such file" in mistake


def test_a_changed_entry_of_a_checkpoint_makes_no_network(finished):
    saved = checkpoint.load(finished("boost") / "model_best.pth")
    for change in ({"arch": "no network"}, {"file_hash": None}, {"arch": "resnet18"}, {"file_hash": 3}):
        with pytest.raises(UserError, match=f"its ({'|'.join(change)}|file_hash) makes no sense"):
            NetworkSpec.from_checkpoint({**saved, "architecture": {**saved["architecture"], **change}}, "file")


# What else takes it.

def test_a_program_loads_a_checkpoint_into_a_backbone_of_its_own(finished):
    path = finished("boost") / "model_best.pth"
    net = build(3, 32)
    model, saved = load_model(path, backbone=net)
    assert model.backbone is net and not model.training and list(model.temperatures) == saved["temperatures"]
    assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in net.state_dict().items())
    named, _ = load_model(path, arch=OwnNetwork(ARCH))
    x = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model(x), named.eval()(x)))
    with pytest.raises(UserError, match="with 3 exits; MSDNet has 2"):
        load_model(path, backbone=MSDNet(n_blocks=2))
    with pytest.raises(UserError, match="does not fit this architecture"):
        load_model(path, backbone=build(4, 32))
    frozen, _ = load_model(finished("imta") / "model_best.pth", backbone=build(3, 32))
    assert type(frozen.backbone).__name__ == "CollaborativeNet"


@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_plots_and_reports_take_it(images, finished, tmp_path, capsys, form):
    pytest.importorskip("onnxruntime" if form == "onnx" else "torch")
    run = Path(shutil.copytree(finished("boost"), tmp_path / "run"))
    runtime = ["--runtime", "onnx"] if form == "onnx" else []
    for more in (["--evalmode", "dynamic"], ["--evalmode", "realtime", *runtime],
                 ["--images", str(images / "test/class0"), *runtime]):
        arguments = evaluated(images, run, run, *more)
        if "--images" in more:
            del arguments[:2]
        assert eval_cifar100.main(arguments) == 0
    assert "pass the file again" in one_line_error(capsys, lambda: export.main([str(run), str(tmp_path / "out")]))
    assert export.main([str(run), str(tmp_path / "out"), "--format", form, "--arch", ARCH]) == 0
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["arch"] == "small_chain.py:build" and len(about["steps"]) == 3
    assert plots.main([str(run)]) == 0 and report.main([str(run)]) == 0
    assert "small_chain.py:build" in capsys.readouterr().out


def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """On fewer images than it says; its network is left at the exits that the simulation of all exits names."""
    code, = re.findall(r"```python\n(.*?)```", (FILE.parent.parent / "docs/own_network.md").read_text(), re.S)
    assert len(code.splitlines()) < 60
    monkeypatch.setattr(glyphs, "SIZES", {"train": 900, "test": 100})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("use_valid=True", "use_valid=True, valid_size=100"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[-1].startswith("100 images")
    with torch.inference_mode():
        scores = torch.stack(names["fast"](names["images"]))
    expected = exit_index(scores.softmax(dim=2).amax(dim=2).numpy(), np.asarray(names["thresholds"]))
    assert (names["exit"].numpy() != expected).sum() <= 1   # one whose confidence is its threshold, but for rounding
    assert torch.equal(names["prediction"], scores.argmax(dim=2)[names["exit"], torch.arange(100)])
    assert {*torch.load("net.pth")} == {*names["net"].state_dict()}
