"""Thresholds for a budget, and which of the stored ones are taken: array code alone, no network."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adaptive_inference import evaluate_thresholds
from utils.core.errors import UserError
from utils.evaluation import operating_points as points_of
from utils.evaluation.thresholds import optimised_thresholds
from utils.runs.checkpoint import hash_weights

MACS = [10.0, 20.0, 50.0]
SAVED = {"state_dict": {"w": torch.ones(2)}, "epoch": 7, "split": {"hash": "s"}, "method": "boost",
         "architecture": {"arch": "msdnet"}, "temperatures": [0.5, 0.5, 0.5]}


def curve(**more):
    """As an evaluation of the network of SAVED leaves it."""
    points = [{"budget": budget, "test_top1": 50.0, "thresholds": [0.9, 0.8, -1.0]} for budget in (15.0, 30.0, 45.0)]
    return {"macs": MACS, "family": "eq9", "flat": False, "epoch": 7, "split_hash": "s", "method": "boost",
            "config": {"arch": "msdnet"}, "temperatures": [0.5, 0.5, 0.5], "ensemble": None, "policy": "confidence",
            "weights_hash": hash_weights(SAVED["state_dict"]), "points": points, **more}


def taken(folder, content, saved=SAVED, name="dynamic", **how):
    (folder / f"{name}.json").write_text(json.dumps(content))
    found = points_of.stored_curve(folder, saved, **how)
    return found["points"] if found else []


def test_points_of_this_network_are_taken_and_of_any_other_are_not(tmp_path):
    assert points_of.stored_curve(tmp_path / "none", SAVED) is points_of.stored_curve(tmp_path, SAVED) is None
    assert taken(tmp_path, curve()) == curve()["points"]
    older = {name: value for name, value in curve().items() if name not in ("weights_hash", "temperatures", "ensemble", "policy")}
    assert taken(tmp_path, older) == curve()["points"]
    for name, other in {"epoch": 6, "split_hash": "t", "method": "joint", "config": {"arch": "ranet"}, "weights_hash": "other",
                        "temperatures": [0.4] * 3, "ensemble": "poe", "policy": "margin", "family": "released",
                        "flat": True}.items():
        assert taken(tmp_path, curve(**{name: other})) == [], name
    assert taken(tmp_path, curve(split_hash=None)) == []
    assert taken(tmp_path, curve(split_hash=None), {**SAVED, "split": None}) == curve()["points"]
    released = {"state_dict": SAVED["state_dict"]}   # says nothing about itself
    assert taken(tmp_path, curve(epoch=None, split_hash=None, temperatures=[]), released) == curve()["points"]


def test_points_are_read_from_the_file_of_the_way_of_reading(tmp_path):
    reread = curve(ensemble="poe", temperatures=[1.0] * 3, policy="margin")
    how = dict(ensemble="poe", temperatures=[1.0] * 3, policy="margin")
    assert taken(tmp_path, reread, name="dynamic_poe_margin_x", suffix="_x", **how) == curve()["points"]
    assert taken(tmp_path, curve(), name="dynamic_y", suffix="_y") == curve()["points"]


@pytest.mark.parametrize("wrong", [[], [{"budget": 1.0}], [{"budget": 1.0, "test_top1": 2.0, "thresholds": [1.0, -1.0]}],
                                   [{"budget": None, "test_top1": 2.0, "thresholds": [1.0, 1.0, -1.0]}],
                                   [*curve()["points"], {"budget": 1.0, "test_top1": 2.0, "thresholds": [1.0, -1.0]}]])
def test_damaged_points_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="dynamic.json is damaged .* evaluate with --evalmode dynamic again"):
        taken(tmp_path, curve(points=wrong))


def test_a_stored_calibration_is_one_temperature_above_0_for_each_exit(tmp_path):
    how = dict(name="dynamic_calibrated", calibrated=True)
    assert taken(tmp_path, curve(calibration=[0.5, 1.0, 2.0]), **how) == curve()["points"]
    assert taken(tmp_path, curve(), **how) == taken(tmp_path, curve(calibration=[1.0] * 3)) == []
    for wrong in ([1.0] * 2, [1.0, "1", 1.0], [1.0, 0.0, 2.0], 1.0):
        with pytest.raises(UserError, match="calibration is not one temperature for each exit"):
            taken(tmp_path, curve(calibration=wrong), **how)


SHARES = [[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]


def curve_with(shares, **more):
    return curve(points=[{**point, "valid_exit_share": share} for point, share in zip(curve()["points"], shares)], **more)


def test_where_the_held_out_images_left_is_told_by_complete_files_alone():
    assert points_of.hold_out_exits(curve_with(SHARES, n_valid=90)) == {"n_images": 90, "exit_share": SHARES}
    assert points_of.hold_out_exits(curve_with([*SHARES[:2], [0.0, 5e-7, 1.0]], n_valid=90))
    for wrong in (curve(n_valid=90), curve_with(SHARES), curve_with(SHARES, n_valid="90"),
                  *(curve_with([*SHARES[:2], last], n_valid=90)
                    for last in (None, [0.5, 0.5], [0.5, 0.25, 0.1], [0.5, 0.5, 1.0], [0.0, 3e-6, 1.0], [0.5, "0.5", 0.0]))):
        assert points_of.hold_out_exits(wrong) is None and points_of.monitor(wrong, 0) is None


def test_the_monitor_of_a_point_compares_with_its_shares():
    found = points_of.monitor(curve_with(SHARES, n_valid=90), 1)
    assert (found.held_out_share, found.n_held_out, found.costs, found.thresholds) == (SHARES[1], 90, MACS, "geometric")


def test_thresholds_of_the_kind_that_is_asked_for():
    rng = np.random.default_rng(1)
    confidence, correct = rng.random((3, 300), dtype=np.float32), rng.random((3, 300)) < 0.6
    valid = SimpleNamespace(confidence=torch.from_numpy(confidence), correct=torch.from_numpy(correct))
    for kind, wanted in (("geometric", [points_of.fit(confidence, MACS, budget) for budget in (15.0, 30.0)]),
                         ("optimised", optimised_thresholds(confidence, correct, MACS, [15.0, 30.0]))):
        np.testing.assert_array_equal(points_of.fit_all(valid, MACS, [15.0, 30.0], kind), wanted)


def test_thresholds_of_half_precision_are_taken_only_where_no_confidence_was_rounded_to_one(tmp_path, caplog):
    reached = curve(precision="half", points=[{"budget": 1.0, "test_top1": 2.0, "thresholds": [1.0, 0.5, -1.0]}])
    assert taken(tmp_path, reached) == [] and "not used" in caplog.text
    assert taken(tmp_path, {**reached, "points": [*curve()["points"], *reached["points"]]}) == []   # one is enough
    assert taken(tmp_path, {**reached, "confidence_type": "float32"}) == reached["points"]
    assert taken(tmp_path, {**reached, "precision": "single"}) == reached["points"]
    assert taken(tmp_path, curve(precision="half")) == curve()["points"]


def test_infinite_thresholds_are_stored_as_ones_that_no_confidence_and_every_confidence_reaches():
    assert points_of.finite([np.inf, 1.0, 0.0, 0.25, -np.inf]) == [2.0, 1.0, 0.0, 0.25, -1.0]
    confidence = np.float32([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    for thresholds, shares in (([np.inf, np.inf, -np.inf], [0, 0, 1]), ([np.inf, -np.inf, -np.inf], [0, 1, 0])):
        measured = evaluate_thresholds(confidence, confidence > 0.5, points_of.finite(thresholds), MACS)
        assert measured[2].tolist() == shares


def test_fitted_thresholds_spend_the_budget():
    confidence = np.random.default_rng(0).random((3, 2000), dtype=np.float32)
    thresholds = points_of.fit(confidence, MACS, 25.0)
    assert evaluate_thresholds(confidence, confidence > 0.5, thresholds, MACS)[1] == pytest.approx(25.0, abs=0.05)


def test_the_point_of_the_largest_budget_within_or_nearest_the_middle():
    points = curve()["points"]
    cheap, middle, dear = points
    assert points_of.choose(points, MACS, 30.0) is points_of.choose(points[::-1], MACS, 44.9) is middle
    assert points_of.choose(points, MACS, 30.0 * (1 - 1e-10)) is middle   # a budget is typed in decimals
    assert points_of.choose(points, MACS, 30.0 * (1 - 1e-7)) is cheap
    assert points_of.choose(points, MACS, 99.0) is dear and points_of.choose(points, MACS, 14.0) is None
    assert points_of.choose(points[::-1], MACS, None) is middle and points_of.choose([], MACS, None) is None
    assert points_of.between([10.0, 20.0, 50.0], 0.25) == 20.0


def test_a_budget_out_of_range_is_refused_in_its_unit():
    points_of.check(MACS, 10.0)
    with pytest.raises(UserError, match="10 to 50 MACs"):
        points_of.check(MACS, 51.0)
    with pytest.raises(UserError, match="10 to 50 ms"):
        points_of.check(MACS, 9.0, "latency")


def test_budgets_missed_by_more_than_half_a_percent_are_named(capsys):
    points = [{"budget": 10e6, "valid_mean_macs": 10.04e6}, {"budget": 20e6, "valid_mean_macs": 20.12e6},
              {"budget": 40e6, "valid_mean_macs": 39.68e6}]
    points_of.warn_of_missed_budgets(points, 90)
    assert "90 held-out images do not meet these budgets more closely: 20.00 (+0.6 %), 40.00 (-0.8 %)" in capsys.readouterr().out
    points_of.warn_of_missed_budgets(points[:1], 90)
    points_of.warn_of_missed_budgets([{"budget": 40e6, "valid_mean_macs": 40.2e6}], 90)   # half a percent is not more
    assert not capsys.readouterr().out


def test_default_budgets_lie_between_the_first_exit_and_the_last():
    assert sorted(points_of.DEFAULT_BUDGETS) == list(points_of.DEFAULT_BUDGETS)
    assert points_of.DEFAULT_BUDGETS[0] > 0 and points_of.DEFAULT_BUDGETS[-1] < 1


def test_without_a_hold_out_there_are_no_operating_points():
    points_of.require_hold_out(SimpleNamespace(n_valid=1))
    for n_valid in (0, None):
        with pytest.raises(UserError, match="--use-valid"):
            points_of.require_hold_out(SimpleNamespace(n_valid=n_valid))
