"""Evaluation that really stops, through the entry points: --evalmode realtime, budgets in milliseconds, --images."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from utils.data.batches import Batches
from utils.data.sampling import plan_evaluation
from utils.evaluation import drift, operating_points, programs, realtime
from utils.evaluation.early_exit import Exits
from utils.evaluation.fast_form import load_model
from utils.evaluation.runtime import TorchRuntime
from utils.runs import checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images", test=20)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "boost"
    assert train_cifar100.main(tiny.command(images, folder, "--valid_size", "20")) == 0
    return folder


def evaluate(images, run, *more):
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / "model_best.pth"), "--device", "cpu",
                               "--threads", "1", *map(str, more)])


def test_real_time_says_what_the_simulation_says_and_how_long_it_took(images, run, capsys):
    assert evaluate(images, run, "--evalmode", "realtime") == 0
    printed = capsys.readouterr().out
    result = json.loads((run / "realtime.json").read_text())
    assert len(result["points"]) == 5 and result["cost"] == "macs"
    for point in result["points"]:
        assert point["n_differ"] == point["n_differ_by_rounding"]
        assert point["top1"] == pytest.approx(point["simulated_top1"], abs=100 / 60 * point["n_differ"] + 1e-9)
        assert sum(point["exit_share"]) == pytest.approx(1)
        assert point["mean_macs"] == pytest.approx(np.dot(point["exit_share"], result["macs"]))
        assert point["ms_per_image"] == pytest.approx(1e3 * point["seconds"] / 60)
    assert all(word in printed for word in ("top-1", "simulated", "wall s", "exits, %", "of 300 answers differ"))


def test_a_budget_of_macs_in_real_time_spends_what_the_simulated_one_spends(images, run):
    macs = json.loads((run / "results.json").read_text())["test"]["macs"]
    budget = round((macs[0] + macs[1]) / 2)
    assert evaluate(images, run, "--evalmode", "realtime", "--budget", budget) == 0
    assert evaluate(images, run, "--evalmode", "dynamic", "--budget", budget) == 0
    real, = json.loads((run / "realtime.json").read_text())["points"]
    simulated, = json.loads((run / "dynamic.json").read_text())["points"]
    assert real["thresholds"] == pytest.approx(simulated["thresholds"], abs=1e-5)
    assert real["mean_macs"] == pytest.approx(simulated["test_mean_macs"])
    assert real["top1"] == pytest.approx(simulated["test_top1"])


def test_a_budget_in_milliseconds_is_solved_with_measured_costs(images, run, monkeypatch, capsys):
    monkeypatch.setattr(realtime, "measure_latency", lambda model, images: np.array([2.0, 6.0]))
    assert evaluate(images, run, "--budget", "4ms") == 0
    result = json.loads((run / "realtime.json").read_text())
    point, = result["points"]
    assert result["cost"] == "latency" and result["latency_ms"] == [2.0, 6.0]
    assert point["budget"] == 4.0 and point["valid_mean_cost"] == pytest.approx(4.0, abs=0.11)   # 20 images held out
    assert point["predicted_ms"] == pytest.approx(np.dot(point["exit_share"], [2, 6]))
    assert "budget, ms" in capsys.readouterr().out


def test_measured_latency_rises_from_exit_to_exit(run):
    model, _ = load_model(run / "model_best.pth")
    latency = realtime.measure_latency(TorchRuntime(model), torch.randn(8, 3, 32, 32))
    assert latency.shape == (2,) and 0 < latency[0] < latency[1] < 1000


def test_latency_is_the_sum_of_median_steps_in_milliseconds_per_image():
    passes = iter([[9.0, 9.0], *([0.008, 0.016],) * 3, *([0.016, 0.048],) * 2, [0.08, 8.0], [0.004, 0.0]])   # the first warms up
    # For 8 images the medians are 8 and 16 ms.
    stub = SimpleNamespace(exit_times=lambda images: next(passes))
    assert realtime.measure_latency(stub, torch.zeros(8, 3, 2, 2)).tolist() == pytest.approx([1.0, 3.0])
    assert not list(passes)


def test_nothing_is_read_while_early_exit_is_timed(monkeypatch):
    """Processes that decode the next images take from the time of these."""
    reading, seen = [], []

    def read(plan):
        reading.append(True)
        for part in plan.index.split(plan.sizes):
            yield torch.zeros(len(part), 3, 32, 32), part
        reading.pop()

    def runner(images):
        assert not reading
        return Exits(torch.arange(len(images)), torch.ones(len(images)), torch.zeros(len(images), dtype=torch.int64))

    monkeypatch.setattr(realtime, "PART_BYTES", 2 * 4 * 3 * 32 * 32 * 4)   # two batches of four
    batches = Batches(plan_evaluation(torch.arange(18), batch_size=4), read)
    passes = realtime._classify([runner, lambda images: seen.append(len(images)) or runner(images)], batches, 32)
    assert [len(result.exits_of_all().exit) for result in passes] == [18, 18] and all(result.seconds > 0 for result in passes)
    assert torch.cat(passes[0].correct).tolist() == [True] * 4 + [False] * 14   # in the order of the test set
    assert seen == [4, 4, 4] * 2 + [2, 2]   # the first batch of a part twice


def test_a_budget_in_milliseconds_out_of_range_names_the_range(images, run, monkeypatch, capsys):
    monkeypatch.setattr(realtime, "measure_latency", lambda model, images: np.array([2.0, 6.0]))
    message = tiny.one_line_error(capsys, lambda: evaluate(images, run, "--budget", "1ms"))
    assert "spends 2 to 6 ms per image" in message


def test_a_persons_own_files_are_classified_with_the_thresholds_of_the_run(images, run, tmp_path, capsys):
    from PIL import Image

    assert evaluate(images, run, "--evalmode", "dynamic") == 0
    capsys.readouterr()
    mine = [images / "test" / "class2" / "0.png", tmp_path / "wide.jpg"]
    Image.new("L", (200, 90), 120).save(mine[1])
    # Without the data: thresholds were left by the evaluation before.
    assert eval_cifar100.main(["--data-root", str(tmp_path / "nowhere"), "--evaluate-from", str(run / "model_best.pth"),
                               "--device", "cpu", "--images", *map(str, mine)]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, path in zip(lines, mine):
        file, name, confidence, exit_, macs = line.split()
        assert file == str(path) and name in ("class0", "class1", "class2")
        assert 100 / 3 <= float(confidence) <= 100 and exit_ in "12" and float(macs) > 0


def test_images_are_fitted_to_a_budget_that_no_evaluation_has_left(images, run, tmp_path, capsys):
    macs = json.loads((run / "results.json").read_text())["test"]["macs"]
    file = images / "test" / "class0" / "0.png"
    assert evaluate(images, run, "--images", file, "--budget", macs[0], "--result_dir", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[-2] == "1"   # a budget of the first exit alone


def test_a_budget_between_two_stored_ones_takes_the_lower_and_opens_no_data_set(images, run, tmp_path, capsys):
    macs = json.loads((run / "results.json").read_text())["test"]["macs"]
    low, high = (macs[0] + share * (macs[1] - macs[0]) for share in (0.25, 0.75))
    assert evaluate(images, run, "--evalmode", "dynamic", "--budget", f"{low},{high}", "--result_dir", tmp_path) == 0
    points = json.loads((tmp_path / "dynamic.json").read_text())["points"]
    assert [operating_points.choose(points, macs, budget) for budget in (low - 1, low, (low + high) / 2, high, macs[1])] == [
        None, points[0], points[0], points[1], points[1]]
    capsys.readouterr()
    assert eval_cifar100.main(["--data-root", str(tmp_path / "nowhere"), "--evaluate-from", str(run / "model_best.pth"),
                               "--device", "cpu", "--result_dir", str(tmp_path), "--budget", f"{(low + high) / 2}",
                               "--images", str(images / "test" / "class0" / "0.png")]) == 0
    assert (f"Stored thresholds for {low / 1e6:.2f} x 10^6 MACs on average, the largest stored budget not above "
            f"{(low + high) / 2e6:.2f};") in capsys.readouterr().out


def test_files_of_another_kind_than_the_hold_out_get_a_warning(images, run, tmp_path, monkeypatch):
    assert evaluate(images, run, "--evalmode", "dynamic", "--result_dir", tmp_path) == 0
    curve, warnings = json.loads((tmp_path / "dynamic.json").read_text()), []
    monkeypatch.setattr(drift.logger, "warning", lambda message, *values: warnings.append(message % values))
    for thresholds, warned in (([-1.0, -1.0], 0), ([2.0, -1.0], 1)):   # of the hold-out 95 % left at the first exit
        points = [{**point, "thresholds": thresholds, "valid_exit_share": [0.95, 0.05]} for point in curve["points"]]
        (tmp_path / "dynamic.json").write_text(json.dumps({**curve, "n_valid": 5000, "points": points}))
        assert evaluate(images, run, "--result_dir", tmp_path, "--images", *sorted(map(str, images.glob("test/*/*.png")))) == 0
        assert len(warnings) == warned
    assert "60 images leave at other exits than the held-out ones, beyond chance" in warnings[0]


def test_outputs_without_a_class_folder_have_numbers(images, run, tmp_path, capsys):
    """A hundred folders of ImageNet, and a network with its thousand outputs."""
    saved = checkpoint.load(run / "model_best.pth")
    checkpoint.save(tmp_path / "model_best.pth", {**saved, "class_names": ["the first"]})
    assert evaluate(images, run, "--evalmode", "dynamic", "--result_dir", tmp_path) == 0
    capsys.readouterr()
    files = sorted(map(str, images.glob("test/*/*.png")))
    assert evaluate(images, tmp_path, "--images", *files) == 0
    printed = capsys.readouterr().out
    assert "class 1" in printed or "class 2" in printed
    model, saved = load_model(tmp_path / "model_best.pth")
    assert programs.describe(model, saved, [], [], "torch")["class_names"] == ["the first", "class 1", "class 2"]


def test_mistakes_with_images_end_with_one_line(images, run, tmp_path, capsys):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes((images / "test" / "class0" / "0.png").read_bytes()[:-100])
    for path, words in ((text, "cannot be read as an image: it is of no image format that Pillow knows"),
                        (cut, "cannot be read as an image: "), (tmp_path / "missing.png", "is no file; --images takes"),
                        (images / "test", "is a folder without image files"), ("https://a.b/c.png", "is no file"),
                        ("", "is no file")):
        message = tiny.one_line_error(capsys, lambda path=path: evaluate(images, run, "--images", path))
        assert f"error: {path or repr(path)} {words}" in message and "<" not in message
    file = images / "test" / "class0" / "0.png"
    assert "out of range" in tiny.one_line_error(capsys, lambda: evaluate(images, run, "--images", file, "--budget", 1))


def test_thresholds_of_another_checkpoint_are_not_used(images, run, tmp_path, capsys):
    """The file beside it is of another epoch: without data there is nothing to fit on, and the program says so."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "model_best.pth").write_bytes((run / "model_best.pth").read_bytes())
    assert evaluate(images, folder, "--evalmode", "dynamic") == 0
    curve = json.loads((folder / "dynamic.json").read_text())
    (folder / "dynamic.json").write_text(json.dumps({**curve, "epoch": 99}))
    capsys.readouterr()
    message = tiny.one_line_error(capsys, lambda: eval_cifar100.main([
        "--data-root", str(tmp_path / "nowhere"), "--evaluate-from", str(folder / "model_best.pth"), "--device", "cpu",
        "--images", str(images / "test" / "class0" / "0.png")]))
    assert "nowhere" in message


def test_thresholds_of_other_weights_are_not_taken(tmp_path):
    weights = {"w": torch.zeros(2)}
    curve = {"epoch": 1, "family": "eq9", "flat": False, "temperatures": [0.5, 0.5], "ensemble": None, "policy": "confidence",
             "method": "boost", "config": {}, "split_hash": None, "macs": [1, 2],
             "weights_hash": checkpoint.hash_weights(weights),
             "points": [{"budget": 1.5, "test_top1": 50.0, "thresholds": [0.5, -1.0]}]}
    (tmp_path / "dynamic.json").write_text(json.dumps(curve))
    saved = {"epoch": 1, "temperatures": [0.5, 0.5], "method": "boost", "architecture": {}, "split": None, "state_dict": weights}
    assert operating_points.stored_curve(tmp_path, saved)["points"] == curve["points"]
    assert operating_points.stored_curve(tmp_path, {**saved, "state_dict": {"w": torch.ones(2)}}) is None
