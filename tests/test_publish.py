"""What is published of a network is small, whole, and draws its curves without the network."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command, make_images, one_line_error

import eval_cifar100
import train_cifar100
from adaptive_inference import evaluate_thresholds
from utils.evaluation import operating_points
from utils.evaluation import published as publish
from utils.plots import main as plots
from utils.publish import main as publish_again
from utils.runs import checkpoint

PUBLISHED = Path(__file__).parent.parent / "published"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "boost"
    assert train_cifar100.main(command(images, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def published(images, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "boost"
    for mode, name in (("anytime", checkpoint.LATEST), ("dynamic", checkpoint.BEST)):
        assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / name), "--device", "cpu",
                                   "--publish", str(folder), "--evalmode", mode]) == 0
    return folder


def test_everything_lies_in_one_folder_and_can_be_drawn(published, run, images):
    assert {path.name for path in published.iterdir()} == {
        "model_anytime.pth", "model_dynamic.pth", "arrays_anytime.npz", "arrays_dynamic.npz", "anytime.json", "dynamic.json",
        "dynamic_released.json", "results.json"}
    results, original = (json.loads((folder / "results.json").read_text()) for folder in (published, run))
    assert results["config"].pop("result_dir") == "boost" and results["config"].pop("data_root") == images.name
    original["config"] = {name: value for name, value in original["config"].items() if name not in ("result_dir", "data_root")}
    assert results == original
    assert plots([str(published), "--output", str(published.parent)]) == 0


def test_kernels_are_in_half_precision_and_nothing_is_left_of_training(published, run):
    full, half = checkpoint.load(run / checkpoint.LATEST), checkpoint.load(published / "model_anytime.pth")
    assert "training" not in half and half["epoch"] == full["epoch"] and half["split"]["hash"] == full["split"]["hash"]
    for name, tensor in half["state_dict"].items():
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else full["state_dict"][name].dtype), name
        assert torch.allclose(tensor.float(), full["state_dict"][name].float(), rtol=1e-3, atol=1e-4)


def test_published_figures_are_those_of_the_half_precision_file(images, published, tmp_path):
    assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(published / "model_anytime.pth"),
                               "--result_dir", str(tmp_path), "--device", "cpu"]) == 0
    again, stated = (json.loads((folder / "anytime.json").read_text()) for folder in (tmp_path, published))
    assert again["top1"] == stated["top1"] and again["top5"] == stated["top5"]
    assert stated["precision"] == "half" and len(stated["top1_float32"]) == 2


def test_curves_come_back_from_the_arrays_alone(published, tmp_path, capsys):
    names = ("anytime.json", "dynamic.json", "dynamic_released.json")
    for name in ("arrays_anytime.npz", "arrays_dynamic.npz"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    capsys.readouterr()
    assert publish_again([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("warning: ")] == [str(tmp_path / name) for name in names]
    assert any("thresholds from 8 held-out images do not meet these budgets" in line for line in lines)
    for name in names:
        assert (tmp_path / name).read_bytes() == (published / name).read_bytes()
    assert len(json.loads((tmp_path / "dynamic.json").read_text())["points"]) == 40


def test_arrays_hold_confidences_and_one_bit_for_each_answer(published):
    about, parts = publish.load_arrays(published / "arrays_dynamic.npz")
    assert about["n_test"] == 12 and parts["test"].confidence.shape == (2, 12) and parts["valid"].correct.shape == (2, 8)
    assert about["confidence_type"] == "float32"
    assert (published / "arrays_dynamic.npz").stat().st_size < 4000


def test_a_published_curve_is_that_of_the_published_weights(images, published, tmp_path):
    """Point by point, thresholds included: nothing was rounded on the way into the arrays."""
    assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(published / "model_dynamic.pth"),
                               "--evalmode", "dynamic", "--result_dir", str(tmp_path), "--device", "cpu"]) == 0
    again, stated = (json.loads((folder / "dynamic.json").read_text()) for folder in (tmp_path, published))
    assert again["points"] == stated["points"]


def confident(n: int, seed: int) -> publish.Arrays:
    """What a network of three exits says that is sure of nearly all: a fifth to a third is within 2^-12 of 1."""
    doubt = 10 ** np.random.default_rng(seed).uniform([[-4.5], [-5], [-6]], -0.5, (3, n))
    return publish.Arrays((1 - doubt).astype(np.float32), np.random.default_rng(seed + 1).random((3, n)) > doubt)


ABOUT = {"format": 1, "macs": [10, 40, 100], "top5": [1.0, 1.0, 1.0], "precision": "half"}


def test_thresholds_of_a_network_that_is_sure_of_itself_survive(tmp_path, capsys):
    valid, test = confident(5000, 0), confident(10000, 2)
    assert 0.15 < (test.confidence > 1 - 2**-12).mean() < 0.4
    publish.save_arrays(tmp_path / "arrays_dynamic.npz", {**ABOUT, "confidence_type": "float32"}, {"valid": valid, "test": test})
    assert publish_again([str(tmp_path)]) == 0
    assert "warning" not in (printed := capsys.readouterr().out) and "note" not in printed
    curve = json.loads((tmp_path / "dynamic.json").read_text())
    for point in curve["points"]:
        assert abs(point["valid_mean_macs"] / point["budget"] - 1) < 0.005
        _, spent, _ = evaluate_thresholds(test.confidence, test.correct, np.float32(point["thresholds"]), ABOUT["macs"])
        assert spent == point["test_mean_macs"]


def test_confidences_in_half_precision_are_pointed_out_and_their_thresholds_not_used(tmp_path, capsys, caplog):
    """Files of older versions: nothing in them says how their confidences are stored."""
    parts = {"valid": confident(5000, 0), "test": confident(9000, 2)}
    rounded = {name: part._replace(confidence=part.confidence.astype(np.float16)) for name, part in parts.items()}
    saved = {"state_dict": {"w": torch.zeros(2)}, "epoch": None, "split": None}
    about = {**ABOUT, "temperatures": [], "epoch": None}
    publish.save_arrays(tmp_path / "arrays_dynamic.npz", about, rounded)
    assert publish_again([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    share = 100 * (rounded["test"].confidence == 1).mean()
    assert f"all above 1 - 2^-12 are equal ({share:.1f} % of the test set's)" in printed and share > 15
    assert "do not meet these budgets" in printed
    assert operating_points.stored_curve(tmp_path, saved) is None
    assert "publish the checkpoint again" in caplog.text
    curve = json.loads((tmp_path / "dynamic.json").read_text())
    (tmp_path / "dynamic.json").write_text(json.dumps({**curve, "confidence_type": "float32"}))
    assert len(operating_points.stored_curve(tmp_path, saved)["points"]) == 40


def test_a_published_file_that_is_published_again_keeps_its_figures_in_float32(images, published, tmp_path, capsys):
    for kind in publish.KINDS:
        assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(published / f"model_{kind}.pth"),
                                   "--device", "cpu", "--publish", str(tmp_path / "boost"), "--evalmode", kind]) == 0
    for name in ("anytime.json", "dynamic.json", "dynamic_released.json", "results.json"):
        assert (tmp_path / "boost" / name).read_bytes() == (published / name).read_bytes()
    alone = tmp_path / "alone.pth"
    alone.write_bytes((published / "model_anytime.pth").read_bytes())
    capsys.readouterr()
    assert eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(alone), "--device", "cpu",
                               "--publish", str(tmp_path / "again")]) == 0
    assert "top1_float32" not in json.loads((tmp_path / "again" / "anytime.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1].split()[1::2] == ["-", "-"]


@pytest.mark.parametrize("path", sorted(PUBLISHED.rglob("arrays_*.npz")), ids=lambda path: f"{path.parent.name} {path.stem}")
def test_committed_curves_are_drawn_again_from_the_committed_arrays(path, tmp_path):
    """All but exit rates and shares, whose last place depends on the processor, to the last bit."""
    (tmp_path / path.name).write_bytes(path.read_bytes())
    drawn = publish.redraw(tmp_path, path.stem.removeprefix("arrays_"))
    assert drawn
    for file in drawn:
        again, committed = (json.loads(text.read_text()) for text in (file, path.parent / file.name))
        for one, other in zip(again.get("points", []), committed.get("points", []), strict=True):
            for key in ("p", "shares"):
                assert one.pop(key) == pytest.approx(other.pop(key), rel=1e-6)
        assert again == committed


@pytest.mark.parametrize("path", sorted(PUBLISHED.rglob("model_*.pth")), ids=lambda path: path.parent.name)
def test_committed_weights_come_with_their_thresholds(path):
    assert len(operating_points.stored_curve(path.parent, checkpoint.load(path))["points"]) == 40


@pytest.mark.parametrize("damage", ["missing", "other", "cut"])
def test_folders_without_arrays_end_with_one_line(published, tmp_path, capsys, damage):
    if damage != "missing":
        whole = (published / "arrays_anytime.npz").read_bytes()
        (tmp_path / "arrays_anytime.npz").write_bytes(b"no" if damage == "other" else whole[:-100])
    message = one_line_error(capsys, lambda: publish_again([str(tmp_path)]))
    assert ("has no arrays" if damage == "missing" else "not a file of published arrays") in message


@pytest.mark.parametrize("kind, other", [("dynamic", "anytime"), ("anytime", "dynamic")])
def test_arrays_of_the_other_mode_end_with_one_line(published, tmp_path, capsys, kind, other):
    (tmp_path / f"arrays_{kind}.npz").write_bytes((published / f"arrays_{other}.npz").read_bytes())
    assert f"does not hold what {kind} curves" in one_line_error(capsys, lambda: publish_again([str(tmp_path)]))


@pytest.mark.parametrize("change", [{"macs": [1.0]}, {"macs": None}, None])
def test_arrays_with_other_words_about_them_end_with_one_line(published, tmp_path, capsys, change):
    about, parts = publish.load_arrays(published / "arrays_anytime.npz")
    publish.save_arrays(tmp_path / "arrays_anytime.npz", {**about, **change} if change else [1, 2], parts)
    message = one_line_error(capsys, lambda: publish_again([str(tmp_path)]))
    assert "does not hold what anytime curves" in message or "not a file of published arrays" in message


def test_a_network_without_hold_out_cannot_be_published_as_budgeted(images, tmp_path, capsys):
    line = command(images, tmp_path / "all", "--epochs", "1")
    start = line.index("--use-valid")
    del line[start:start + 3]   # with its --valid_size
    assert train_cifar100.main(line) == 0
    capsys.readouterr()
    flags = ["--data-root", str(images), "--evaluate-from", str(tmp_path / "all" / checkpoint.BEST), "--device", "cpu",
             "--publish", str(tmp_path / "out")]
    assert "--use-valid" in one_line_error(capsys, lambda: eval_cifar100.main([*flags, "--evalmode", "dynamic"]))
    assert eval_cifar100.main(flags) == 0


def test_a_checkpoint_that_does_not_describe_itself_cannot_be_published(images, run, tmp_path, capsys):
    torch.save({"state_dict": checkpoint.load(run / checkpoint.LATEST)["state_dict"]}, tmp_path / "released.pth")
    message = one_line_error(capsys, lambda: eval_cifar100.main(
        ["--dataset", "folder", "--data-root", str(images), "--evaluate-from", str(tmp_path / "released.pth"), "--device", "cpu",
         "--arch", "msdnet_ge", "--nBlocks", "2", "--base", "1", "--step", "1", "--nChannels", "4",
         "--publish", str(tmp_path / "published")]))
    assert "says nothing about its network" in message and not list(tmp_path.glob("published/*"))


def test_no_flag_keeps_the_folder_of_the_runs_machine(tmp_path):
    config = {name: f"/home/somebody/{name}" for name in ("data_root", "checkpoint", "teacher", "result_dir", "tensorboard_dir")}
    (tmp_path / "results.json").write_text(json.dumps({"config": config}))
    assert publish._read_results(tmp_path)["config"] == {name: name for name in config}


def test_nothing_of_a_run_or_of_another_network_is_overwritten(images, run, published, tmp_path, capsys):
    def publish_to(folder, source):
        return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(source / checkpoint.LATEST),
                                   "--device", "cpu", "--publish", str(folder)])

    before = {path: path.read_bytes() for folder in (run, published) for path in folder.glob("*.json")}
    assert "holds a run" in one_line_error(capsys, lambda: publish_to(run, run))
    assert train_cifar100.main(command(images, tmp_path / "joint", "--method", "joint")) == 0
    assert "another method" in one_line_error(capsys, lambda: publish_to(published, tmp_path / "joint"))
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_of_anything_else_is_overwritten(images, run, published, tmp_path, capsys):
    def publish_to(folder, source=run):
        return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(source / checkpoint.LATEST),
                                   "--device", "cpu", "--publish", str(folder)])

    for name in ("results.json", "anytime.json", "model_anytime.pth", "run.lock", "split.pth", "notes.txt", "any.txt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"{}")
        one_line_error(capsys, lambda folder=folder: publish_to(folder))
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_bytes() == b"{}"
    (published / "flops.pth").write_bytes(b"")
    assert "flops.pth is of something else" in one_line_error(capsys, lambda: publish_to(published))
    (published / "flops.pth").unlink()
    assert train_cifar100.main(command(images, tmp_path / "other", "--lr_f", "0.01")) == 0
    capsys.readouterr()
    assert "of other flags" in one_line_error(capsys, lambda: publish_to(published, tmp_path / "other"))
    assert publish_to(published) == 0   # its own run again


@pytest.mark.parametrize("content", ["", "5", "[]", "{}", '{"config": null}'])
def test_a_damaged_results_file_is_found_before_anything_is_written(images, run, tmp_path, capsys, content):
    source = tmp_path / "run"
    source.mkdir()
    (source / checkpoint.LATEST).write_bytes((run / checkpoint.LATEST).read_bytes())
    (source / "results.json").write_text(content)
    line = ["--data-root", str(images), "--evaluate-from", str(source / checkpoint.LATEST), "--device", "cpu",
            "--publish", str(tmp_path / "published")]
    assert "results.json is damaged" in one_line_error(capsys, lambda: eval_cifar100.main(line))
    assert not list(tmp_path.glob("published/*"))


@pytest.mark.parametrize("macs", [5, None, [], ["x"], "reversed", [10**400]])
def test_arrays_with_costs_that_make_no_sense_end_with_one_line(published, tmp_path, capsys, macs):
    about, parts = publish.load_arrays(published / "arrays_dynamic.npz")
    about["macs"] = about["macs"][::-1] if macs == "reversed" else macs
    publish.save_arrays(tmp_path / "arrays_dynamic.npz", about, parts)
    assert "does not hold what" in one_line_error(capsys, lambda: publish_again([str(tmp_path)]))


def test_published_thresholds_are_those_of_the_published_weights(published):
    saved = checkpoint.load(published / "model_dynamic.pth")
    assert operating_points.stored_curve(published, saved)["points"]
