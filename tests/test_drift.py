"""Exits in use against those of the hold-out: counted right, no alarm where nothing has changed, one where something has."""
import logging

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_inference import EarlyExit, exit_index, fit_thresholds
from models import BoostedNet
from utils.evaluation.drift import ExitMonitor, log_evidence

N_EXITS = 4
COSTS = [1.0, 2.0, 4.0, 7.0]


class Given(nn.Module):
    """A backbone whose images are the logits of every exit themselves, (B, N_EXITS, 2)."""

    n_exits = N_EXITS

    def start(self, x):
        return x

    def step(self, n, state):
        return state[:, n], state


def images(draw, n, harder=0.0):
    logits = torch.from_numpy(draw.normal(size=(n, N_EXITS, 2)) + draw.exponential(size=(n, 1, 1)) * [2.0, -2.0] * (1 - harder))
    return logits.float()


def confidences(x):
    return x.softmax(dim=2).amax(dim=2).T.numpy()


@pytest.fixture(scope="module")
def held_out():
    """Thresholds fitted on 2,000 images, and the shares that leave there."""
    confidence = confidences(images(np.random.default_rng(0), 2000))
    thresholds = fit_thresholds(confidence, [0.4, 0.3, 0.2, 0.1])
    return thresholds, np.bincount(exit_index(confidence, thresholds), minlength=N_EXITS) / 2000


def runner(held_out, **more):
    thresholds, share = held_out
    monitor = ExitMonitor(share, 2000, COSTS, thresholds="optimised", **more)
    return EarlyExit(BoostedNet(Given(), [0.0] * N_EXITS).eval(), thresholds, COSTS, monitor=monitor)


def test_all_inputs_are_counted_where_they_leave(held_out):
    early, draw = runner(held_out), np.random.default_rng(1)
    exits = torch.cat([early(images(draw, n)).exit for n in (0, 1, 7, 64, 300)])
    found = early.summary()
    assert found.n_images == 372 and found.thresholds == "optimised"
    assert found.exit_share == pytest.approx(np.bincount(exits, minlength=N_EXITS) / 372)
    assert found.mean_cost == pytest.approx(np.mean([COSTS[n] for n in exits]))
    assert found.held_out_share == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)
    assert found.held_out_cost == pytest.approx(2.5, abs=1e-2)
    assert "372 images with optimised thresholds" in str(found) and "do not differ" in str(found)


def test_inputs_cut_short_are_counted_but_are_no_change(held_out):
    early, draw = runner(held_out), np.random.default_rng(2)
    for _ in range(20):
        exits = early(images(draw, 100), max_cost=2.0).exit
        assert exits.max() == 1
    early(images(draw, 100), deadline_ms=0)
    found = early.summary()
    assert found.exit_share[0] == pytest.approx(0.43, abs=0.04) and sum(found.exit_share[:2]) == 1
    assert not found.differs
    assert sum(early.monitor._left) + sum(early.monitor._ended) == 2100
    assert early.monitor._stayed[0] + early.monitor._left[0] == 2100 and early.monitor._stayed[1:] == [0, 0, 0]


def test_no_threshold_no_decision(held_out):
    confidence = confidences(images(np.random.default_rng(0), 500))
    thresholds = fit_thresholds(confidence, [0.0, 0.5, 0.0, 0.5])
    early = EarlyExit(BoostedNet(Given(), [0.0] * N_EXITS).eval(), thresholds, monitor=ExitMonitor([0, 0.5, 0, 0.5], 500))
    exits = early(images(np.random.default_rng(3), 200)).exit
    found = early.summary()
    assert found.mean_cost is None and found.exit_share == pytest.approx(np.bincount(exits, minlength=4) / 200)
    assert early.monitor._stayed == [0, early.monitor._ended[3], 0, 0]
    for thresholds, reached in (([0.0, 0.5, 0.5, 0.0], 0), ([np.inf, np.inf, np.inf, 0.9], 3)):   # all leave, none does
        monitor = ExitMonitor([0.1, 0.2, 0.3, 0.4], 500)
        EarlyExit(BoostedNet(Given(), [0.0] * N_EXITS).eval(), thresholds, monitor=monitor)(images(np.random.default_rng(3), 50))
        assert monitor._ended == [50 * (n == reached) for n in range(4)] and monitor._left == monitor._stayed == [0] * 4


def test_false_alarms_are_as_rare_as_promised_however_often_one_looks():
    """Thresholds and shares of a new hold-out each time; a look at the stream every 50 inputs."""
    draw, level, n_streams, alarms = np.random.default_rng(4), 0.1, 200, 0
    for _ in range(n_streams):
        confidence, stream = draw.random((N_EXITS, 300)), draw.random((N_EXITS, 3000))
        thresholds = fit_thresholds(confidence, [0.3, 0.3, 0.2, 0.2])
        share = np.bincount(exit_index(confidence, thresholds), minlength=N_EXITS) / 300
        monitor = ExitMonitor(share, 300, level=level)
        for exits in exit_index(stream, thresholds).reshape(60, 50):
            monitor.add(np.bincount(exits, minlength=N_EXITS).tolist())
            monitor.summary()
        alarms += monitor.summary().differs
    assert alarms / n_streams <= level + 3 * np.sqrt(level * (1 - level) / n_streams)


def test_a_drifted_stream_gets_one_warning(held_out, caplog):
    early, draw = runner(held_out), np.random.default_rng(5)
    with caplog.at_level(logging.WARNING, "boostnet"):
        for _ in range(10):
            early(images(draw, 100))
            assert not early.summary().differs
        early.monitor.reset()
        for _ in range(10):
            early(images(draw, 100, harder=0.7))
            early.summary()
    found, = caplog.messages
    assert "beyond chance" in found and "may not hold" in found
    late = early.summary()
    assert late.differs and late.p_value < 1e-3 and late.mean_cost > late.held_out_cost and late.n_images == 1000
    assert "differ beyond chance" in str(late) and "do not" not in str(late)
    early.monitor.add([400_000, 300_000, 200_000, 100_000])   # what was beyond chance once has been so
    assert log_evidence(early.monitor._left, early.monitor._stayed, [800, 600, 400, 200]) < 0 and early.summary().differs


def test_evidence_is_the_ratio_of_the_two_predictions_of_the_same_decisions():
    """Against the series of decisions one after the other, each predicted from those before."""
    held_out, decisions = [60, 25, 15], [(0, 1), (0, 0), (1, 1), (1, 0), (0, 0), (1, 0), (0, 1), (0, 1), (1, 1)]
    wealth = []
    for concentration in (10, 100, 1000):
        total = 0.0
        for n, (a, b) in enumerate([(60.5, 40.5), (25.5, 15.5)]):
            narrow = min(1.0, concentration / (a + b))
            for sign, left, stayed in ((1, narrow * a, narrow * b), (-1, a, b)):
                for leaves in (leaves for exit_, leaves in decisions if exit_ == n):
                    total += sign * np.log((left if leaves else stayed) / (left + stayed))
                    left, stayed = left + leaves, stayed + (not leaves)
        wealth.append(total)
    left = [sum(leaves for exit_, leaves in decisions if exit_ == n) for n in range(3)]
    stayed = [sum(not leaves for exit_, leaves in decisions if exit_ == n) for n in range(3)]
    assert log_evidence(left, stayed, held_out) == pytest.approx(np.log(np.mean(np.exp(wealth))))
    unused = [0, *held_out[:2], 0, held_out[2]]   # exits that the hold-out left alone have infinite thresholds
    assert log_evidence([0, *left[:2], 0, 0], [99, *stayed[:2], 99, 0], unused) == log_evidence(left, stayed, held_out)


def test_evidence_of_a_long_stream_is_finite():
    assert 1e4 < log_evidence([900_000, 0], [100_000, 0], [5_000, 45_000]) < 1e6   # its exponential is too large for a number


def test_exits_that_were_counted_elsewhere():
    monitor = ExitMonitor([0.5, 0.3, 0.2], 100, [1.0, 2.0, 4.0])
    empty = monitor.summary()
    assert (empty.n_images, empty.mean_cost, empty.p_value, empty.exit_share) == (0, None, 1, [0, 0, 0])
    assert empty.held_out_cost == pytest.approx(1.9)
    monitor.add([1, 0, 0])
    assert monitor.summary().exit_share == [1, 0, 0]
    monitor.reset()
    monitor.add([5, 3, 2])
    monitor.add([1, 0, 0])
    assert (monitor._left, monitor._stayed, monitor._ended) == ([6, 3, 0], [5, 2, 0], [0, 0, 2])
    found = monitor.summary()
    assert found.n_images == 11 and found.exit_share == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert "mean cost 1.818" in str(found).splitlines()[1] and "mean cost 1.9" in str(found).splitlines()[2]
    monitor.reset()
    assert monitor.summary() == empty
    assert "cost" not in str(ExitMonitor([0.5, 0.5], 10).summary())


def test_a_monitor_for_exported_thresholds():
    about = {"hold_out": {"n_images": 50, "exit_share": [[1.0, 0.0], [0.4, 0.6]]}, "macs": [1, 2], "thresholds": "promise"}
    monitor = ExitMonitor.of_export(about, 1)
    assert (monitor.held_out_share, monitor.n_held_out, monitor.costs, monitor.thresholds) == ([0.4, 0.6], 50, [1, 2], "promise")
    for older in ({**about, "hold_out": None}, {"macs": [1, 2]}):
        with pytest.raises(ValueError, match="export the network again"):
            ExitMonitor.of_export(older, 0)


def test_mistakes():
    for share, n in (([0.5, 0.4], 10), ([1.5, -0.5], 10), ([], 10), ([0.5, 0.5], 0)):
        with pytest.raises(ValueError, match="sum 1"):
            ExitMonitor(share, n)
    ExitMonitor([1.0], 1)
    with pytest.raises(ValueError, match="2 numbers"):
        ExitMonitor([0.5, 0.5], 10, [1.0])
    model = BoostedNet(Given(), [0.0] * N_EXITS).eval()
    with pytest.raises(ValueError, match="of 2 exits"):
        EarlyExit(model, [0.5] * N_EXITS, monitor=ExitMonitor([0.5, 0.5], 10))
    with pytest.raises(ValueError, match="nothing was counted"):
        EarlyExit(model, [0.5] * N_EXITS).summary()
