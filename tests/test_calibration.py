"""Confidence one can trust: measures against their definitions, temperatures against a search, --calibrate from end to end."""
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit, exit_index
from dataloader import build_data
from models import BoostedNet, MSDNet
from utils import export, publish
from utils.core.errors import UserError
from utils.data.split import Split
from utils.evaluation import calibration as calibration_module
from utils.evaluation import confidence as policies
from utils.evaluation import predict as predict_module
from utils.evaluation import published
from utils.evaluation.calibration import fit_temperatures, predict_hold_out
from utils.evaluation.fast_form import load_model
from utils.evaluation.onnx_exit import OnnxEarlyExit, OnnxPrograms
from utils.evaluation.predict import Outputs, collect, predict, read
from utils.evaluation.reliability import equal_mass_bins, ideal_score, reliability
from utils.evaluation.thresholds import certify, divide
from utils.runs import checkpoint

# Measures

def made_up(n=400, n_exits=3, n_classes=5, seed=0):
    draw = np.random.default_rng(seed)
    noise = np.linspace(2, 0, n_exits)[:, None, None] * draw.normal(size=(n_exits, n, n_classes))
    logits = 2 * draw.normal(size=(n, n_classes)) + noise
    labels = np.array([draw.choice(n_classes, p=np.exp(row) / np.exp(row).sum()) for row in logits[-1]])
    return Outputs(torch.from_numpy(logits).float(), torch.from_numpy(labels))


def test_measures_are_what_their_definitions_say():
    outputs = made_up()
    found = read(outputs, details=True)
    got = reliability(found.confidence.numpy(), found.correct.numpy(),
                      {name: getattr(found.details, name).numpy() for name in ("log_likelihood", "squares")})
    for n, logits in enumerate(outputs.logits.double().numpy()):
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        truth = np.eye(5)[outputs.labels]
        assert got["nll"][n] == pytest.approx(-np.log((probabilities * truth).sum(axis=1)).mean(), rel=1e-5)
        assert got["brier"][n] == pytest.approx(((probabilities - truth) ** 2).sum(axis=1).mean(), rel=1e-5)
        top, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == outputs.labels.numpy()
        order = sorted(range(400), key=lambda i: -top[i])
        risks = [np.mean([not hit[i] for i in order[:k]]) for k in range(1, 401)]
        assert got["aurc"][n] == pytest.approx(np.mean(risks), rel=1e-6)
        parts = [order[27 * k:27 * k + 27] if k < 10 else order[270 + 26 * (k - 10):296 + 26 * (k - 10)] for k in range(15)]
        gaps = [len(part) / 400 * abs(np.mean(top[part]) - np.mean(hit[part])) for part in parts]
        assert got["ece"][n] == pytest.approx(sum(gaps), rel=1e-5)
        assert [round(400 * share) for share in got["bins"][n]["share"]] == [27] * 10 + [26] * 5


def test_the_order_of_equally_confident_inputs_decides_nothing():
    confidence, correct = np.full((1, 60), 0.5), np.arange(60)[None] < 30
    one, other = reliability(confidence, correct), reliability(confidence, correct[:, ::-1])
    assert one == other and one["ece"] == pytest.approx([0]) and one["aurc"] == pytest.approx([0.5])
    assert len(one["bins"][0]["share"]) == 15
    mixed = np.array([[0.9, 0.5, 0.9, 0.5]]), np.array([[True, False, False, True]])
    assert reliability(*mixed)["bins"][0]["accuracy"] == [0.5] * 4 and reliability(*mixed)["ece"] == pytest.approx([0.2])
    mean, accuracy, share = equal_mass_bins(np.array([0.9, 0.1]), np.array([1.0, 0.0]))   # fewer inputs than bins
    assert (mean.tolist(), accuracy.tolist(), share.tolist()) == ([0.9, 0.1], [1, 0], [0.5, 0.5])


def test_details_are_those_of_the_probabilities():
    outputs = made_up()
    details, probabilities = read(outputs, details=True).details, outputs.logits.softmax(dim=2)
    top = probabilities.sort(dim=2, descending=True)
    assert torch.equal(details.prediction, top.indices[..., 0])
    assert torch.allclose(details.margin, top.values[..., 0] - top.values[..., 1], atol=1e-6)
    assert torch.allclose(details.entropy, -(probabilities * probabilities.log()).sum(dim=2), atol=1e-5)
    assert torch.allclose(details.squares, (probabilities ** 2).sum(dim=2), atol=1e-6)


def test_a_process_without_images_has_empty_details_to_gather():
    class NoBatches(list):
        index = torch.arange(0)

    model = torch.nn.Linear(1, 1)   # is not called
    model.n_exits = 2
    details = predict(model, NoBatches(), details=True).details
    assert all(part.shape == (2, 0) for part in details) and details.prediction.dtype == torch.int64


def test_ideal_score_leaves_at_the_first_right_exit_and_at_the_first_where_none_is():
    correct = np.array([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
    found = ideal_score(correct, [1.0, 2.0, 4.0])
    assert found == {"top1": 75.0, "mean_macs": pytest.approx((2 + 1 + 1 + 4) / 4), "exit_share": [0.5, 0.25, 0.25]}
    assert ideal_score(correct[:, 1:2], [1.0, 2.0, 4.0])["exit_share"] == [1, 0, 0]


# Temperatures

def test_temperatures_have_the_largest_likelihood():
    outputs = made_up(n=5000)
    outputs = Outputs(outputs.logits * torch.tensor([0.5, 1.0, 4.0])[:, None, None], outputs.labels)
    found = fit_temperatures(outputs)
    assert found[2] == pytest.approx(4, rel=0.1)   # labels were drawn from the last exit's probabilities before it was scaled
    for logits, temperature in zip(outputs.logits.double(), found):
        def loss(t, logits=logits):
            return torch.nn.functional.cross_entropy(logits / t, outputs.labels).item()

        assert loss(temperature) < min(loss(1.002 * temperature), loss(temperature / 1.002)) and loss(temperature) < loss(1.0)


@pytest.mark.parametrize("case, expected", [("all right", 0.05), ("all wrong", 20.0), ("equal", None), ("one image", 0.05)])
def test_temperatures_where_there_is_nothing_to_find_are_finite(case, expected):
    logits = torch.randn(2, 1 if case == "one image" else 50, 4, generator=torch.Generator().manual_seed(0))
    labels = logits[0].argmin(dim=1) if case == "all wrong" else logits[0].argmax(dim=1)
    if case == "equal":
        logits = torch.zeros_like(logits)
    found = fit_temperatures(Outputs(logits, labels))
    assert all(0.04 < temperature < 21 for temperature in found)
    assert expected is None or found[0] == pytest.approx(expected, rel=1e-3)


def test_calibration_changes_confidence_and_no_answer():
    outputs, calibration = made_up(), [0.5, 2.0, 3.0]
    plain, scaled = read(outputs, details=True), read(outputs, calibration=calibration, details=True)
    assert torch.equal(plain.correct, scaled.correct) and torch.equal(plain.top5, scaled.top5)
    assert torch.equal(plain.details.prediction, scaled.details.prediction)
    for n, temperature in enumerate(calibration):
        expected = (outputs.logits[n] / temperature).softmax(dim=1).amax(dim=1)
        assert torch.allclose(scaled.confidence[n], expected, atol=1e-6)


# Through the entry points

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images", train=30, test=20)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "boost"
    assert train_cifar100.main(tiny.command(images, folder, "--valid_size", "40")) == 0
    return folder


def evaluate(images, run, *more):
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / checkpoint.LATEST), "--device", "cpu",
                               "--threads", "1", *map(str, more)])


def contents(path):
    return json.loads(path.read_text())


def outputs_of(images, run):
    model, saved = load_model(run / checkpoint.LATEST)
    data = build_data(dataset="folder", data_root=images, split=Split.from_dict(saved["split"]), quiet=True)
    return model, collect(model, data.valid()), collect(model, data.test())


def test_collected_outputs_are_read_as_the_network_is(images, run):
    model, saved = load_model(run / checkpoint.LATEST)
    batches = build_data(dataset="folder", data_root=images, eval_batch_size=7, quiet=True).test()
    one, other = predict(model, batches, details=True), read(collect(model, batches), details=True)
    assert torch.equal(one.correct, other.correct) and torch.equal(one.top5, other.top5)
    assert torch.allclose(one.confidence, other.confidence)
    assert all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in zip(one.details, other.details))


def test_anytime_evaluation_reports_reliability_and_leaves_its_other_files_alone(images, run, tmp_path, capsys):
    before = (run / "anytime.json").read_bytes(), (run / "any.txt").read_bytes()
    assert evaluate(images, run, "--calibrate", "--result_dir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "before and after temperatures from 40 held-out images" in printed and re.search(r"ECE % +NLL +Brier +AURC", printed)
    again, earlier = contents(tmp_path / "anytime.json"), json.loads(before[0])
    changing = {"name", "epoch_kind"}
    assert {k: v for k, v in again.items() if k not in changing} == {k: v for k, v in earlier.items() if k not in changing}
    assert (tmp_path / "any.txt").read_bytes() == before[1]
    _, valid, test = outputs_of(images, run)
    plain, scaled = contents(tmp_path / "reliability.json"), contents(tmp_path / "reliability_calibrated.json")
    assert "calibration" not in plain and scaled["calibration"] == pytest.approx(fit_temperatures(valid))
    for found, temperatures in ((plain, [1.0, 1.0]), (scaled, scaled["calibration"])):
        for n, temperature in enumerate(temperatures):
            loss = torch.nn.functional.cross_entropy(test.logits[n] / temperature, test.labels)
            assert found["nll"][n] == pytest.approx(loss.item(), rel=1e-5)
    assert plain["ideal"] == scaled["ideal"] and len(plain["bins"]) == 2
    assert contents(run / "reliability.json")["ece"] == plain["ece"]   # as training left it


def test_published_arrays_keep_details_on_request(images, run, tmp_path, capsys):
    for mode in ("anytime", "dynamic"):
        assert evaluate(images, run, "--evalmode", mode, "--publish", tmp_path / "boost", "--publish_details") == 0
    kept = {path.name for path in (tmp_path / "boost").iterdir()}
    assert "reliability.json" in kept
    about, parts = published.load_arrays(tmp_path / "boost" / "arrays_dynamic.npz")
    model, saved = load_model(tmp_path / "boost" / "model_dynamic.pth")
    data = build_data(dataset="folder", data_root=images, split=Split.from_dict(saved["split"]), quiet=True)
    for name, batches in (("valid", data.valid()), ("test", data.test())):
        expected = predict(model, batches, details=True)
        assert np.allclose(parts[name].confidence, expected.confidence, atol=1e-6)
        for detail, values in expected.details._asdict().items():
            assert np.allclose(parts[name].details[detail], values, atol=1e-5), detail
    stated = contents(tmp_path / "boost" / "reliability.json")
    test = published.load_arrays(tmp_path / "boost" / "arrays_anytime.npz")[1]["test"]
    assert stated["nll"] == pytest.approx((-test.details["log_likelihood"].mean(axis=1)).tolist(), rel=1e-5)
    capsys.readouterr()
    assert publish.main([str(tmp_path / "boost"), "--scores"]) == 0
    table = capsys.readouterr().out
    assert "| network, thresholds | margin | entropy |" in table and table.count("| boost, ") == 2
    assert {path.name for path in (tmp_path / "boost").iterdir()} == kept
    old = Path(__file__).parent.parent / "published" / "cifar100_small" / "msdnet_joint"
    assert published.load_arrays(old / "arrays_dynamic.npz")[1]["test"].details is None
    assert "--publish_details" in tiny.one_line_error(capsys, lambda: publish.main([str(old), "--scores"]))
    assert "not a file of published arrays" in tiny.one_line_error(capsys, lambda: publish.main([str(tmp_path), "--scores"]))


def test_thresholds_are_of_calibrated_confidences_and_lie_beside_the_others(images, run, tmp_path):
    assert evaluate(images, run, "--evalmode", "dynamic", "--result_dir", tmp_path) == 0
    before = (tmp_path / "dynamic.json").read_bytes()
    assert evaluate(images, run, "--evalmode", "dynamic", "--calibrate", "--result_dir", tmp_path) == 0
    assert evaluate(images, run, "--thresholds", "optimised", "--calibrate", "--result_dir", tmp_path) == 0
    assert (tmp_path / "dynamic.json").read_bytes() == before
    found = contents(tmp_path / "dynamic_calibrated.json")
    _, valid, test = outputs_of(images, run)
    calibration = fit_temperatures(valid)
    assert found["calibration"] == pytest.approx(calibration)
    confidence = read(test, calibration=calibration).confidence
    for point in found["points"][::10]:
        share = np.bincount(exit_index(confidence, point["thresholds"]), minlength=2) / 60
        assert point["test_exit_share"] == pytest.approx(share)
    assert contents(tmp_path / "dynamic_optimised_calibrated.json")["calibration"] == found["calibration"]


def test_a_promise_has_temperatures_of_the_first_part_alone(images, run, tmp_path, monkeypatch):
    flags = "--max_drop", 45, "--confidence_level", 0.6, "--calibrate", "--result_dir", tmp_path
    assert evaluate(images, run, *flags) == 0
    found = contents(tmp_path / "dynamic_promise_calibrated.json")
    _, valid, _ = outputs_of(images, run)
    fitted, tested = divide(40)
    assert sorted([*fitted, *tested]) == list(range(40)) and len(fitted) == found["points"][0]["n_fit"] == 20
    calibration = fit_temperatures(Outputs(valid.logits[:, fitted], valid.labels[fitted]))
    assert found["calibration"] == pytest.approx(calibration)
    confidence = read(valid, calibration=calibration).confidence.numpy()
    promised = certify(confidence, read(valid).correct.numpy(), found["macs"], 45, 0.6)
    assert found["points"][0]["budget"] == pytest.approx(promised.mean_cost)
    # What lies in the other part changes no temperature.
    labels = valid.labels.clone()
    labels[tested] = (labels[tested] + 1) % 3
    monkeypatch.setattr(calibration_module, "collect", lambda *_: Outputs(valid.logits, labels))
    assert predict_hold_out(None, None, policies.confidence, calibrate=True, promise=True)[1] == calibration
    assert predict_hold_out(None, None, policies.confidence, calibrate=True)[1] != calibration


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_real_time_and_images_divide_by_the_temperatures(images, run, tmp_path, capsys, runtime):
    macs = contents(run / "anytime.json")["macs"]
    budget = "--budget", round(sum(macs) / 2), "--calibrate", "--result_dir", tmp_path
    assert evaluate(images, run, "--evalmode", "realtime", "--runtime", runtime, *budget) == 0
    timed = contents(tmp_path / "realtime_calibrated.json")
    point, = timed["points"]
    assert point["n_differ"] == point["n_differ_by_rounding"]
    files, table = sorted(map(str, images.glob("test/*/*.png"))), tmp_path / "all.csv"
    for kept in (False, True):   # fitted now, and then as stored
        if kept:
            assert evaluate(images, run, "--evalmode", "dynamic", *budget) == 0
            assert contents(tmp_path / "dynamic_calibrated.json")["calibration"] == pytest.approx(timed["calibration"], rel=1e-3)
        capsys.readouterr()
        assert evaluate(images, run, "--runtime", runtime, *budget, "--predictions", table, "--images", *files) == 0
        assert ("Stored thresholds" in capsys.readouterr().out) is kept
        _, _, test = outputs_of(images, run)
        confidence = read(test, calibration=timed["calibration"]).confidence
        rows = list(csv.DictReader(table.read_text().splitlines()))
        exits, of_file = [int(row["exit"]) - 1 for row in rows], dict(zip(files, range(60)))   # the order of the test set
        assert np.bincount(exits, minlength=2) / 60 == pytest.approx(point["exit_share"], abs=0.02)
        for exit_, row in zip(exits, rows):
            assert float(row["confidence"]) == pytest.approx(confidence[exit_, of_file[row["image"]]].item(), abs=1e-3)


def test_early_exit_carries_scores_on_as_they_are(images, run):
    model, _, test = outputs_of(images, run)
    batch = torch.cat([b.images for b in build_data(dataset="folder", data_root=images, quiet=True).test()])
    calibration = [3.0, 0.5]
    confidence = read(test, calibration=calibration).confidence
    thresholds = [confidence[0].median().item(), 0.0]
    found = EarlyExit(model, thresholds, calibration=calibration)(batch)
    expected = exit_index(confidence, thresholds)
    assert found.exit.tolist() == expected.tolist() and set(expected) == {0, 1}
    assert torch.allclose(found.confidence, confidence[expected, torch.arange(60)], atol=1e-5)
    assert found.prediction.tolist() == test.logits.argmax(dim=2)[expected, torch.arange(60)].tolist()
    for wrong in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="calibration must be"):
            EarlyExit(model, thresholds, calibration=wrong)


def test_export_takes_calibrated_thresholds_with_their_temperatures(images, run, tmp_path, capsys):
    path = run / "dynamic_calibrated.json"
    path.unlink(missing_ok=True)
    line = [str(run / checkpoint.LATEST), str(tmp_path / "programs"), "--calibrate"]
    message = tiny.one_line_error(capsys, lambda: export.main(line))
    assert "--evalmode dynamic --calibrate" in message
    assert evaluate(images, run, "--evalmode", "dynamic", "--calibrate") == 0
    assert export.main(line) == 0
    about, curve = contents(tmp_path / "programs" / "model.json"), contents(path)
    assert about["calibration"] == curve["calibration"]
    assert about["budgets"][7]["thresholds"] == curve["points"][7]["thresholds"]
    path.write_text(json.dumps({**curve, "calibration": [1.0, 0.0]}))
    assert "is damaged" in tiny.one_line_error(capsys, lambda: export.main([*line[:1], str(tmp_path / "others"), "--calibrate"]))
    path.unlink()


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_the_pages_loaders_divide_by_the_temperatures(images, run, tmp_path, kind):
    evaluate(images, run, "--evalmode", "dynamic", "--calibrate")
    programs = tmp_path / "programs"
    assert export.main([str(run / checkpoint.LATEST), str(programs), "--calibrate", "--format", kind]) == 0
    about = contents(programs / "model.json")
    about["calibration"] = [3.0, 0.5]
    (programs / "model.json").write_text(json.dumps(about))
    page = (Path(__file__).parent.parent / "docs/deployment.md").read_text()
    word = "onnxruntime" if kind == "onnx" else "torch.export.load"
    code, = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if word in block)
    model, _, test = outputs_of(images, run)
    batch = torch.cat([b.images for b in build_data(dataset="folder", data_root=images, quiet=True).test()])
    thresholds = [read(test, calibration=[3.0, 0.5]).confidence[0].median().item(), -1.0]
    expected = EarlyExit(model, thresholds, calibration=[3.0, 0.5])(batch)
    # In a process of its own: in this one, the sessions may share a pool of threads already.
    np.save(tmp_path / "images.npy", batch.numpy())
    wrap = "" if kind == "onnx" else "torch.from_numpy"
    (tmp_path / "use.py").write_text(f"{code}\nimport numpy as np\nimages = {wrap}(np.load('images.npy'))\n"
                                     f"np.savez('found.npz', *map(np.asarray, classify(images, {thresholds})))\n")
    subprocess.run([sys.executable, "use.py", str(programs)], cwd=tmp_path, timeout=120, check=True)
    got = list(np.load(tmp_path / "found.npz").values())
    if kind == "onnx":   # the repository's own loader reads them in model.json too
        got += OnnxEarlyExit(OnnxPrograms(programs), thresholds)(batch.numpy())
        expected += expected
    for one, other in zip(got, expected, strict=True):
        assert np.allclose(one, other.numpy(), atol=1e-4)
    assert len(set(expected[2].tolist())) == 2


def test_outputs_of_no_image_are_refused_in_all_processes_alike(monkeypatch):
    """One process of several without an image: all of them end, before the exchange in which the others would wait."""
    asked = []
    monkeypatch.setattr(predict_module.distributed, "any_rank", lambda flag: asked.append(flag) or True)
    with pytest.raises(UserError, match="use fewer processes"):
        collect(BoostedNet(MSDNet(n_blocks=2, n_channels=4, base=1, num_classes=3), [0.5, 0.5]), [])
    assert asked == [True]
