"""Ensembles of the exits and exit policies: against brute force, where inputs really leave, and on the command line."""
import json
import math

import numpy as np
import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit, exit_index, exit_shares, fit_thresholds, patience_curve
from dataloader import build_data
from models import BoostedNet, MSDNet, RANet, read_as
from utils.core.errors import UserError
from utils.data.split import Split
from utils.evaluation import confidence as reading
from utils.evaluation import operating_points
from utils.evaluation.classify import read_images
from utils.evaluation.fast_form import load_model, prepare_for_inference
from utils.options import catalog
from utils.plots import labels
from utils.reports.finished_runs import read_evaluations

TEMPERATURES = [0.9, 0.3, 0.5, 0.7]
MEASURES = ["confidence", "entropy", "margin"]


def softmax(logits):
    scaled = np.exp(logits - logits.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def brute_force(ensemble, raw):
    """Probabilities (n_exits, B, C) from raw logits (n_exits, B, C), each exit from the beginning."""
    results = []
    for n in range(len(raw)):
        if ensemble == "none":
            result = softmax(raw[n])
        elif ensemble == "boost":
            weights = [math.prod(TEMPERATURES[m + 1:n + 1]) for m in range(n + 1)]
            result = softmax(sum(weight * logits for weight, logits in zip(weights, raw, strict=False)))
        elif ensemble == "average":
            result = sum(softmax(logits) for logits in raw[:n + 1]) / (n + 1)
        else:
            product = np.prod([softmax(logits) for logits in raw[:n + 1]], axis=0)
            result = product / product.sum(-1, keepdims=True)
        results.append(result)
    return np.stack(results)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    net = MSDNet(n_blocks=4, n_channels=4, base=1, step=1, num_classes=5)
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(32, 3, 32, 32))
        for classifier in net.classifier:   # outputs far enough apart that exits differ in what they say
            classifier.linear.weight.mul_(8)
    return net.eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ensemble", catalog.ENSEMBLES)
def test_an_ensemble_predicts_what_brute_force_makes_of_the_raw_logits(backbone, ensemble):
    raw = torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    model = read_as(ensemble, backbone, TEMPERATURES)
    predictions = torch.stack(model.boost(list(raw)))
    np.testing.assert_allclose(predictions.softmax(-1).numpy(), brute_force(ensemble, raw.numpy()), rtol=1e-12, atol=1e-15)


def test_averages_of_hopeless_classes_stay_finite(backbone):
    model = read_as("average", backbone, TEMPERATURES)
    raw = [torch.tensor([[0.0, -2000.0, 3.0, 1.0, 500.0]])] * 4
    for prediction in model.boost(raw):
        assert prediction.isfinite().all() and prediction.softmax(1)[0, 4] == 1


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_equals_brute_force_and_lies_between_0_and_1(name):
    logits = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(3)) * 4
    logits[0, 0], logits[0, 1] = 0, torch.tensor([90.0] + 6 * [-90.0])   # nothing is known; nothing is left open
    p = softmax(logits.double().numpy())
    ordered = np.sort(p, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = -np.where(p > 0, p * np.log(p), 0).sum(-1)
    wanted = {"confidence": ordered[..., -1], "margin": ordered[..., -1] - ordered[..., -2],
              "entropy": 1 - spread / np.log(7)}[name]
    got = reading.MEASURES[name](logits).numpy()
    assert got.dtype == np.float32 and got.min() >= 0 and got.max() <= 1
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    np.testing.assert_array_equal(reading.MEASURES[name](logits[1]), got[1])   # one exit alone says the same


@pytest.mark.parametrize("name", MEASURES)
def test_with_a_single_class_every_measure_is_certain(name):
    assert reading.MEASURES[name](torch.zeros(2, 1)).tolist() == [1, 1]


def test_patience_leaves_where_so_many_exits_in_a_row_agree():
    draw = np.random.default_rng(4)
    n_exits, n = 5, 200
    answers = {part: draw.integers(0, 2, (n_exits, n)) for part in ("valid", "test")}
    correct = {part: draw.random((n_exits, n)) < 0.6 for part in answers}
    agreement = {part: reading.agreement(torch.nn.functional.one_hot(torch.tensor(a), 3).float()) for part, a in answers.items()}
    costs = [1, 2, 4, 7, 11]
    points = patience_curve(agreement["valid"], correct["valid"], agreement["test"], correct["test"], costs)
    assert [point["patience"] for point in points] == [1, 2, 3, 4, 5]
    for point in points:
        k = point["patience"]
        for part, a in answers.items():
            left = [next((e for e in range(k - 1, n_exits) if len(set(a[e - k + 1:e + 1, i])) == 1), n_exits - 1)
                    for i in range(n)]
            assert point[f"{part}_mean_macs"] == pytest.approx(np.mean([costs[e] for e in left]))
            assert point[f"{part}_top1"] == pytest.approx(100 * np.mean([correct[part][e, i] for i, e in enumerate(left)]))
            assert point[f"{part}_exit_share"] == pytest.approx(np.bincount(left, minlength=n_exits) / n)
    assert points[0]["test_exit_share"][0] == 1 and len({tuple(point["test_exit_share"]) for point in points}) == 5


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("ensemble", catalog.ENSEMBLES)
def test_inputs_that_really_leave_get_what_the_simulation_says(backbone, pixels, ensemble, name):
    model = prepare_for_inference(read_as(ensemble, backbone, TEMPERATURES))
    assert type(model) is type(read_as(ensemble, backbone, TEMPERATURES))
    measure = reading.MEASURES[name]
    with torch.inference_mode():
        predictions = torch.stack(model(pixels))
    certainty = measure(predictions)
    thresholds = fit_thresholds(certainty, exit_shares(0.4, 4))
    expected = exit_index(certainty, thresholds)
    assert len(set(expected)) == 4
    got = EarlyExit(model, thresholds, measure=measure)(pixels)
    # The last bits depend on the size of the batch; thresholds are certainties of these very images.
    near = (np.abs(certainty.numpy() - thresholds[:, None]) < 1e-6).any(axis=0)
    same = got.exit.numpy() == expected
    assert (same | near).all() and same.mean() > 0.9
    rows = np.flatnonzero(same)
    at_exit = predictions.numpy()[expected[rows], rows]
    assert (got.prediction.numpy()[rows] == at_exit.argmax(1)).all()
    np.testing.assert_allclose(got.confidence.numpy()[rows], certainty.numpy()[expected[rows], rows], atol=1e-5)


def test_another_reading_costs_nothing_and_works_on_ranet():
    from op_counter import measure_model

    net = RANet(n_blocks=1, n_channels=4, step=1, scale_list=[1, 2, 3], gr_factor=[2, 2, 1], bn_factor=[1, 1, 1], num_classes=4)
    plain, averaged = (measure_model(read_as(name, net, [0.5] * net.n_exits).eval(), 32, 32) for name in ("none", "average"))
    assert plain == averaged
    x = torch.randn(6, 3, 32, 32)
    ready = prepare_for_inference(read_as("average", net, []))
    got = EarlyExit(ready, [2.0] * net.n_exits)(x)
    with torch.inference_mode():
        assert torch.equal(got.prediction, read_as("average", net, []).eval()(x)[-1].argmax(1))


# The command line

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def joint(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "joint"
    assert train_cifar100.main(tiny.command(images, folder, "--method", "joint", "--nBlocks", "3")) == 0
    return folder


def evaluate(images, run, *more, into=None):
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / "model_latest.pth"), "--device", "cpu",
                               "--threads", "1", *(["--result_dir", str(into)] if into else []), *more])


def test_the_names_on_the_command_line_are_those_there_are():
    assert list(reading.MEASURES) == list(catalog.POLICIES)


def test_an_ensemble_has_files_and_titles_of_its_own_in_every_mode(images, joint, tmp_path, capsys):
    for mode in ("anytime", "dynamic", "realtime"):
        for ensemble in ("none", "average", "poe", "boost"):
            assert evaluate(images, joint, "--evalmode", mode, "--ensemble", ensemble, into=tmp_path) == 0
            words = "" if ensemble == "none" else f" ({catalog.ENSEMBLES[ensemble]})"
            assert f"msdnet_ge joint{words} folder" in capsys.readouterr().out
    for name in ("anytime", "dynamic", "realtime"):   # the files are called after the modes
        found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob(f"{name}*.json")}
        assert found.keys() == {name, f"{name}_average", f"{name}_poe", f"{name}_boost"}
        assert {stem.removeprefix(name).lstrip("_") or None for stem in found} == {c["ensemble"] for c in found.values()}
        assert len({str(content["macs"]) for content in found.values()}) == 1
        assert found[f"{name}_poe"]["temperatures"] == [1] * 3 and found[f"{name}_boost"]["temperatures"] == [0.5] * 3
    # The first exit has nothing to be combined with.
    assert len({json.loads(path.read_text())["top1"][0] for path in tmp_path.glob("anytime*.json")}) == 1
    shown = [result for result in read_evaluations(tmp_path) if "points" not in result]
    assert sorted(labels(shown)) == ["joint training, MSDNet", "joint training, MSDNet, exits added up",
                                     "joint training, MSDNet, exits averaged", "joint training, MSDNet, product of exits"]


def test_exits_added_up_with_other_temperatures_have_files_and_titles_of_their_own(images, joint, tmp_path, capsys):
    for temperatures in ("0.5", "0.2", "0.2,0.4"):
        assert evaluate(images, joint, "--ensemble", "boost", "--ensemble_reweight", temperatures, into=tmp_path) == 0
    assert "msdnet_ge joint (exits added up, t = 0.3-0.4) folder" in capsys.readouterr().out
    names = {path.stem: json.loads(path.read_text())["temperatures"][1:] for path in tmp_path.glob("anytime*.json")}
    assert names == {"anytime_boost": [0.5, 0.5], "anytime_boost_t0.2": [0.2, 0.2],
                     "anytime_boost_t0.3-0.4": pytest.approx([0.3, 0.4])}
    assert sorted(labels(read_evaluations(tmp_path))) == [f"joint training, MSDNet, exits added up{more}"
                                                      for more in ("", ", t = 0.2", ", t = 0.3-0.4")]


def test_figures_of_an_ensemble_are_those_of_its_predictions(images, joint, tmp_path):
    model, saved = load_model(joint / "model_latest.pth")
    raw, labels_ = [], []
    with torch.inference_mode():
        for x, y, _ in build_data(dataset="folder", data_root=images).test():
            raw.append(torch.stack(model.backbone(x)))
            labels_.append(y)
    raw, labels_ = torch.cat(raw, dim=1).numpy(), torch.cat(labels_).numpy()
    evaluate(images, joint, "--ensemble", "average", into=tmp_path)
    wanted = 100 * (brute_force("average", raw).argmax(-1) == labels_).mean(axis=1)
    assert json.loads((tmp_path / "anytime_average.json").read_text())["top1"] == pytest.approx(wanted)


def test_temperatures_of_an_added_up_joint_model_come_from_the_command_line(images, joint, tmp_path, capsys):
    evaluate(images, joint, "--ensemble", "boost", "--ensemble_reweight", "0.2,0.4", into=tmp_path)
    assert json.loads((tmp_path / "anytime_boost_t0.3-0.4.json").read_text())["temperatures"] == pytest.approx([0.2, 0.3, 0.4])
    capsys.readouterr()
    flags_ = ["--ensemble", "boost", "--ensemble_reweight", "1,1,1,1"]
    message = tiny.one_line_error(capsys, lambda: evaluate(images, joint, *flags_))
    assert "4 values for 3 exits" in message


def test_a_network_boosted_with_temperature_zero_is_added_up_beside_its_own_reading(images, tmp_path, capsys):
    assert train_cifar100.main(tiny.command(images, tmp_path, "--nBlocks", "3", "--ensemble_reweight", "0")) == 0
    before = (tmp_path / "anytime.json").read_bytes()
    for temperatures in ("0.5", "1"):
        assert evaluate(images, tmp_path, "--ensemble", "boost", "--ensemble_reweight", temperatures) == 0
    assert (tmp_path / "anytime.json").read_bytes() == before
    for name, t in (("anytime_boost", 0.5), ("anytime_boost_t1", 1)):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["ensemble"], found["temperatures"]) == ("boost", [t] * 3)
    own = tmp_path / "own"   # the way it was trained
    assert evaluate(images, tmp_path, "--ensemble", "boost", "--ensemble_reweight", "0", into=own) == 0
    assert json.loads((own / "anytime.json").read_text())["ensemble"] is None


def test_a_boosted_model_added_up_is_as_it_was_trained(images, tmp_path):
    assert train_cifar100.main(tiny.command(images, tmp_path / "boost", "--epochs", "1")) == 0
    before = json.loads((tmp_path / "boost" / "anytime.json").read_text())
    assert evaluate(images, tmp_path / "boost", "--ensemble", "boost") == 0
    after = json.loads((tmp_path / "boost" / "anytime.json").read_text())
    assert after["top1"] == before["top1"] and after["ensemble"] is None
    assert not (tmp_path / "boost" / "anytime_boost.json").exists()
    assert evaluate(images, tmp_path / "boost", "--ensemble", "none", into=tmp_path) == 0
    assert json.loads((tmp_path / "anytime_none.json").read_text())["temperatures"] == [0, 0]


@pytest.mark.parametrize("mode", ["dynamic", "realtime"])
@pytest.mark.parametrize("policy", ["entropy", "margin"])
def test_a_policy_is_fitted_run_and_reported_like_confidence(images, joint, tmp_path, capsys, mode, policy):
    macs = json.loads((joint / "anytime.json").read_text())["macs"]
    budget = f"{sum(macs) / 3:.0f}"
    assert evaluate(images, joint, "--evalmode", mode, "--policy", policy, "--budget", budget, into=tmp_path) == 0
    assert f"msdnet_ge joint (leaving by {policy}) folder" in capsys.readouterr().out
    result = json.loads((tmp_path / f"{mode}_{policy}.json").read_text())
    assert result["policy"] == policy
    point, = result["points"]
    model, saved = load_model(joint / "model_latest.pth")
    data = build_data(dataset="folder", data_root=images, split=Split.from_dict(saved["split"]))
    with torch.inference_mode():
        certainty = torch.cat([reading.MEASURES[policy](torch.stack(model(x))) for x, _, _ in data.valid()], dim=1)
    wanted = operating_points.finite(operating_points.fit(certainty, macs, float(budget)))
    assert point["thresholds"] == pytest.approx(wanted, abs=1e-5)
    if mode == "realtime":
        assert point["n_differ"] == point["n_differ_by_rounding"]


def test_patience_reports_one_row_for_each_number_of_exits(images, joint, tmp_path, capsys):
    assert evaluate(images, joint, "--policy", "patience", into=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "patience (exits in a row with one answer): msdnet_ge joint (leaving by patience)" in printed
    result = json.loads((tmp_path / "dynamic_patience.json").read_text())
    assert [point["patience"] for point in result["points"]] == [1, 2, 3] and result["family"] == "patience"
    assert [point["test_mean_macs"] for point in result["points"]][::2] == [result["macs"][0], result["macs"][-1]]
    assert len((tmp_path / "dynamic_patience.txt").read_text().splitlines()) == 3
    assert "leaving by patience" in labels(read_evaluations(tmp_path), name_family=True)[0]


def test_images_leave_by_the_policy_and_take_no_thresholds_of_another(images, joint, tmp_path, capsys):
    picture = str(next((images / "test").rglob("*.png")))
    macs = json.loads((joint / "anytime.json").read_text())["macs"]
    budget = ("--budget", f"{sum(macs) / 3:.0f}")
    evaluate(images, joint, "--evalmode", "dynamic", *budget, into=tmp_path)
    path = tmp_path / "dynamic.json"
    spoilt = json.loads(path.read_text())
    spoilt["points"][0]["thresholds"] = [2.0, 2.0, -1.0]   # nobody leaves early: to be recognised by
    path.write_text(json.dumps(spoilt))
    capsys.readouterr()

    def exit_of(*more):
        assert evaluate(images, joint, "--images", picture, *budget, *more, into=tmp_path) == 0
        table = capsys.readouterr().out
        *_, certainty, left_at, _ = table.splitlines()[-1].split()
        left_at = int(left_at)
        name = more[1] if "--policy" in more else "confidence"
        prediction = read_as("average" if "average" in more else "none", plain.backbone, []).boost(raw)[left_at - 1]
        assert float(certainty) == pytest.approx(100 * reading.MEASURES[name](prediction).item(), abs=0.06)
        return table, left_at

    plain, _ = load_model(joint / "model_latest.pth")
    with torch.inference_mode():
        raw = plain.backbone(read_images([picture], "folder", 32))

    table, left_at = exit_of()
    assert "confidence %" in table and left_at == 3
    (tmp_path / "dynamic_entropy.json").write_text(path.read_text())   # of another policy, whatever its name says
    for more in (("--policy", "entropy"), ("--ensemble", "average")):
        table, _ = exit_of(*more)
        assert ("certainty by entropy %" in table) == ("entropy" in more)
    spoilt["policy"] = "entropy"
    (tmp_path / "dynamic_entropy.json").write_text(json.dumps(spoilt))
    assert exit_of("--policy", "entropy")[1] == 3


def test_stored_points_are_taken_only_for_the_same_way_of_reading(images, joint, tmp_path):
    evaluate(images, joint, "--evalmode", "dynamic", into=tmp_path)
    _, saved = load_model(joint / "model_latest.pth")
    usual = {"temperatures": [0.0] * 3, "ensemble": None, "policy": "confidence"}
    content = json.loads((tmp_path / "dynamic.json").read_text())
    assert content | usual == content
    for how in (usual, {}):
        assert len(operating_points.stored_curve(tmp_path, saved, **how)["points"]) == 40
    for other in ({"temperatures": [1.0] * 3}, {"ensemble": "average"}, {"policy": "margin"}):
        assert operating_points.stored_curve(tmp_path, saved, **usual | other) is None
    for other in ({"method": "l2w"}, {"architecture": {**saved["architecture"], "nChannels": 8}}):   # a file of another network
        assert operating_points.stored_curve(tmp_path, saved | other) is None
    for name in ("ensemble", "policy"):   # a file from before there was a choice
        del content[name]
    (tmp_path / "dynamic.json").write_text(json.dumps(content))
    assert len(operating_points.stored_curve(tmp_path, saved)["points"]) == 40


@pytest.mark.parametrize("damage", [
    lambda curve: [], lambda curve: None, lambda curve: {}, lambda curve: {**curve, "points": None},
    lambda curve: {**curve, "points": [3]}, lambda curve: {**curve, "points": [{"budget": 1e6}]},
    lambda curve: {**curve, "points": [{**curve["points"][0], "thresholds": [0.5]}]},
    lambda curve: {**curve, "points": [{**curve["points"][0], "budget": None}]},
])
def test_damaged_points_end_with_one_line(images, joint, tmp_path, damage):
    evaluate(images, joint, "--evalmode", "dynamic", into=tmp_path)
    _, saved = load_model(joint / "model_latest.pth")
    path = tmp_path / "dynamic.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(UserError, match="is damaged"):
        operating_points.stored_curve(tmp_path, saved)


@pytest.mark.parametrize("flag", [("--ensemble", "average"), ("--policy", "entropy"), ("--images", "a.png"), ("--cost", "macs")])
def test_training_has_no_use_for_flags_of_evaluation(images, tmp_path, capsys, flag):
    message = tiny.one_line_error(capsys, lambda: train_cifar100.main(tiny.command(images, tmp_path / "run", *flag)))
    assert flag[0] in message and not (tmp_path / "run").exists()


def test_a_network_read_another_way_keeps_its_mode(backbone):
    from types import SimpleNamespace

    args = SimpleNamespace(ensemble="average", ensemble_reweight=[0.5], policy="confidence")
    for training in (True, False):
        model, _ = reading.read_exits(args, BoostedNet(backbone, [0.0] * 4).train(training))
        assert model.training is model.backbone.training is training
    backbone.eval()
