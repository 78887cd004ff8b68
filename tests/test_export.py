"""Exported programs give what the network gives, through the loader that docs/deployment.md shows."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit
from utils import export
from utils.evaluation.fast_form import load_model
from utils.evaluation.programs import export_steps

PAGE = (Path(__file__).parent.parent / "docs/deployment.md").read_text()


@pytest.fixture(scope="module", params=["msdnet_ge", "ranet_ge"])
def run(request, tmp_path_factory):
    """A trained run with thresholds, and its exported programs."""
    folder = tmp_path_factory.mktemp(request.param)
    images = tiny.make_images(folder / "images")
    command = tiny.ranet_command if request.param == "ranet_ge" else tiny.command
    assert train_cifar100.main(command(images, folder / "run", "--epochs", "1")) == 0
    assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(folder / "run" / "model_best.pth"), "--device",
                               "cpu", "--evalmode", "dynamic"]) == 0
    assert export.main([str(folder / "run"), str(folder / "programs")]) == 0
    return folder


def loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Names of the page's loader after it has run on a folder of programs; it must not import from this repository."""
    code, = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "torch.export.load" in block)
    assert len(code.strip().splitlines()) <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) <= {"json", "sys", "pathlib", "torch"}
    monkeypatch.setattr(sys, "argv", ["classify.py", str(folder)])
    names: dict = {}
    exec(code, names)
    return names


def test_the_readmes_loader_gives_what_early_exit_gives(run, monkeypatch):
    names = loader(run / "programs", monkeypatch)
    model, _ = load_model(run / "run" / "model_best.pth")
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = names["normalise"](pixels)
    with torch.inference_mode():
        confidence = torch.stack(model(images)).softmax(dim=2).amax(dim=2)
    thresholds = confidence.quantile(0.5, dim=1).tolist()[:-1] + [-1.0]
    for n in (0, 1, 2, 7, 40):
        classes, confidences, exits = names["classify"](images[:n], thresholds)
        expected = EarlyExit(model, thresholds)(images[:n])
        assert torch.equal(classes, expected.prediction) and torch.equal(exits, expected.exit)
        assert torch.allclose(confidences, expected.confidence, atol=1e-5)
    assert len(set(exits.tolist())) > 1


def test_the_json_has_what_a_user_of_the_programs_needs(run):
    about = json.loads((run / "programs" / "model.json").read_text())
    curve = json.loads((run / "run" / "dynamic.json").read_text())
    assert about["class_names"] == ["class0", "class1", "class2"]
    assert about["macs"] == curve["macs"] and about["temperatures"] == curve["temperatures"]
    assert [b["thresholds"] for b in about["budgets"]] == [point["thresholds"] for point in curve["points"]]
    assert about["image_size"] == 32 and len(about["mean"]) == len(about["std"]) == 3
    assert sorted(p.name for p in (run / "programs").glob("*.pt2")) == about["steps"]


def test_a_program_holds_only_the_weights_of_its_own_exit(run):
    model, _ = load_model(run / "run" / "model_best.pth")
    whole = sum(p.numel() for p in model.parameters())
    steps = list(export_steps(model, 32))
    sizes = [sum(p.numel() for p in step.program.state_dict.values()) for step in steps]
    assert max(sizes) < whole and sum(sizes) == pytest.approx(whole, rel=0.02)   # folded: no batch-norm weights, but biases


def test_programs_hold_nothing_of_what_is_for_gradients_alone(run):
    model, _ = load_model(run / "run" / "model_best.pth")
    for step in export_steps(model, 32):
        assert not [node.target for node in step.program.graph.nodes if "view_as" in str(node.target)]


def test_mistakes_end_with_one_line(run, tmp_path, capsys):
    def refused(*line: object) -> str:
        return tiny.one_line_error(capsys, lambda: export.main([str(word) for word in line]))

    assert "exists already" in refused(run / "run", run / "programs")
    assert "no such checkpoint" in refused(tmp_path / "nothing", tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_best.pth").write_bytes((run / "run" / "model_best.pth").read_bytes())
    assert "--evalmode dynamic" in refused(other, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_ends_with_one_line(run, tmp_path, capsys):
    with tiny.files_no_larger_than(10_000):
        message = tiny.one_line_error(capsys, lambda: export.main([str(run / "run"), str(tmp_path / "out")]), code=1)
    assert "step0.pt2: cannot be written" in message
