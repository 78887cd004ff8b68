"""Thresholds chosen for accuracy: against brute force, against the geometric ones, and promises against their own pool."""
import itertools
import json
import math
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import eval_cifar100
import train_cifar100
from adaptive_inference import budget_curve, budget_grid, evaluate_thresholds, exit_index, fit_thresholds
from utils import export, plots, publish, report
from utils.evaluation import realtime, thresholds
from utils.evaluation.published import load_arrays
from utils.evaluation.thresholds import (
    BestShares,
    PriceSolver,
    certify,
    divide,
    fit_shares,
    geometric_shares,
    hull,
    is_below,
    probability_right,
)
from utils.plots import labels
from utils.reports.finished_runs import read_evaluations
from utils.runs import checkpoint

PUBLISHED = Path(__file__).parent.parent / "published" / "cifar100_small"


def scores(rng, n_exits, n_inputs, skill=None):
    """Confidences and answers of a made-up network: inputs differ in difficulty, exits in skill, and confidence tells of both."""
    skill = np.linspace(0.3, 1.5, n_exits) if skill is None else np.asarray(skill)
    difficulty = rng.normal(size=n_inputs)
    certainty = skill[:, None] - difficulty + 0.7 * rng.normal(size=(n_exits, n_inputs))
    confidence = 1 / (1 + np.exp(-certainty))
    return confidence.astype(np.float32), rng.random((n_exits, n_inputs)) < confidence


# Against brute force

def small_cases(n_cases):
    """Few inputs and exits, every other case with many equal confidences."""
    rng = np.random.default_rng(0)
    for case in range(n_cases):
        n_exits, n_inputs = int(rng.integers(2, 5)), int(rng.integers(3, 9))
        shape = (n_exits, n_inputs)
        confidence = rng.choice([0.2, 0.4, 0.6, 0.8, 1.0], shape) if case % 2 else rng.random(shape)
        correct = rng.random(shape) < 0.4 + 0.1 * np.arange(n_exits)[:, None]
        yield confidence, correct, np.cumsum(rng.random(n_exits) + 0.2)


def every_choice(confidence, correct, costs):
    """(cost, accuracy) of every threshold vector, by the rule as `adaptive_inference` has it."""
    levels = [[*np.unique(row), np.inf] for row in confidence[:-1]]
    for chosen in itertools.product(*levels):
        top1, cost, _ = evaluate_thresholds(confidence, correct, [*chosen, -np.inf], costs)
        yield cost, top1 / 100


def test_hull_against_every_threshold_vector():
    gaps = []
    for confidence, correct, costs in small_cases(150):
        choices = np.array(list(every_choice(confidence, correct, costs)))
        corners = hull(PriceSolver(confidence, correct, costs), resolution=0.0)
        for price in np.array([0, 0.1, 0.3, 0.6, 1]) / costs[-1]:
            best = (choices[:, 1] - price * choices[:, 0]).max()
            gaps.append(best - max(corner.value - price * corner.cost for corner in corners))
    gaps = np.array(gaps)
    assert gaps.min() > -1e-6                  # nothing is claimed that no thresholds reach
    assert np.mean(gaps < 1e-6) > 0.95         # nearly always the best there is; else an exit pays only along with another
    assert gaps.mean() < 0.005


def test_no_single_exit_can_be_improved():
    for confidence, correct, costs in small_cases(60):
        solver, price = PriceSolver(confidence, correct, costs), 0.2 / costs[-1]
        found = solver.solve(price, solver.keep_all())
        for k in range(len(costs) - 1):
            for rank in range(confidence.shape[1] + 1):
                other = solver.corner([*found.ranks[:k], rank, *found.ranks[k + 1:]])
                assert other.value - price * other.cost < found.value - price * found.cost + 1e-5


def test_corner_is_what_its_shares_give_as_thresholds():
    for confidence, correct, costs in small_cases(60):
        for corner in hull(PriceSolver(confidence, correct, costs), resolution=0.0):
            top1, cost, shares = evaluate_thresholds(confidence, correct, fit_shares(confidence, corner.shares), costs)
            assert (top1 / 100, cost) == pytest.approx((corner.value, corner.cost), abs=1e-6)
            assert shares == pytest.approx(corner.shares)


def test_mixtures_cost_their_budget():
    rng = np.random.default_rng(1)
    confidence, correct = scores(rng, 5, 1000)
    costs = np.array([1.0, 2, 4, 5, 9])
    best = BestShares(confidence, correct, costs)
    budgets = np.linspace(1, 9, 30)
    assert best.at(budgets) @ costs == pytest.approx(np.minimum(budgets, best.dearest))


def test_regression_converges_where_newton_steps_overshoot():
    confidence, correct = scores(np.random.default_rng(5), 4, 3000, skill=[0.5, 1.5, -2, -2])
    probability = probability_right(confidence, correct)
    assert probability.mean(axis=1) == pytest.approx(correct.mean(axis=1), abs=1e-3)
    assert np.mean((probability - correct) ** 2, axis=1) == pytest.approx((confidence - confidence ** 2).mean(axis=1), rel=0.1)


# What it earns

def exit_in_the_middle_of_no_use(rng, n_inputs):
    return scores(rng, 5, n_inputs, skill=[0.3, 0.9, -1.5, -1.5, 1.5])


def test_an_exit_that_never_pays_is_not_used():
    confidence, correct = exit_in_the_middle_of_no_use(np.random.default_rng(2), 4000)
    best = BestShares(confidence, correct, [1.0, 2, 3, 4, 5])
    assert best.trust > 0.9
    assert best.at(np.linspace(1.5, 4, 6))[:, 2:4].max() < 0.05


def test_earns_on_new_inputs_where_eq9_wastes():
    rng = np.random.default_rng(3)
    held_out, new = exit_in_the_middle_of_no_use(rng, 4000), exit_in_the_middle_of_no_use(rng, 20000)
    costs, budgets = np.arange(1.0, 6), np.array([2.0, 2.5, 3, 3.5])
    for best, geometric in zip(BestShares(*held_out, costs).at(budgets), geometric_shares(costs, budgets)):
        best, spent, _ = evaluate_thresholds(*new, fit_shares(held_out[0], best), costs)
        plain, equally, _ = evaluate_thresholds(*new, fit_thresholds(held_out[0], geometric), costs)
        assert best > plain + 1
        assert spent == pytest.approx(equally, rel=0.03)


def test_gains_by_chance_are_not_trusted():
    # Confidences say nothing: no choice of thresholds is better than another.
    rng, found = np.random.default_rng(4), []
    for _ in range(8):
        confidence, correct = rng.random((3, 500)).astype(np.float32), rng.random((3, 500)) < 0.5
        found.append(BestShares(confidence, correct, [1.0, 2, 3]).trust)
    assert np.mean(found) < 0.4


def test_a_gain_of_nothing_and_fewer_inputs_than_parts_earn_no_trust():
    rng = np.random.default_rng(2)   # one of few draws in which five inputs are enough
    confidence, correct = rng.random((int(rng.integers(2, 5)), 5)), rng.random((4, 5)) < 0.5
    costs = np.cumsum(rng.random(4) + 0.1)
    assert BestShares(confidence, correct, costs).trust > 0
    assert BestShares(confidence[:, :4], correct[:, :4], costs).trust == 0
    assert BestShares(confidence, np.ones((4, 5), bool), costs).trust == 0


def test_beyond_what_pays_nothing_is_spent():
    confidence, correct = scores(np.random.default_rng(5), 4, 3000, skill=[0.5, 1.5, -2, -2])
    costs = np.array([1.0, 2, 3, 4])
    shares = BestShares(confidence, correct, costs).at([4.0])[0]
    assert shares @ costs < 2.1


def test_new_inputs_stay_out_of_exits_that_are_out_of_use():
    confidence = 0.5 + np.random.default_rng(5).random((4, 100)).astype(np.float32) / 2
    thresholds = fit_shares(confidence, np.array([0.3, 0.7, 0, 0]))
    assert exit_index(np.zeros((4, 1), np.float32), thresholds)[0] == 1   # less certain than all of the hold-out


@pytest.mark.parametrize("case", ["one input", "all right", "all wrong", "certain", "one exit"])
def test_degenerate_hold_outs(case):
    rng = np.random.default_rng(6)
    confidence, correct = scores(rng, 1 if case == "one exit" else 3, 1 if case == "one input" else 50)
    if case in ("all right", "all wrong"):
        correct[:] = case == "all right"
    if case == "certain":
        confidence[:] = 1.0
    costs = np.arange(1.0, len(confidence) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = BestShares(confidence, correct, costs).at([costs[0], costs.mean(), costs[-1]])
    assert np.isfinite(shares).all() and shares.sum(axis=1) == pytest.approx(1)
    for row in shares:
        assert not np.isnan(fit_shares(confidence, row)).any()


def test_forty_budgets_of_ten_exits_within_two_seconds():
    confidence, correct = scores(np.random.default_rng(7), 10, 5000)
    costs = np.linspace(15, 120, 10)
    start = time.process_time()   # the machine may be busy with something else
    BestShares(confidence, correct, costs).at(budget_grid(costs))
    assert time.process_time() - start < 3   # 0.7 s on an idle machine; busy neighbours cost processor time as well


def test_same_hold_out_same_shares():
    confidence, correct = scores(np.random.default_rng(8), 4, 500)
    costs = np.array([1.0, 2, 3, 4])
    assert np.array_equal(BestShares(confidence, correct, costs).at([2.0]), BestShares(confidence, correct, costs).at([2.0]))


# The promise

def share_of_broken(pool, costs, max_drop, level, n_draws, n_inputs, find):
    """Share of hold-outs, drawn with replacement from a pool, whose thresholds lose more than promised on the pool itself."""
    confidence, correct = pool
    broken = 0
    for draw in range(n_draws):
        drawn = np.random.default_rng(draw).integers(confidence.shape[1], size=n_inputs)
        thresholds = find(confidence[:, drawn], correct[:, drawn], costs, max_drop, level, draw)
        broken += 100 * correct[-1].mean() - evaluate_thresholds(confidence, correct, thresholds, costs)[0] > max_drop
    return broken / n_draws


def promise(confidence, correct, costs, max_drop, level, seed):
    return certify(confidence, correct, costs, max_drop, level, seed=seed).thresholds


def without_bound(confidence, correct, costs, max_drop, level, seed):
    """The cheapest thresholds whose loss on the images they were fitted on is small enough: no promise."""
    cheapest = None
    for shares in BestShares(confidence, correct, costs, seed=seed).at(np.linspace(costs[-1], costs[0], 100)):
        thresholds = fit_shares(confidence, shares)
        if 100 * correct[-1].mean() - evaluate_thresholds(confidence, correct, thresholds, costs)[0] <= max_drop:
            cheapest = thresholds
    return cheapest


def allowed(level, n_draws):
    """1 - level and three binomial standard errors."""
    return 1 - level + 3 * np.sqrt(level * (1 - level) / n_draws)


def test_promise_is_kept_and_a_point_without_bound_is_not():
    pool, costs = scores(np.random.default_rng(9), 3, 20000), np.array([1.0, 2, 4])
    level, n_draws = 0.8, 40   # a lower level than usual shows a wrong bound in fewer draws
    assert share_of_broken(pool, costs, 2, level, n_draws, 500, promise) <= allowed(level, n_draws)
    assert share_of_broken(pool, costs, 2, level, n_draws, 500, without_bound) > allowed(level, n_draws)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["synthetic", "msdnet_boost", "ranet_joint"])
def test_promise_is_kept_in_300_hold_outs(source):
    if source == "synthetic":
        pool, costs = scores(np.random.default_rng(10), 5, 20000), np.arange(1.0, 6)
    else:
        about, parts = load_arrays(PUBLISHED / source / "arrays_dynamic.npz")
        pool = tuple(np.concatenate([parts["valid"][i], parts["test"][i]], axis=1) for i in range(2))
        costs = np.array(about["macs"], float)
    assert share_of_broken(pool, costs, 1, 0.95, 300, 3000, promise) <= allowed(0.95, 300)
    assert share_of_broken(pool, costs, 1, 0.95, 60, 3000, without_bound) > allowed(0.95, 60)


def test_promise_saves_and_says_what_it_measured():
    confidence, correct = scores(np.random.default_rng(11), 4, 5000)
    costs = np.array([1.0, 2, 3, 4])
    found = certify(confidence, correct, costs, 3.0)
    assert found.certified and found.n_fit == found.n_tested == 2500
    assert 1 < found.mean_cost < 4
    assert found.drop <= 3
    dearer = certify(confidence, correct, costs, 3.0, 0.999)
    assert dearer.mean_cost > found.mean_cost


def test_images_that_thresholds_were_fitted_on_certify_nothing():
    confidence, correct = scores(np.random.default_rng(11), 2, 4000)
    correct[1] = True
    fitted = np.random.default_rng(0).permutation(4000)[:2000]   # as the division goes with seed 0
    correct[0], correct[0, fitted] = False, True                 # the first exit fails on all others
    assert not certify(confidence, correct, [1.0, 2], 1.0, seed=0).certified


def test_what_cannot_be_certified_is_the_whole_network():
    confidence, correct = scores(np.random.default_rng(12), 3, 60)
    found = certify(confidence, correct, [1.0, 2, 3], 0.1)
    assert not found.certified and found.mean_cost == 3 and found.drop == 0
    assert found.thresholds.tolist() == [np.inf, np.inf, -np.inf]


def test_certified_thresholds_are_of_one_seed_and_held_against_the_share_that_may_be_lost(known, monkeypatch):
    seeds, bounds = [], []
    monkeypatch.setattr(thresholds, "cross_fitted_trust", lambda *a, seed: seeds.append(seed) or 0.5)
    monkeypatch.setattr(thresholds, "is_below", lambda losses, bound, *a: bounds.append(bound) or True)
    certify(*known, COSTS, 6.0, seed=3)
    assert seeds == [3] and bounds == [0.06] * 100


def test_the_first_thresholds_that_fail_end_the_search():
    """To look on for some that pass would be a choice on the images of the test."""
    n, rng = 400, np.random.default_rng(15)
    fitted, tested = divide(n)
    confidence = rng.random((3, n)).astype(np.float32)
    correct = np.ones((3, n), bool)
    correct[0, fitted[::5]] = False
    correct[1, tested] = False
    found = certify(confidence, correct, [1.0, 2, 3], 5.0)
    assert not found.certified and found.mean_cost == 3   # though all may leave at the first exit without a loss
    losses = thresholds._losses(confidence[:, tested], correct[:, tested], np.array([-np.inf, -np.inf, -np.inf]))
    assert is_below(losses, 0.05, 0.95, 0.0)


def test_bound_by_betting_holds_and_is_not_idle():
    rng = np.random.default_rng(13)
    at_bound = rng.choice([-1, 0, 1], size=(2000, 1000), p=[0.02, 0.94, 0.04])    # mean 0.02, exactly the bound
    passed = np.mean([is_below(losses, 0.02, 0.9, 0.06) for losses in at_bound])
    assert passed <= allowed(0.9, 2000)
    below = rng.choice([-1, 0, 1], size=(200, 1000), p=[0.03, 0.94, 0.03])        # mean 0, 2.6 standard errors below
    assert np.mean([is_below(losses, 0.02, 0.9, 0.06) for losses in below]) > 0.6
    assert not any(is_below(losses, 0.02, 0.9, 0.06) for losses in rng.choice([-1, 0, 1], size=(200, 1000), p=[0, 0.94, 0.06]))


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1.0])
def test_a_wrong_guess_of_the_spread_breaks_nothing(spread):
    rng = np.random.default_rng(14)
    assert np.mean([is_below(losses, 0.02, 0.9, spread)
                    for losses in rng.choice([0, 1], size=(1000, 500), p=[0.98, 0.02])]) <= allowed(0.9, 1000)


def test_the_bound_by_betting_passes_after_as_many_losses_as_its_formula_says():
    """Of n losses of zero the wealth is (1 + stake * bound)^n; the stake depends on n, on the guess and on the cap."""
    for bound, level, spread in ((0.1, 0.9, 0.5), (0.1, 0.95, 0.05), (0.02, 0.95, 0.0), (0.3, 0.5, 0.0)):
        passed = []
        for n in range(1, 200):
            stake = min(math.sqrt(2 * math.log(1 / (1 - level)) / (n * max(spread, 1 / n))), 0.9 / (1 - bound))
            passed.append((1 + stake * bound) ** n >= 1 / (1 - level))
            assert is_below(np.zeros(n, np.int64), bound, level, spread) is passed[-1]
        assert not passed[0] and passed[-1]
    zeros = np.zeros(165, np.int64)
    assert is_below(np.append(zeros, np.ones(300, np.int64)), 0.02, 0.95, 0.0)       # once rich is enough
    assert not is_below(np.append(np.ones(300, np.int64), zeros), 0.02, 0.95, 0.0)


def test_a_loss_is_what_the_whole_network_has_right_and_the_exit_taken_has_not():
    confidence = np.array([[0.9, 0.9, 0.9, 0.1], [0.5] * 4])
    correct = np.array([[True, False, True, False], [True, True, False, True]])
    assert thresholds._losses(confidence, correct, np.array([0.5, -np.inf])).tolist() == [0, 1, -1, 0]


def test_the_hold_out_of_a_promise_is_halved_by_chance():
    for n, first in ((10, 5), (11, 5), (1, 0)):
        fitted, tested = divide(n, seed=3)
        assert len(fitted) == first and sorted([*fitted, *tested]) == list(range(n))
        assert np.array_equal(divide(n, seed=3)[0], fitted)
    assert not np.array_equal(divide(100)[0], divide(100, seed=1)[0]) and not np.array_equal(divide(100)[0], np.arange(50))


# Numbers

COSTS = [1.0, 2, 3, 4, 6]


@pytest.fixture(scope="module")
def known():
    return exit_in_the_middle_of_no_use(np.random.default_rng(21), 600)


def test_numbers_of_one_hold_out(known):
    """As this version finds them; another search, regression or division is another."""
    best = BestShares(*known, COSTS)
    assert (best.trust, best.dearest) == pytest.approx((0.99295051, 5.38833333), abs=1e-6)
    # Roundings of the processor's matrix products decide for one image more or less: 0.993927, with AVX-512 0.993948.
    assert BestShares(*known, COSTS, seed=1).trust == pytest.approx(0.99394, abs=5e-5)
    expected = [[1, 0, 0, 0, 0], [0.38810875, 0.58919941, 0.00069642, 0.00028467, 0.02171075],
                [0.25924243, 0.54986425, 0.00102495, 0.000628, 0.18924037],
                [0.11022658, 0.23559515, 0.00066831, 0.00224078, 0.65126918]]
    np.testing.assert_allclose(best.at([1.0, 1.7, 2.5, 4.5]), expected, atol=1e-6)
    np.testing.assert_allclose(thresholds.optimised_thresholds(*known, COSTS, [1.7, 4.5]),
                               [[0.66264760, 0.20169826, np.inf, np.inf, -np.inf],
                                [0.85089177, 0.80821335, np.inf, 0.82965553, -np.inf]], atol=1e-6)
    np.testing.assert_allclose(probability_right(*known)[:, :2],
                               [[0.30388299, 0.16042751], [0.82366754, 0.19149148], [0.10394637, 0.04680408],
                                [0.11286214, 0.00967188], [0.81362917, 0.5859830]], atol=1e-6)
    found = certify(*known, COSTS, 6.0, 0.8)
    np.testing.assert_allclose(found.thresholds, [0.78866047, 0.5938676, 0.5667321, np.inf, -np.inf], atol=1e-6)
    assert found[1:] == (True, 6.0, 0.8, 300, 300, pytest.approx(1.0), pytest.approx(3.06))
    other = certify(*known, COSTS, 6.0, 0.8, seed=1)
    assert (other.drop, other.mean_cost) == (pytest.approx(23 / 3), pytest.approx(2.07666667))


def corner(cost, value):
    return thresholds.Corner(cost, value, np.array([1 - cost, cost]), ())


def test_the_upper_hull_of_points():
    points = [(0.0, 0.0), (0.0, -0.1), (0.1, 0.4), (0.2, 0.2), (0.5, 0.5), (0.6, 0.9), (0.6, 0.7), (0.8, 0.9), (0.9, 0.85),
              (1.0, 1.0)]
    for order in (points, points[::-1]):
        found = thresholds._upper([corner(*point) for point in order])
        assert [(c.cost, c.value) for c in found] == [(0.0, 0.0), (0.1, 0.4), (0.6, 0.9), (1.0, 1.0)]
    level = [(0.0, 0.0), (0.6, 0.9), (0.8, 0.9)]   # to spend more for nothing
    assert [c.cost for c in thresholds._upper([corner(*point) for point in level])] == [0.0, 0.6]
    assert [c.cost for c in thresholds._upper([corner(0.0, 0.5), corner(0.5, 0.6), corner(1.0, 1.0)])] == [0.0, 1.0]
    line = [corner(0.0, 0.0), corner(0.25, 0.25), corner(1.0, 1.0)]
    assert [c.cost for c in thresholds._upper(line)] == [0.0, 1.0]   # a mixture of two is no corner


def test_a_corner_is_left_for_a_gain_beyond_rounding_alone():
    confidence = np.linspace(0.9, 0.1, 100)[None].repeat(2, axis=0)
    for gain, ranks in ((0.0, (100, 100)), (1e-6, (100, 100)), (1e-3, (0, 100))):
        value = np.ones((2, 100))
        value[0, -1] -= gain   # the least certain input gains by going on, and for the others it is the same
        solver = PriceSolver(confidence, value, np.array([1.0, 2.0]))
        assert solver.solve(0.0, solver.leave_first()).ranks == ranks


def test_the_probability_by_regression_does_not_depend_on_the_spread_of_the_logits():
    rng = np.random.default_rng(25)
    logits, correct = rng.normal(size=(3, 200)), rng.random((3, 200)) < 0.6
    one, other = (probability_right(1 / (1 + np.exp(-factor * logits)), correct) for factor in (1.5, 0.1))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_shares_between_two_corners_are_mixed_and_beyond_the_last_are_its_own():
    found = thresholds.shares_on([corner(0.2, 0.1), corner(0.6, 0.9)], np.array([0.1, 0.2, 0.3, 0.6, 0.9]))
    np.testing.assert_allclose(found, [[0.8, 0.2], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.4, 0.6]])


def test_corners_are_searched_until_their_costs_are_close(known):
    solver = PriceSolver(known[0], probability_right(*known), np.array(COSTS))
    counts = []
    for resolution in (1.0, 1 / 4, 1 / 25, 0.0):
        corners = hull(solver, resolution)
        costs = [c.cost for c in corners]
        counts.append(len(corners))
        assert costs[0] == 1.0 and costs[-1] == pytest.approx(5.38833333)
        slopes = np.diff([c.value for c in corners]) / np.diff(costs)
        assert (np.diff(slopes) < 0).all() and slopes[-1] > 0
    assert counts == [2, 6, 22, counts[-1]] and counts[-1] > 22


def test_shares_become_thresholds_and_nobody_left_over_means_that_everybody_leaves():
    confidence = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.4, 0.6, 0.8], [0.3] * 4])
    for total in (1.0, 2.0, 1 + 1e-9):
        assert fit_shares(confidence, total * np.array([0.5, 0.25, 0.25])).tolist() == [0.7, 0.8, -np.inf]
    assert fit_shares(confidence, np.array([0.5, 0.5, 0.0])).tolist() == [0.7, -np.inf, -np.inf]
    assert fit_shares(confidence, np.array([0.5, 0.39, 0.11])).tolist()[1] == -np.inf   # less than half an input is nobody
    for more in (0.3, 0.375):   # half an input is somebody
        assert fit_shares(confidence, np.array([0.5, more, 0.5 - more])).tolist()[1] > 0


# Curves and what is said of them

def test_a_paired_gain_by_hand():
    correct = np.zeros((2, 1000), bool)
    correct[0, :30], correct[1, 30:40], correct[:, 40:] = True, True, True
    confidence = np.ones((2, 1000))
    gain, (low, high) = thresholds._paired_gain(confidence, correct, np.array([-np.inf, -np.inf]), np.array([np.inf, -np.inf]))
    assert gain == pytest.approx(2.0)   # 30 won, 10 lost
    spread = 1.96 * 100 * math.sqrt((0.04 - 0.02 ** 2) / 1000)
    assert (low, high) == (pytest.approx(2 - spread, abs=0.11), pytest.approx(2 + spread, abs=0.11))
    assert [10 * low, 10 * high] == pytest.approx([round(10 * low), round(10 * high)])   # of 1000 images each is a tenth
    assert thresholds._paired_gain(confidence, correct, *[np.array([-np.inf, -np.inf])] * 2) == (0.0, [0.0, 0.0])


def test_points_of_an_optimised_curve_are_what_their_thresholds_give(known):
    new = exit_in_the_middle_of_no_use(np.random.default_rng(24), 500)
    points = thresholds.optimised_curve(*known, *new, COSTS, [4.5, 1.7])
    plain = budget_curve(*known, *new, COSTS, [4.5, 1.7])
    assert [point["budget"] for point in points] == [1.7, 4.5]
    for point, other, shares in zip(points, plain, BestShares(*known, COSTS).at([1.7, 4.5])):
        assert point["shares"] == shares.tolist()
        assert point["thresholds"] == fit_shares(known[0], shares).tolist()
        for kind, images in (("valid", known), ("test", new)):
            top1, cost, share = evaluate_thresholds(*images, point["thresholds"], COSTS)
            assert (point[f"{kind}_top1"], point[f"{kind}_mean_macs"]) == pytest.approx((top1, cost))
            assert point[f"{kind}_exit_share"] == pytest.approx(share)
        assert point["test_gain"] == pytest.approx(point["test_top1"] - other["test_top1"])
        low, high = point["test_gain_interval"]
        assert low < point["test_gain"] < high
    assert points[0]["test_gain"] == pytest.approx(6.4) and points[0]["test_gain_interval"] == pytest.approx([2.8, 10.2], abs=0.3)
    assert [point["budget"] for point in thresholds.optimised_curve(*known, *new, COSTS)] == budget_grid(COSTS).tolist()


@pytest.mark.parametrize(("points", "text"), [
    ([(10, 1.0, 0.5, 1.5), (50, 2.0, -1.0, 3.0), (90, -1.0, -2.0, -0.5)],
     "+0.50 points of test accuracy on average of 2 budgets above 40 % of the MACs (from -1.00 to +2.00); the 95 % interval lies "
     "above 0 at 0 of them, below 0 at 1"),
    ([(10, 1.0, 0.5, 1.5), (40, 3.0, 0.0, 4.0)],
     "+2.00 points of test accuracy on average of 2 budgets (from +1.00 to +3.00); the 95 % interval lies above 0 at 1 of them, "
     "below 0 at 0"),
    ([(40.1, 1.0, 0.5, 1.5), (99, 3.0, -1.0, 0.0)],
     "+2.00 points of test accuracy on average of 2 budgets (from +1.00 to +3.00); the 95 % interval lies above 0 at 1 of them, "
     "below 0 at 0")])
def test_one_line_on_a_curve(points, text):
    rows = [{"budget": budget, "test_gain": gain, "test_gain_interval": [low, high]} for budget, gain, low, high in points]
    assert thresholds.describe_gain(rows, [1.0, 2.0, 100.0]) == f"Over eq. 9 at the same budget: {text}"


def test_a_promise_as_a_point_and_in_words(known):
    new = exit_in_the_middle_of_no_use(np.random.default_rng(24), 500)
    point = thresholds.promise_point(*known, *new, COSTS, 6.0, 0.8)
    found = certify(*known, COSTS, 6.0, 0.8)
    assert point["thresholds"] == found.thresholds.tolist()
    said = {"budget": found.mean_cost, "max_drop": 6.0, "confidence_level": 0.8, "certified": True, "n_fit": 300, "n_tested": 300,
            "valid_drop": found.drop}
    assert {name: point[name] for name in said} == said
    for kind, images in (("valid", known), ("test", new)):
        assert point[f"{kind}_top1"] == pytest.approx(evaluate_thresholds(*images, point["thresholds"], COSTS)[0])
    words = thresholds.describe_promise(point, chosen_on_hold_out=False)
    assert words == ("With probability 0.8 over the draw of the held-out images, accuracy lies at most 6 points below the whole "
                     "network's on new images like the held-out ones (fitted on 300 of them, tested on 300)")
    assert thresholds.describe_promise(point, chosen_on_hold_out=True).startswith(words + "\nwarning: this epoch was chosen")
    none = thresholds.describe_promise({**point, "certified": False}, chosen_on_hold_out=False)
    assert none == ("No early exit could be certified to lose at most 6 points with 300 held-out images: these are the "
                    "thresholds of the whole network")


# Through the entry points

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.make_images(tmp_path_factory.mktemp("data") / "images", train=40, test=20)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "boost"
    assert train_cifar100.main(tiny.command(images, folder, "--valid_size", "60")) == 0
    return folder


def evaluate(images, run, *more, name=checkpoint.LATEST):
    return eval_cifar100.main(["--data-root", str(images), "--evaluate-from", str(run / name), "--device", "cpu",
                               "--threads", "1", *map(str, more)])


def read(path):
    return json.loads(path.read_text())


def test_optimised_curve_beside_the_geometric_one(images, run, tmp_path, capsys):
    assert evaluate(images, run, "--evalmode", "dynamic", "--result_dir", tmp_path) == 0
    geometric = (tmp_path / "dynamic.json").read_bytes()
    assert evaluate(images, run, "--thresholds", "optimised", "--result_dir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "thresholds chosen for accuracy" in printed and "Over eq. 9 at the same budget" in printed
    assert (tmp_path / "dynamic.json").read_bytes() == geometric   # the paper's stays as it is
    before, now = read(tmp_path / "dynamic.json"), read(tmp_path / "dynamic_optimised.json")
    assert now["family"] == "optimised" and len(now["points"]) == 40
    for plain, point in zip(before["points"], now["points"]):
        assert point["budget"] == plain["budget"]
        assert point["test_gain"] == pytest.approx(point["test_top1"] - plain["test_top1"])
        low, high = point["test_gain_interval"]
        assert low <= point["test_gain"] <= high
    assert plots.main([str(tmp_path), "--output", str(tmp_path)]) == 0
    names = labels([result for result in read_evaluations(tmp_path) if "points" in result], name_family=True)
    assert [name.split(", ")[-1] for name in names] == ["eq. 9", "optimised thresholds"]


def test_report_has_optimised_curves_in_a_table_of_their_own(images, run, tmp_path, capsys):
    for kind in ("geometric", "optimised"):
        assert evaluate(images, run, "--evalmode", "dynamic", "--thresholds", kind, "--result_dir", tmp_path) == 0
    capsys.readouterr()
    tables, left_out = report.budget_tables([tmp_path])
    assert not left_out and [("accuracy" in table.title, len(table.rows)) for table in tables] == [(False, 2), (True, 2)]


def test_real_time_images_and_export_take_the_thresholds_asked_for(images, run, capsys):
    (run / "dynamic_promise.json").unlink(missing_ok=True)
    macs = read(run / "anytime.json")["macs"]
    budget = round(sum(macs) / 2)
    assert evaluate(images, run, "--thresholds", "optimised", "--budget", budget) == 0
    stored, = read(run / "dynamic_optimised.json")["points"]
    assert evaluate(images, run, "--evalmode", "realtime", "--thresholds", "optimised", "--budget", budget) == 0
    timed = read(run / "realtime_optimised.json")
    assert timed["family"] == "optimised"
    assert timed["points"][0]["thresholds"] == pytest.approx(stored["thresholds"], abs=1e-5)
    picture = str(next((images / "test").rglob("*.png")))
    capsys.readouterr()
    assert evaluate(images, run, "--images", picture, "--thresholds", "optimised", "--budget", budget) == 0
    assert "Stored optimised thresholds for" in capsys.readouterr().out
    assert evaluate(images, run, "--images", picture, "--thresholds", "optimised", "--budget", round(macs[0] * 1.0001)) == 0
    assert "Optimised thresholds for" in capsys.readouterr().out
    model = str(run / checkpoint.LATEST)
    assert export.main([model, str(run / "programs"), "--thresholds", "optimised"]) == 0
    described = read(run / "programs" / "model.json")
    assert described["thresholds"] == "optimised" and described["budgets"][0]["thresholds"] == stored["thresholds"]
    with pytest.raises(SystemExit):
        export.main([model, str(run / "others"), "--thresholds", "promise"])
    assert "--evalmode dynamic --max_drop P" in capsys.readouterr().err


def test_promise_through_the_entry_points(images, run, tmp_path, capsys):
    assert evaluate(images, run, "--max_drop", 45, "--confidence_level", 0.6) == 0
    printed = capsys.readouterr().out
    assert "With probability 0.6" in printed and "warning" not in printed
    point, = read(run / "dynamic_promise.json")["points"]
    assert (point["max_drop"], point["confidence_level"], point["certified"]) == (45, 0.6, True)
    assert point["n_fit"] == point["n_tested"] == 30
    picture = str(next((images / "test").rglob("*.png")))
    assert evaluate(images, run, "--images", picture, "--max_drop", 45, "--confidence_level", 0.6) == 0
    assert "lose at most 45 points" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate(images, run, "--images", picture, "--max_drop", 44)
    assert "make it first" in capsys.readouterr().err
    assert export.main([str(run / checkpoint.LATEST), str(tmp_path / "programs"), "--thresholds", "promise"]) == 0
    described = read(tmp_path / "programs" / "model.json")
    assert described["thresholds"] == "promise"
    assert described["budgets"] == [{"macs": point["budget"], "thresholds": point["thresholds"], "max_drop": 45.0,
                                     "confidence_level": 0.6, "test_top1": point["test_top1"]}]


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_promise_in_real_time_is_the_simulated_one(images, run, tmp_path, capsys, monkeypatch, cost):
    monkeypatch.setattr(realtime, "measure_latency", lambda model, images: np.array([2.0, 6.0]))
    flags = "--max_drop", 45, "--confidence_level", 0.6, "--result_dir", tmp_path
    assert evaluate(images, run, *flags) == 0
    simulated, = read(tmp_path / "dynamic_promise.json")["points"]
    capsys.readouterr()
    assert evaluate(images, run, *flags, "--evalmode", "realtime", "--cost", cost, "--predictions", tmp_path / "all.csv") == 0
    printed = capsys.readouterr().out
    assert "With probability 0.6" in printed and "that keep a promise" in printed and "tested part, " in printed
    result = read(tmp_path / "realtime_promise.json")
    point, = result["points"]
    assert result["family"] == "promise" and point["thresholds"] == pytest.approx(simulated["thresholds"], abs=1e-5)
    same = "max_drop", "confidence_level", "certified", "n_fit", "n_tested", "valid_drop"
    assert [point[name] for name in same] == [simulated[name] for name in same]
    assert point["exit_share"] == pytest.approx(simulated["test_exit_share"])
    if cost == "latency":
        assert 2 <= point["budget"] <= 6 and 2 <= point["valid_mean_cost"] <= 6
    else:
        assert point["budget"] == pytest.approx(simulated["budget"])
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 61


def test_promise_that_cannot_be_made_and_one_on_images_that_chose_the_epoch(images, run, tmp_path, capsys):
    assert evaluate(images, run, "--max_drop", 0.1, "--result_dir", tmp_path) == 0
    assert "No early exit could be certified" in capsys.readouterr().out
    content = checkpoint.load(run / checkpoint.BEST)
    torch.save({**content, "epoch_kind": "best on hold-out"}, tmp_path / "model_best.pth")
    assert evaluate(images, tmp_path, "--max_drop", 45, name="model_best.pth") == 0
    assert "this epoch was chosen on the held-out images" in capsys.readouterr().out


def test_published_arrays_give_the_optimised_curve_and_keep_it_up_to_date(tmp_path, capsys):
    for name in ("arrays_dynamic.npz", "dynamic.json"):
        shutil.copy(PUBLISHED / "msdnet_boost" / name, tmp_path)
    before = read(tmp_path / "dynamic.json")["points"]
    assert publish.main([str(tmp_path)]) == 0 and not (tmp_path / "dynamic_optimised.json").exists()
    for point, committed in zip(read(tmp_path / "dynamic.json")["points"], before, strict=True):   # of another processor
        assert {name: pytest.approx(value, rel=1e-9) for name, value in committed.items()} == point
    assert publish.main([str(tmp_path), "--optimised"]) == 0
    assert "of 38 budgets above 40 % of the MACs" in capsys.readouterr().out
    path = tmp_path / "dynamic_optimised.json"
    path.write_text("{}")   # as of other weights
    assert publish.main([str(tmp_path)]) == 0
    assert len(read(path)["points"]) == 40
