"""Which score is best: scores are ordered as they should be, and a better one is found to be better."""
import numpy as np
import pytest
import torch

from adaptive_inference import budget_grid
from utils.evaluation.confidence import agreement as agreement_of_logits
from utils.evaluation.published import Arrays
from utils.evaluation.scores import _accuracy, agreement, compare_scores, scores_of
from utils.evaluation.thresholds import BestShares

COSTS = [1.0, 2.0, 3.0, 4.0]


def arrays(seed, n=4000):
    """Confidence tells little of what is right, margin much, entropy nothing."""
    draw = np.random.default_rng(seed)
    easy = draw.normal(size=n)
    correct = draw.random((4, n)) < 1 / (1 + np.exp(-(easy + np.arange(4)[:, None])))
    margin = 1 / (1 + np.exp(-easy + 0.1 * draw.normal(size=(4, n))))
    confidence = 1 / (1 + np.exp(-easy + 2 * draw.normal(size=(4, n))))
    details = {"margin": margin, "entropy": draw.random((4, n)), "prediction": np.where(correct, 0, draw.integers(1, 9, (4, n)))}
    return Arrays(confidence.astype(np.float32), correct, details)


def test_agreement_is_that_of_the_policy():
    logits = torch.randn(5, 300, 3, generator=torch.Generator().manual_seed(0))
    assert agreement(logits.argmax(dim=2).numpy()).tolist() == agreement_of_logits(logits).tolist()


def test_scores_grow_with_certainty():
    given = arrays(0)
    found = scores_of(given)
    assert np.array_equal(found["confidence"], given.confidence) and np.array_equal(found["margin"], given.details["margin"])
    assert np.array_equal(np.argsort(found["entropy"]), np.argsort(-given.details["entropy"]))
    same = given.details["prediction"][1:] == given.details["prediction"][:-1]
    agree = found["agreement with the exit before, then confidence"]
    assert agree[1:][same].min() > agree[1:][~same].max() and np.allclose(agree[0], given.confidence[0] + 1)
    in_a_row, numbers = found["exits in a row that agree, then confidence"], agreement(given.details["prediction"])
    assert all(in_a_row[numbers == n + 1].min() > in_a_row[numbers == n].max() for n in (1, 2))
    order = np.argsort(given.confidence[2][same[1]])
    assert np.array_equal(order, np.argsort(agree[2][same[1]]))


def test_a_better_score_gains_and_a_worse_one_loses():
    gains = compare_scores(arrays(1), arrays(2), COSTS)
    for kind in ("geometric", "optimised"):
        assert gains["confidence"][kind] == (0, 0, 0)
        assert gains["margin"][kind].mean > 0.5 and gains["entropy"][kind].mean < -0.5
        assert all(gain[kind].smallest <= gain[kind].mean <= gain[kind].largest for gain in gains.values())


def test_budgets_beyond_the_last_point_have_its_accuracy():
    held_out, correct = np.tile(np.linspace(0, 1, 10), (2, 1)), np.array([[True] * 10, [False] * 10])
    shares, budgets = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1.25, 1.9])
    found = _accuracy(held_out, held_out, correct, np.array([1.0, 2.0]), shares, budgets)
    assert found == pytest.approx([75, 50])
    # New inputs of another kind leave where the thresholds of the hold-out say: here nobody early.
    assert _accuracy(held_out, held_out / 9, correct, np.array([1.0, 2.0]), shares[1:], budgets) == pytest.approx([0, 0])


def test_optimised_thresholds_are_optimised_for_the_score():
    valid, test = arrays(3), arrays(4)
    budgets = budget_grid(COSTS)
    rows = [BestShares(score, valid.correct, COSTS).at(budgets) for score in (valid.confidence, valid.details["margin"])]
    plain, margin = (_accuracy(*scores, test.correct, np.array(COSTS), shares, budgets[budgets > 1.6]) for scores, shares in
                     zip(((valid.confidence, test.confidence), (valid.details["margin"], test.details["margin"])), rows))
    assert compare_scores(valid, test, COSTS)["margin"]["optimised"].mean == pytest.approx((margin - plain).mean())
