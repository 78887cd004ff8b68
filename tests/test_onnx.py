"""ONNX programs: equal to PyTorch when they are written, and early exit on them to the simulation of the same programs."""
from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit, exit_index
from models import BoostedNet, MSDNet
from utils import export
from utils.core.errors import UserError
from utils.evaluation import confidence as policies
from utils.evaluation import onnx_exit, programs, runtime
from utils.evaluation.classify import read_images
from utils.evaluation.drift import ExitMonitor
from utils.evaluation.fast_form import load_model
from utils.evaluation.onnx_exit import OnnxEarlyExit, OnnxPrograms


@pytest.fixture(scope="module", params=["msdnet_ge", "ranet_ge", "imta"])
def run(request, tmp_path_factory):
    """A trained run with thresholds, and its ONNX programs in `programs`."""
    folder = tmp_path_factory.mktemp(request.param)
    images = tiny.make_images(folder / "images")
    command = tiny.ranet_command if request.param == "ranet_ge" else tiny.command
    method = "joint" if request.param == "imta" else "boost"
    assert train_cifar100.main(command(images, folder / "run", "--epochs", "1", "--method", method)) == 0
    if request.param == "imta":
        first = folder / "run" / "model_latest.pth"
        assert train_cifar100.main([*tiny.command(images, folder / "second", "--epochs", "1"), "--method", "imta",
                                    "--checkpoint", str(first)]) == 0
        (folder / "run").rename(folder / "first")
        (folder / "second").rename(folder / "run")
    assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(folder / "run" / "model_best.pth"), "--device",
                               "cpu", "--evalmode", "dynamic"]) == 0
    assert export.main([str(folder / "run"), str(folder / "programs"), "--format", "onnx"]) == 0
    return folder


def random_images(n):
    return np.random.default_rng(0).normal(size=(n, 3, 32, 32)).astype(np.float32)


def scores(loaded, images):
    return np.stack(list(loaded.scores(images)))


def test_programs_give_what_the_network_gives(run):
    model, _ = load_model(run / "run" / "model_best.pth")
    loaded = OnnxPrograms(run / "programs")
    for n in (1, 5):
        images = random_images(n)
        with torch.inference_mode():
            expected = torch.stack(model(torch.from_numpy(images))).numpy()
        assert np.abs(scores(loaded, images) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("measure", list(onnx_exit.MEASURES))
def test_early_exit_leaves_where_the_simulation_of_the_same_programs_says(run, measure):
    loaded = OnnxPrograms(run / "programs", threads=2)
    images = random_images(50)
    all_scores = scores(loaded, images)
    certainty = np.stack([onnx_exit.MEASURES[measure](onnx_exit.softmax(f)) for f in all_scores])
    thresholds = [*np.quantile(certainty, 0.5, axis=1)[:-1], -1.0]
    expected = exit_index(certainty, np.asarray(thresholds))
    early = OnnxEarlyExit(loaded, thresholds, measure=measure)
    for n in (0, 1, 7, 50):   # 50 rows go in slices
        found = early(images[:n])
        near = np.abs(certainty[found.exit, np.arange(n)] - np.asarray(thresholds)[found.exit]) <= 1e-6
        assert ((found.exit == expected[:n]) | near).all()
        assert (found.prediction == all_scores[found.exit, np.arange(n)].argmax(axis=1)).all()
        np.testing.assert_allclose(found.confidence, certainty[found.exit, np.arange(n)], atol=1e-5)
    assert len(set(found.exit.tolist())) > 1
    of_torch = policies.MEASURES[measure](torch.from_numpy(all_scores)).numpy()
    np.testing.assert_allclose(certainty, of_torch, atol=2e-6)


def test_limits_as_in_pytorch(run):
    loaded, images = OnnxPrograms(run / "programs"), random_images(4)
    model, _ = load_model(run / "run" / "model_best.pth")
    costs, nobody = loaded.header["macs"], [2.0] * loaded.n_exits
    early, reference = OnnxEarlyExit(loaded, nobody), EarlyExit(model, nobody, costs=costs)
    for limit in (0, costs[0], costs[1] - 1, costs[1], costs[-1]):
        expected = reference(torch.from_numpy(images), max_cost=limit)
        assert early(images, max_cost=limit).exit.tolist() == expected.exit.tolist()
    assert early(images, deadline_ms=0).exit.tolist() == [0] * 4
    assert early(images, deadline_ms=1e6).exit.tolist() == [loaded.n_exits - 1] * 4
    for limits in ({"max_cost": float("nan")}, {"deadline_ms": -1}):
        with pytest.raises(UserError, match="from 0 on"):
            early(images, **limits)
    with pytest.raises(UserError, match="3, 32, 32"):
        early(images[:, :, :16])


def test_a_confidence_equal_to_the_threshold_leaves(run):
    loaded, images = OnnxPrograms(run / "programs"), random_images(6)
    first = onnx_exit.confidence(onnx_exit.softmax(next(loaded.scores(images))))
    exits = OnnxEarlyExit(loaded, [first[2], *[2.0] * (loaded.n_exits - 1)])(images).exit
    assert (exits == 0).tolist() == (first >= first[2]).tolist()
    above = np.nextafter(np.float64(first[2]), 1)
    assert OnnxEarlyExit(loaded, [above, *[2.0] * (loaded.n_exits - 1)])(images[2:3]).exit[0] > 0


def test_model_json_says_what_wrote_it(run):
    about = json.loads((run / "programs" / "model.json").read_text())
    assert about["format"] == 2 and about["runtime"] == "onnx" and about["opset"] == programs.OPSET
    assert set(about["versions"]) == {"torch", "onnx", "onnxscript", "onnxruntime"}
    assert about["steps"] == [f"step{n}.onnx" for n in range(len(about["macs"]))]


def test_an_onnx_program_unlike_the_network_is_refused(tmp_path, monkeypatch):
    model = BoostedNet(MSDNet(n_blocks=2, base=1, n_channels=4, growth_rate=2), [0.5] * 2)
    monkeypatch.setattr(programs, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from PyTorch"):
        list(programs.write_programs(model, 32, tmp_path, "onnx"))
    assert not list(tmp_path.iterdir())


def test_outputs_without_names_and_a_folder_beside_the_programs_are_left_in_peace(tmp_path):
    """Weights of another program say nothing of their classes."""
    model = BoostedNet(MSDNet(n_blocks=1, base=1, n_channels=4, growth_rate=2, num_classes=3), [0.5])
    saved = {"architecture": {"arch": "msdnet", "image_size": 32, "num_classes": 3}, "method": "boost", "dataset": "cifar100"}
    mine = tmp_path / "programs.partial" / "mine"
    mine.parent.mkdir()
    mine.touch()
    list(programs.write_folder(model, saved, [], tmp_path / "programs", "torch"))
    about = json.loads((tmp_path / "programs" / "model.json").read_text())
    assert about["class_names"] == ["class 0", "class 1", "class 2"]
    assert mine.exists() and len(list(tmp_path.iterdir())) == 2


def test_folders_that_are_no_onnx_programs(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no exported network.*No such file"):
        OnnxPrograms(tmp_path)
    about = json.loads((run / "programs" / "model.json").read_text())
    for change, message in (({"format": 3}, "format 3"), ({"runtime": "torch"}, "--format onnx")):
        (tmp_path / "model.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            OnnxPrograms(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="no such file"):
        OnnxPrograms(tmp_path)
    for content in ("[", "{}", json.dumps({name: value for name, value in about.items() if name != "steps"})):
        (tmp_path / "model.json").write_text(content)
        with pytest.raises(UserError, match="model.json is damaged"):
            OnnxPrograms(tmp_path)
    import onnxruntime
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(UserError, match="too old"):
        OnnxPrograms(run / "programs")


def test_without_onnx_one_line(run, tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        export.main([str(run / "run"), str(tmp_path / "out"), "--format", "onnx"])
    assert stop.value.code == 2
    assert "pip install -r requirements-onnx.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_the_pages_loader_needs_neither_pytorch_nor_this_repository(run, tmp_path):
    page = (Path(__file__).parent.parent / "docs/deployment.md").read_text()
    code, = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in block)
    loader = tmp_path / "classify.py"
    # A module of that name which cannot be imported stands for an environment without PyTorch.
    (tmp_path / "torch.py").write_text("raise ImportError('there is no PyTorch here')")
    loader.write_text(code)
    files = sorted((run / "images" / "test").rglob("*.png"))[:6]
    done = subprocess.run([sys.executable, str(loader), str(run / "programs"), *map(str, files)], capture_output=True, text=True,
                          cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = OnnxPrograms(run / "programs")
    about = loaded.header
    images = read_images([str(file) for file in files], "folder", 32).numpy()
    thresholds = about["budgets"][len(about["budgets"]) // 2]["thresholds"]
    expected = OnnxEarlyExit(loaded, thresholds)(images)
    rows = [f"{file} {about['class_names'][name]} {100 * confidence:.1f} %, exit {exit_ + 1}"
            for file, name, confidence, exit_ in zip(files, *expected)]
    assert done.stdout.splitlines() == rows


def evaluate(run, *flags):
    return eval_cifar100.main(["--data-root", str(run / "images"), "--evaluate-from", str(run / "run" / "model_best.pth"),
                               "--device", "cpu", *map(str, flags)])


def test_realtime_on_onnx_is_the_simulation_of_the_programs(run, tmp_path, capsys):
    """In one process of its own would be the usual way: here the sessions get a thread each, as in another program."""
    assert evaluate(run, "--evalmode", "realtime", "--runtime", "onnx", "--result_dir", tmp_path) == 0
    result = json.loads((tmp_path / "realtime.json").read_text())
    assert result["runtime"] == "onnx" and len(result["points"]) == 5
    for point in result["points"]:
        assert point["n_differ"] == point["n_differ_by_rounding"]
        assert point["top1"] == pytest.approx(point["simulated_top1"], abs=100 * point["n_differ"] / result["n_test"] + 1e-9)
    folder, = (run / "run").glob("onnx_*")
    written = (folder / "model.json").stat().st_mtime_ns
    assert "once" in capsys.readouterr().out
    assert evaluate(run, "--evalmode", "realtime", "--runtime", "onnx", "--result_dir", tmp_path, "--budget",
                    result["points"][2]["budget"], "--predictions", tmp_path / "all.csv") == 0
    assert (folder / "model.json").stat().st_mtime_ns == written   # not exported again
    header, *rows = csv.reader((tmp_path / "all.csv").read_text().splitlines())
    assert header == ["image", "class", "confidence", "exit", "macs"] and len(rows) == result["n_test"]
    exits = np.bincount([int(row[3]) - 1 for row in rows], minlength=len(result["macs"])) / len(rows)
    again = json.loads((tmp_path / "realtime.json").read_text())["points"][0]
    assert exits == pytest.approx(again["exit_share"]) and {row[1] for row in rows} <= {"class0", "class1", "class2"}
    assert all(int(row[4]) == result["macs"][int(row[3]) - 1] for row in rows)


def test_programs_for_other_temperatures_have_another_folder(tmp_path, monkeypatch):
    """Also where only their order or their number differs."""
    monkeypatch.setattr(runtime, "use_all_cores", lambda threads: None)
    monkeypatch.setattr(runtime, "write_folder", lambda *_: [])
    monkeypatch.setattr(runtime, "OnnxPrograms", lambda folder: SimpleNamespace(n_exits=3, folder=folder))
    net = MSDNet(n_blocks=3, n_channels=4, base=1)
    found = [runtime.open_runtime("onnx", BoostedNet(net, t), {"state_dict": net.state_dict()}, tmp_path).programs.folder.name
             for t in ([0.5, 0.5, 0.5], [0.5, 0.3, 0.5], [0.5, 0.5, 0.3], [0.5, 0.3, 0.3], [0.5, 0.3, 0.1], [0.3, 0.3, 0.3])]
    assert len(set(found)) == 6 and found[0].endswith("_boostednet_0.5")


def test_images_give_the_same_on_both_runtimes(run, tmp_path):
    folder = run / "images" / "test" / "class1"
    for name in ("torch", "onnx"):
        assert evaluate(run, "--images", folder, "--runtime", name, "--predictions", tmp_path / f"{name}.csv") == 0
    rows = {name: list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines())) for name in ("torch", "onnx")}
    assert [row[0] for row in rows["onnx"][1:]] == [str(path) for path in sorted(folder.iterdir())]
    for one, other in zip(rows["torch"][1:], rows["onnx"][1:], strict=True):
        assert (one[:2], one[3:]) == (other[:2], other[3:]) and float(one[2]) == pytest.approx(float(other[2]), abs=1e-4)


def test_mistakes_with_runtime_and_predictions(run, tmp_path, capsys):
    def refused(*flags):
        return tiny.one_line_error(capsys, lambda: evaluate(run, *flags))

    assert "--evalmode anytime" in refused("--runtime", "onnx")
    assert "only with realtime or --images" in refused("--runtime", "onnx", "--evalmode", "dynamic")
    assert "give one --budget" in refused("--evalmode", "realtime", "--predictions", tmp_path / "x.csv")
    (tmp_path / "file").touch()
    for flags in (("--evalmode", "realtime", "--max_drop", "1"), ("--images", next(run.glob("images/test/*/*.png")))):
        assert "--predictions" in refused(*flags, "--predictions", tmp_path / "file" / "x.csv")   # before anything is computed
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "mine.csv").write_text("image,label\na.png,cat\n")
    for name in ("folder.csv", "mine.csv"):   # whatever else is wrong
        for flags in (("--images", "nothing.png"), ("--evalmode", "realtime", "--budget", "1")):
            assert f"--predictions {tmp_path / name}" in refused(*flags, "--predictions", tmp_path / name)
    assert (tmp_path / "mine.csv").read_text() == "image,label\na.png,cat\n"
    assert "trained with image_size 32" in refused("--image_size", "64")
    assert "without image files" in refused("--images", run / "images")
    assert "is no file" in refused("--images", tmp_path / "nothing.png")


def test_exits_are_counted_as_in_pytorch_in_slices_too(run):
    loaded, images = OnnxPrograms(run / "programs", threads=2), random_images(50)
    i = len(loaded.header["budgets"]) // 2
    thresholds = loaded.header["budgets"][i]["thresholds"]
    early = OnnxEarlyExit(loaded, thresholds, monitor=ExitMonitor.of_export(loaded.header, i))
    with pytest.raises(UserError, match="nothing was counted"):
        OnnxEarlyExit(loaded, thresholds).summary()
    exits = np.concatenate([early(images).exit, early(images, max_cost=loaded.header["macs"][0]).exit])
    found = early.summary()
    assert found.n_images == 100 and found.thresholds == "geometric"
    assert found.exit_share == pytest.approx(np.bincount(exits, minlength=loaded.n_exits) / 100)
    curve = json.loads((run / "run" / "dynamic.json").read_text())
    assert found.held_out_share == curve["points"][i]["valid_exit_share"]
    assert found.held_out_cost == pytest.approx(curve["points"][i]["valid_mean_macs"])
    assert sum(early.monitor._ended) == 50 + np.count_nonzero(exits[:50] == loaded.n_exits - 1)
    with pytest.raises(ValueError, match="export the network again"):
        ExitMonitor.of_export({**loaded.header, "hold_out": None}, i)
