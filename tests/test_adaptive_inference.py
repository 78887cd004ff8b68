"""Exit rates, thresholds and curves, against the released program's numbers and against a per-sample reference."""
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import adaptive_inference as ai
from utils.core.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "data" / "adaptive_k6.json").read_text())
COSTS = GOLDEN["flops"]
examples = settings(max_examples=60, deadline=None, derandomize=True)


def golden_split(rng, n_samples):
    """Synthetic softmax scores whose correct class gains on the others from exit to exit."""
    n_exits, n_classes = GOLDEN["K"], GOLDEN["C"]
    target = rng.randint(0, n_classes, n_samples)
    difficulty = rng.uniform(0.2, 1.8, n_samples)
    z = rng.standard_normal((n_exits, n_samples, n_classes))
    z[:, np.arange(n_samples), target] += np.linspace(1.0, 3.5, n_exits)[:, None] * difficulty
    scores = np.exp(z - z.max(-1, keepdims=True))
    scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    return scores.max(-1), scores.argmax(-1) == target


@pytest.fixture(scope="module")
def golden_inputs():
    rng = np.random.RandomState(GOLDEN["seed"])
    return *golden_split(rng, GOLDEN["N_val"]), *golden_split(rng, GOLDEN["N_test"])


@pytest.fixture(scope="module")
def golden_points(golden_inputs):
    return ai.released_sweep(*golden_inputs, COSTS)


# The reference: one sample after the other, as the rule is worded.

def reference_thresholds(confidence, quotas, nobody, too_few_left):
    n_exits, n_samples = confidence.shape
    thresholds, left = [], list(range(n_samples))
    for k in range(n_exits - 1):
        present = sorted((float(confidence[k, i]) for i in left), reverse=True)
        if quotas[k] == 0:
            threshold = nobody
        elif quotas[k] > len(present):
            threshold = too_few_left
        else:
            threshold = present[quotas[k] - 1]
        left = [i for i in left if float(confidence[k, i]) < threshold]
        thresholds.append(threshold)
    return [*thresholds, -nobody]


def reference_evaluation(confidence, correct, thresholds, costs):
    n_exits, n_samples = confidence.shape
    exits = [next(k for k in range(n_exits) if k == n_exits - 1 or float(confidence[k, i]) >= thresholds[k])
             for i in range(n_samples)]
    accuracy = 100 * sum(bool(correct[k, i]) for i, k in enumerate(exits)) / n_samples
    return exits, accuracy, sum(costs[k] for k in exits) / n_samples


@st.composite
def confidences(draw, ties=True):
    """(n_exits, N) float32; with ties, drawn from so few values that most of them repeat."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 40)))
    if ties:
        return draw(arrays(np.float32, shape, elements=st.sampled_from([0.25, 0.5, 0.75, 1.0])))
    return np.random.default_rng(draw(st.integers(0, 2 ** 32))).permuted(
        np.tile(np.linspace(0.01, 1, shape[1], dtype=np.float32), (shape[0], 1)), axis=1)


@st.composite
def cumulative_costs(draw):
    return np.cumsum(draw(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12)))


def random_shares(n_exits, seed):
    return np.random.default_rng(seed).dirichlet(np.full(n_exits, 0.5))


# The released sweep

@pytest.mark.parametrize("ours, released", [
    ("thresholds", "thresholds"), ("val_accuracy", "val_acc"), ("test_accuracy", "test_acc"),
    ("mean_cost", "test_expected_flops"), ("flat_test_accuracy", "flat_test_acc")])
def test_released_sweep_equals_the_released_program_exactly(golden_points, ours, released):
    assert [point[ours] for point in golden_points] == [point[released] for point in GOLDEN["sweep"]]


def test_released_shares_equal_the_released_programs_to_the_last_place_and_give_its_quotas(golden_points):
    for point, released in zip(golden_points, GOLDEN["sweep"], strict=True):
        # float32 logarithms and exponentials differ in the last place between processors, in the released program too
        np.testing.assert_allclose(point["shares"], released["probs"], rtol=5e-7)
        quotas = np.floor(np.float32(GOLDEN["N_val"]) * np.asarray(point["shares"], np.float32))[:-1]
        assert quotas.tolist() == released["requested_counts"]


def test_released_thresholds_send_the_released_numbers_of_inputs_to_each_exit(golden_inputs, golden_points):
    val_confidence, val_correct, test_confidence, test_correct = golden_inputs
    for point, released in zip(golden_points, GOLDEN["sweep"], strict=True):
        for split, confidence, correct in (("val", val_confidence, val_correct),
                                           ("test", test_confidence, test_correct)):
            accuracy, cost, shares = ai.evaluate_thresholds(confidence, correct, point["thresholds"], COSTS)
            assert np.rint(shares * confidence.shape[1]).tolist() == released[f"{split}_exit_counts"]
            assert accuracy == released[f"{split}_acc"]
            assert cost == pytest.approx(released[f"{split}_expected_flops"], rel=1e-6)


def test_released_sweep_has_39_points_with_exactly_the_documented_keys(golden_points):
    keys = {"shares", "thresholds", "val_accuracy", "test_accuracy", "mean_cost", "flat_test_accuracy"}
    assert len(golden_points) == 39 and all(point.keys() == keys for point in golden_points)
    json.dumps(golden_points, allow_nan=False)


@examples
@given(confidences(), st.integers(0, 1000))
def test_released_sweep_with_ties_lets_nobody_leave_where_the_quota_cannot_be_filled(confidence, seed):
    correct = np.random.default_rng(seed).random(confidence.shape) < 0.5
    costs = np.arange(1.0, len(confidence) + 1)
    for point in ai.released_sweep(confidence, correct, confidence, correct, costs):
        quotas = np.floor(np.float32(confidence.shape[1]) * np.asarray(point["shares"], np.float32)).astype(int)
        assert point["thresholds"] == reference_thresholds(confidence, quotas, 1e8, 1e8)
        _, accuracy, cost = reference_evaluation(confidence, correct, point["thresholds"], costs)
        assert point["val_accuracy"] == point["test_accuracy"] == pytest.approx(accuracy)
        assert point["mean_cost"] == pytest.approx(cost, rel=1e-6)


def test_the_released_rule_for_unfilled_quotas_misses_the_budget_that_ours_keeps():
    # Eight of ten inputs are certain and leave together at exit 0; the next quotas ask for more than is left.
    confidence = np.tile(np.float32([1.0] * 8 + [0.5, 0.4]), (4, 1))
    shares = [0.25, 0.25, 0.25, 0.25]
    assert ai.fit_thresholds(confidence, shares).tolist() == [1.0, 0.4000000059604645, -math.inf, -math.inf]
    quotas = np.array([2, 3, 3, 2])
    assert ai.fit_thresholds(confidence, np.array(quotas) / 10).tolist() == [1.0, -math.inf, -math.inf, -math.inf]
    assert ai._fit_quotas(confidence, quotas, none_leave=1e8, too_few_left=1e8).tolist() == [1.0, 1e8, 1e8, -1e8]


def test_sweep_over_ten_exits_and_100000_inputs_takes_about_a_second_at_most():
    rng = np.random.default_rng(0)
    confidence = rng.random((2, 10, 50_000), dtype=np.float32)
    correct = rng.random((2, 10, 50_000)) < 0.7
    seconds = []
    for _ in range(3):
        start = time.process_time()
        ai.released_sweep(confidence[0], correct[0], confidence[1], correct[1], np.arange(1, 11) * 1e7)
        seconds.append(time.process_time() - start)  # of this process alone, so that a busy machine matters less
    assert min(seconds) < 1.0  # 0.17 s on an idle core


# Newton's method

@examples
@given(cumulative_costs(), st.floats(0, 1))
def test_solved_exit_rate_spends_the_budget(costs, position):
    budget = costs[0] + position * (costs[-1] - costs[0])
    p = ai.solve_exit_rate(costs, budget)
    assert 0 <= p <= 1
    assert ai.mean_cost(p, costs) == pytest.approx(budget, rel=2e-9)
    spent = ai.exit_shares(p, len(costs)) @ costs  # the shares of eq. 9 cost what its closed form says
    assert spent == pytest.approx(budget, rel=1e-8)


@examples
@given(cumulative_costs(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_means_a_smaller_exit_rate(costs, one, other):
    low, high = np.sort([one, other]) * (costs[-1] - costs[0]) + costs[0]
    assert ai.solve_exit_rate(costs, low) >= ai.solve_exit_rate(costs, high) - 1e-6


@pytest.mark.parametrize("budget", [15.2, 20.0, 60.0, 121.0])
def test_exit_rate_agrees_with_bisection(budget):
    costs = [15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.04, 110.12, 121.68]
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if ai.mean_cost(middle, costs) > budget else (low, middle)
    assert ai.solve_exit_rate(costs, budget) == pytest.approx(low, abs=1e-8)


def test_exit_rate_at_the_ends_of_the_range_and_a_rounding_error_beyond():
    costs = [10, 30, 70]
    assert ai.solve_exit_rate(costs, 10) == ai.solve_exit_rate(costs, 10 * (1 - 1e-12)) == 1.0
    assert ai.solve_exit_rate(costs, 70) == ai.solve_exit_rate(costs, 70 * (1 + 1e-12)) == 0.0


def test_the_exit_rate_does_not_depend_on_the_unit_of_the_costs():
    costs = np.array([10.0, 30.0, 70.0])
    assert ai.solve_exit_rate(1e-7 * costs, 3e-6) == pytest.approx(ai.solve_exit_rate(costs, 30.0), rel=1e-8)


def test_one_exit_takes_everything():
    assert ai.solve_exit_rate([5.0], 5.0) == 1.0
    assert ai.exit_shares(1.0, 1).tolist() == [1.0]
    assert ai.fit_thresholds(np.float32([[0.3, 0.9]]), [1.0]).tolist() == [-math.inf]


def test_exits_that_cost_nothing_do_not_stop_the_solver():
    costs = [10.0] * 9 + [20.0]
    p = ai.solve_exit_rate(costs, 10.0001)
    assert ai.mean_cost(p, costs) == pytest.approx(10.0001, rel=1e-9)


@pytest.mark.parametrize("budget", [9.99, 70.01, 0.0, -10.0, math.nan, math.inf, -math.inf])
def test_budget_out_of_range_is_refused_with_the_range(budget):
    with pytest.raises(UserError, match="10 to 70"):
        ai.solve_exit_rate([10, 30, 70], budget)


@pytest.mark.parametrize("costs", [[], [[1.0, 2.0]], [2.0, 1.0], [0.0, 1.0], [1.0, math.nan], [1.0, math.inf], [-1.0, 1.0]])
def test_costs_that_are_not_cumulative_are_refused(costs):
    with pytest.raises(ValueError, match="costs"):
        ai.solve_exit_rate(costs, 1.0)


@examples
@given(st.floats(0, 1), st.integers(1, 20))
def test_exit_shares_sum_to_one_and_each_exit_lets_the_same_share_go(p, n_exits):
    shares = ai.exit_shares(p, n_exits)
    assert shares.shape == (n_exits,) and np.all(shares >= 0)
    assert shares.sum() == pytest.approx(1.0)
    reaching = 1.0 - np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    np.testing.assert_allclose(shares[:-1], p * reaching[:-1], atol=1e-12)


def test_exit_rates_and_numbers_of_exits_that_make_no_sense_are_refused():
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="exit rate"):
            ai.exit_shares(p, 3)
    with pytest.raises(ValueError, match="n_exits"):
        ai.exit_shares(0.5, 0)


# Thresholds

@examples
@given(confidences(), st.integers(0, 1000))
def test_thresholds_and_evaluation_equal_the_per_sample_reference_with_heavy_ties(confidence, seed):
    n_exits, n_samples = confidence.shape
    shares = random_shares(n_exits, seed)
    quotas = [math.floor(share * n_samples + 1e-9) for share in shares]
    thresholds = ai.fit_thresholds(confidence, shares)
    assert thresholds.tolist() == reference_thresholds(confidence, quotas, math.inf, -math.inf)

    costs = np.cumsum(np.random.default_rng(seed).integers(1, 1000, n_exits))
    correct = np.random.default_rng(seed).random(confidence.shape) < 0.5
    exits, accuracy, cost = reference_evaluation(confidence, correct, thresholds, costs)
    assert ai.exit_index(confidence, thresholds).tolist() == exits
    measured = ai.evaluate_thresholds(confidence, correct, thresholds, costs)
    assert measured[0] == pytest.approx(accuracy) and measured[1] == pytest.approx(cost)
    np.testing.assert_allclose(measured[2], np.bincount(exits, minlength=n_exits) / n_samples)


@examples
@given(confidences(ties=False), st.floats(0, 1))
def test_fitted_thresholds_spend_the_budget_on_the_hold_out_up_to_quota_rounding(confidence, position):
    n_exits, n_samples = confidence.shape
    costs = np.cumsum(np.arange(n_exits, 0, -1)) * 1e6
    budget = costs[0] + position * (costs[-1] - costs[0])
    shares = ai.exit_shares(ai.solve_exit_rate(costs, budget), n_exits)
    thresholds = ai.fit_thresholds(confidence, shares)
    _, cost, exit_share = ai.evaluate_thresholds(confidence, np.ones(confidence.shape, bool), thresholds, costs)
    # Each exit but the last lets at most one input too few go; those are never cheaper than asked for.
    assert np.all(np.abs(exit_share - shares)[:-1] <= 1 / n_samples + 1e-9)
    assert budget * (1 - 1e-6) <= cost <= budget * (1 + 1e-6) + (n_exits - 1) * (costs[-1] - costs[0]) / n_samples


FLOATS = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0]))


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=FLOATS), st.integers(0, 2 ** 32 - 1))
def test_thresholds_of_any_confidences_equal_the_per_sample_reference(confidence, seed):
    n_exits, n_samples = confidence.shape
    shares = random_shares(n_exits, seed)
    thresholds = ai.fit_thresholds(confidence, shares)
    quotas = [int(share * n_samples + 1e-9) for share in shares]
    assert thresholds.tolist() == reference_thresholds(confidence, quotas, np.inf, -np.inf)
    exits, _, _ = reference_evaluation(confidence, confidence > 0.5, thresholds, range(1, n_exits + 1))
    assert ai.exit_index(confidence, thresholds).tolist() == exits


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(0, 1, width=32)), st.data())
def test_one_confidence_that_is_no_number_is_enough_to_be_refused(confidence, data):
    place = tuple(data.draw(st.integers(0, size - 1)) for size in confidence.shape)
    confidence[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    with pytest.raises(ValueError):
        ai.fit_thresholds(confidence, random_shares(len(confidence), 0))


def test_quotas_forgive_products_just_below_a_whole_number():
    confidence = np.linspace(0, 1, 100, dtype=np.float32)[None].repeat(2, 0)
    assert 0.29 * 100 < 29
    assert (ai.exit_index(confidence, ai.fit_thresholds(confidence, [0.29, 0.71])) == 0).sum() == 29


def test_thresholds_keep_the_type_of_the_confidence_so_that_comparisons_are_exact():
    confidence = np.float32([[0.1, 0.7, 0.3], [0.2, 0.9, 0.4]])
    thresholds = ai.fit_thresholds(confidence, [1 / 3, 2 / 3])
    assert thresholds.dtype == np.float32 and thresholds[0] == confidence[0, 1]
    assert ai.exit_index(confidence, thresholds).tolist() == [1, 0, 1]
    # A threshold a hair above the stored float32 keeps its input, though it would round to the same float32.
    above = np.float64(confidence[0, 1]) + 1e-12
    assert ai.exit_index(confidence, np.array([above, -np.inf])).tolist() == [1, 1, 1]


@examples
@given(confidences())
def test_one_share_takes_all_inputs(confidence):
    n_exits = len(confidence)
    for k in range(n_exits):
        thresholds = ai.fit_thresholds(confidence, np.eye(n_exits)[k])
        assert np.all(thresholds[:k] == np.inf)
        assert np.all(ai.exit_index(confidence, thresholds) == k)


def test_torch_tensors_give_the_same_as_arrays(golden_inputs, golden_points):
    tensors = [torch.from_numpy(values) for values in golden_inputs]
    assert ai.released_sweep(*tensors, torch.tensor(COSTS)) == golden_points
    shares = ai.exit_shares(0.3, GOLDEN["K"])
    from_array = ai.fit_thresholds(golden_inputs[0], shares)
    from_tensor = ai.fit_thresholds(tensors[0].requires_grad_(), torch.from_numpy(shares))
    assert from_array.tolist() == from_tensor.tolist()
    one = ai.evaluate_thresholds(tensors[2], tensors[3], torch.from_numpy(from_array), COSTS)
    other = ai.evaluate_thresholds(golden_inputs[2], golden_inputs[3], from_array, COSTS)
    assert one[:2] == other[:2] and one[2].tolist() == other[2].tolist()


@pytest.mark.parametrize("confidence, message", [
    (np.array([[0.5, np.nan], [0.5, 0.5]]), "not finite"), (np.array([[0.5, np.inf], [0.5, 0.5]]), "not finite"),
    (np.zeros((2, 0)), "non-empty"), (np.zeros((0, 2)), "non-empty"), (np.zeros(2), "n_exits"),
    (np.zeros((2, 2), int), "floats")])
def test_bad_confidences_are_refused(confidence, message):
    correct = np.ones(np.shape(confidence), bool)
    for call in (lambda: ai.fit_thresholds(confidence, [0.5, 0.5]),
                 lambda: ai.evaluate_thresholds(confidence, correct, [0.5, -np.inf], [1, 2]),
                 lambda: ai.released_sweep(confidence, correct, confidence, correct, [1, 2])):
        with pytest.raises(ValueError, match=message):
            call()


def test_mismatched_shapes_and_values_are_refused():
    confidence, correct = np.full((2, 3), 0.5), np.ones((2, 3), bool)
    for shares in ([1.0], [0.5, 0.6], [1.5, -0.5], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="shares"):
            ai.fit_thresholds(confidence, shares)
    with pytest.raises(ValueError, match="correct"):
        ai.evaluate_thresholds(confidence, correct[:, :2], [0.5, 0], [1, 2])
    with pytest.raises(ValueError, match="bool"):
        ai.evaluate_thresholds(confidence, correct.astype(float), [0.5, 0], [1, 2])
    for thresholds in ([0.5], [np.nan, 0.0]):
        with pytest.raises(ValueError, match="thresholds"):
            ai.evaluate_thresholds(confidence, correct, thresholds, [1, 2])
    with pytest.raises(ValueError, match="costs"):
        ai.evaluate_thresholds(confidence, correct, [0.5, 0], [1, 2, 3])
    with pytest.raises(ValueError, match="number of exits"):
        ai.released_sweep(confidence, correct, confidence[:1], correct[:1], [1, 2])
    with pytest.raises(ValueError, match="costs"):
        ai.released_sweep(confidence, correct, confidence, correct, [1, 2, 3])


def test_what_needs_a_network_is_found_under_the_public_name():
    from utils.evaluation import early_exit
    assert ai.EarlyExit is early_exit.EarlyExit and ai.Exits is early_exit.Exits
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ai.Nothing  # noqa: B018
    assert not hasattr(ai, "SIZES_PER_DOUBLING")   # of the same module, and none of these names


# Curves

def test_budget_curve_covers_the_range_with_40_budgets_and_keeps_each_of_them(golden_inputs):
    points = ai.budget_curve(*golden_inputs, COSTS)
    assert [point["budget"] for point in points] == pytest.approx(np.linspace(COSTS[0], COSTS[-1], 40))
    for point in points:
        quota_rounding = (COSTS[-1] - COSTS[0]) * 5 / GOLDEN["N_val"]  # at most one input too late at each exit
        assert point["budget"] * (1 - 1e-9) <= point["valid_mean_macs"] <= point["budget"] + quota_rounding
        assert ai.mean_cost(point["p"], COSTS) == pytest.approx(point["budget"], rel=2e-9)
        going_on = 1 - point["p"]
        assert point["shares"] == pytest.approx([*(point["p"] * going_on ** n for n in range(5)), going_on ** 5])
        assert sum(point["test_exit_share"]) == pytest.approx(1)
    assert points[0]["valid_exit_share"][0] == 1.0 and points[-1]["test_exit_share"][-1] == 1.0


def test_flat_curve_keeps_thresholds_accuracy_and_cost_until_the_hold_out_improves(golden_inputs):
    budgets = np.linspace(COSTS[0], COSTS[-1], 60)
    plain = ai.budget_curve(*golden_inputs, COSTS, budgets)
    flat = ai.budget_curve(*golden_inputs, COSTS, budgets, flat=True)
    assert flat != plain
    best = plain[0]
    for was, now in zip(plain, flat, strict=True):
        best = was if was["valid_top1"] > best["valid_top1"] else best
        assert now == {**best, "budget": was["budget"]}


def test_flat_released_curve_keeps_the_accuracies_but_prints_the_new_cost(golden_inputs, golden_points):
    flat = ai.released_curve(*golden_inputs, COSTS, flat=True)
    assert [point["test_top1"] for point in flat] == [point["flat_test_accuracy"] for point in golden_points]
    assert [point["test_mean_macs"] for point in flat] == [point["mean_cost"] for point in golden_points]
    plain = ai.released_curve(*golden_inputs, COSTS)
    assert [point["test_top1"] for point in plain] == [point["test_accuracy"] for point in golden_points]
    assert plain[0].keys() == ai.budget_curve(*golden_inputs, COSTS, [2e7])[0].keys()


def test_points_of_the_released_sweep_say_their_q(golden_inputs):
    assert [point["p"] for point in ai.released_curve(*golden_inputs, COSTS)] == [step / 20 for step in range(1, 40)]


def test_the_flat_sweep_begins_with_the_first_point_even_where_no_answer_is_right():
    confidence, wrong = np.linspace(0, 1, 20, dtype=np.float32).reshape(2, 10), np.zeros((2, 10), bool)
    points = ai.released_sweep(confidence, wrong, confidence, ~wrong, [1, 2])
    assert {point["flat_test_accuracy"] for point in points} == {100.0}


def test_patience_lets_inputs_leave_where_so_many_exits_in_a_row_agree():
    valid = np.float32([[1, 1, 1], [2, 1, 1], [3, 2, 1]])   # rows: exits; columns: inputs
    test = np.float32([[1, 1], [1, 2], [1, 3]])
    right = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 0]], bool)
    first, second, third = ai.patience_curve(valid, right, test, right[:, :2], [10, 20, 50])
    assert [point["patience"] for point in (first, second, third)] == [1, 2, 3]
    assert all(point["budget"] is None for point in (first, second, third))
    assert first["valid_exit_share"] == first["test_exit_share"] == [1, 0, 0]
    assert (first["valid_mean_macs"], first["valid_top1"]) == (10, pytest.approx(100 / 3))
    assert second["valid_exit_share"] == pytest.approx([0, 1 / 3, 2 / 3])   # the last input never has two in a row
    assert second["valid_mean_macs"] == 40 and second["valid_top1"] == pytest.approx(200 / 3)
    assert (second["test_exit_share"], second["test_mean_macs"], second["test_top1"]) == ([0, 0.5, 0.5], 35, 50)
    assert third["valid_exit_share"] == third["test_exit_share"] == [0, 0, 1]


def test_of_three_sizes_each_is_held_against_both_others():
    sizes = [curve("small", [(10, 60, 1), (20, 65, 1)]), curve("middle", [(10, 58, 1), (20, 66, 1)]),
             curve("large", [(10, 50, 1), (20, 67, 1)])]
    assert [(point["budget"], point["model"]) for point in ai.combine_sizes(sizes)] == [(10, "small"), (20, "large")]


def curve(name, points, split_hash="s", family="eq9"):
    return {"name": name, "split_hash": split_hash, "family": family, "flat": False,
            "points": [{"budget": b, "valid_mean_macs": b, "valid_top1": v, "test_top1": t} for b, v, t in points]}


def test_combined_sizes_are_chosen_by_hold_out_accuracy_never_by_test_accuracy():
    small = curve("small", [(10, 60, 90), (20, 65, 90), (30, 66, 90)])
    large = curve("large", [(20, 64, 50), (30, 70, 50), (40, 72, 50)])
    combined = ai.combine_sizes([large, small])
    assert [(point["budget"], point["model"]) for point in combined] == [
        (10, "small"), (20, "small"), (30, "large"), (40, "large")]


def test_a_size_is_judged_between_and_beyond_its_own_points_and_equals_count_once():
    small = curve("small", [(10, 60, 1), (20, 70, 1)])
    large = curve("large", [(15, 64, 2), (18, 67, 2), (25, 70, 2), (30, 71, 2)])
    # At budget 15 the small one promises 65, at 18 it promises 68, from 20 on 70.
    assert [point["budget"] for point in ai.combine_sizes([small, large])] == [10, 20, 30]
    twin = curve("twin", [(10, 60, 3), (20, 70, 3)])
    assert [point["model"] for point in ai.combine_sizes([small, twin])] == ["small", "small"]


def test_points_may_come_in_any_order_and_a_sweep_without_budgets_stands_at_its_hold_out_cost():
    small = curve("small", [(30, 66, 1), (20, 65, 1), (10, 60, 1)])   # as the released sweep has them, dearest first
    large = curve("large", [(40, 72, 2), (25, 65, 2), (15, 64, 2)])
    for points in (small["points"], large["points"]):
        for point in points:
            point |= {"budget": None, "test_mean_macs": 100 - point["valid_mean_macs"]}
    combined = ai.combine_sizes([small, large])
    # At 15 the small one promises 62.5, at 25 it promises 65.5 and the large one 65; at 20 the large one promises 64.5, and at 30
    # 65 + 7 / 3.
    assert [(point["valid_mean_macs"], point["model"]) for point in combined] == [
        (10, "small"), (15, "large"), (20, "small"), (40, "large")]


@pytest.mark.parametrize("one, other, message", [
    ({"split_hash": None}, {"split_hash": None}, "split_hash"), ({"flat": True}, {}, "flat"), ({}, {"flat": True}, "flat")])
def test_sizes_without_a_hold_out_and_flat_beside_other_curves_are_not_combined(one, other, message):
    with pytest.raises(UserError, match=f"differ in {message}"):
        ai.combine_sizes([{**curve("a", [(1, 1, 1)]), **one}, {**curve("b", [(1, 1, 1)]), **other}])


@pytest.mark.parametrize("other, message", [
    (curve("b", [(1, 1, 1)], split_hash="t"), "split_hash"), (curve("b", [(1, 1, 1)], split_hash=None), "split_hash"),
    (curve("b", [(1, 1, 1)], family="released"), "family")])
def test_sizes_of_different_splits_or_families_are_not_combined(other, message):
    with pytest.raises(UserError, match=message):
        ai.combine_sizes([curve("a", [(1, 1, 1)]), other])
