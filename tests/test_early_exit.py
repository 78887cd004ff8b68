"""Early exit that stops gives every input what the simulation, which computes all exits, gives it."""
from __future__ import annotations

import copy
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptive_inference import EarlyExit, exit_index, exit_shares, fit_thresholds, solve_exit_rate
from dataloader import build_data
from models import BoostedNet, MSDNet, RANet
from op_counter import measure_model
from utils.data.split import Split
from utils.evaluation import early_exit
from utils.evaluation.early_exit import SIZES_PER_DOUBLING, Exits, _allowed_size, _Deadline, _Running
from utils.evaluation.fast_form import FORMS, load_model, prepare_for_inference

ROUNDING = 1e-6   # a confidence this close to a threshold may lie on either side of it in a batch of another size
N = 64
RUNS = Path(__file__).parent.parent / "published" / "cifar100_small"


def small_msdnet(**more) -> MSDNet:
    return MSDNet(n_blocks=4, n_channels=4, base=2, step=2, step_mode="even", num_classes=7, **more)


def small_ranet(**more) -> RANet:
    return RANet(n_blocks=2, n_channels=4, step=2, scale_list=[1, 2, 3], gr_factor=[4, 2, 1], bn_factor=[4, 2, 1], num_classes=7,
                 **more)


def trained_like(backbone: nn.Module, temperature: float = 0.5) -> BoostedNet:
    """Batch-norm statistics as after training, so that confidences spread."""
    generator = torch.Generator().manual_seed(0)
    backbone.train()
    with torch.no_grad():
        for _ in range(5):
            backbone(torch.randn(32, 3, 32, 32, generator=generator))
        for classifier in backbone.classifier:
            classifier.linear.weight.mul_(4)
    return BoostedNet(backbone, [temperature] * backbone.n_exits).eval()


@pytest.fixture(scope="module", params=[small_msdnet, small_ranet], ids=["msdnet", "ranet"])
def model(request):
    torch.manual_seed(1)
    return trained_like(request.param(rescale_gradients=True))


@pytest.fixture(scope="module")
def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def everything(model: BoostedNet, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and prediction (n_exits, N) of all exits."""
    with torch.inference_mode():
        probabilities = torch.stack([scores.float() for scores in model(images)]).softmax(dim=2).cpu()
    return probabilities.amax(dim=2).numpy(), probabilities.argmax(dim=2).numpy()


def assert_as_simulated(results: Exits, confidence: np.ndarray, prediction: np.ndarray, thresholds, rounding: float = ROUNDING,
                        ) -> int:
    """Compare with the simulation; returns how many samples differ because a confidence meets its threshold by rounding."""
    thresholds, results = np.asarray(thresholds), Exits(*(column.cpu() for column in results))
    n = len(results.exit)
    expected, samples = exit_index(confidence[:, :n], thresholds), np.arange(n)
    differs = (results.exit.numpy() != expected) | (results.prediction.numpy() != prediction[expected, samples])
    first = np.minimum(results.exit.numpy(), expected)
    near = np.abs(confidence[first, samples] - thresholds[first]) <= rounding
    assert not (differs & ~near).any(), f"samples {np.flatnonzero(differs & ~near)} differ from the simulation"
    same = ~differs
    assert np.abs(results.confidence.numpy() - confidence[expected, samples])[same].max(initial=0) <= 10 * rounding
    return int(differs.sum())


def quantile_thresholds(confidence: np.ndarray, share: float) -> np.ndarray:
    return np.quantile(confidence, 1 - share, axis=1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_rows_leave_where_the_simulation_says(model, images, share, batch_size):
    confidence, prediction = everything(model, images)
    thresholds = quantile_thresholds(confidence, share)
    run = EarlyExit(model, thresholds)
    parts = [run(batch) for batch in images.split(batch_size)]
    results = Exits(*(torch.cat(column) for column in zip(*parts)))
    assert len(set(results.exit.tolist())) >= 3
    assert assert_as_simulated(results, confidence, prediction, thresholds) == 0


@settings(deadline=None, max_examples=15)
@given(thresholds=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([-np.inf, np.inf, 0.0, 1.0])), min_size=6, max_size=6),
       n=st.integers(0, 20), sizes=st.sampled_from([None, 1, 2, 4, 8]), ranet=st.booleans())
def test_any_thresholds_any_batch_and_any_rule_of_compaction(thresholds, n, sizes, ranet):
    torch.manual_seed(1)
    net = MODELS.setdefault(ranet, trained_like(small_ranet() if ranet else small_msdnet()))
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    thresholds = thresholds[:net.n_exits]
    results = EarlyExit(net, thresholds, sizes_per_doubling=sizes)(x)
    assert [len(column) for column in results] == [n, n, n]
    if n:
        assert_as_simulated(results, *everything(net, x), [*thresholds[:-1], -np.inf])


MODELS: dict[bool, BoostedNet] = {}


def test_a_row_that_has_left_is_not_computed_again(model, images, monkeypatch):
    """The number of rows that each step sees is that of the inputs which have not left."""
    confidence, _ = everything(model, images)
    thresholds = quantile_thresholds(confidence, 0.4)
    seen, step = [], model.backbone.step
    monkeypatch.setattr(model.backbone, "step", lambda n, state: (seen.append(_rows(state)), step(n, state))[1])
    exits = EarlyExit(model, thresholds, sizes_per_doubling=None)(images).exit
    assert seen == [int((exits >= n).sum()) for n in range(model.n_exits)]
    assert sum(seen) < 0.7 * N * model.n_exits


def test_a_batch_shrinks_to_a_few_sizes_only(model, images, monkeypatch):
    seen, step = set(), model.backbone.step
    monkeypatch.setattr(model.backbone, "step", lambda n, state: (seen.add(_rows(state)), step(n, state))[1])
    confidence, _ = everything(model, images)
    for share in np.linspace(0.1, 0.9, 9):
        EarlyExit(model, quantile_thresholds(confidence, share))(images)
    assert seen <= {*range(1, 17), *range(18, 33, 2), *range(36, 65, 4)}
    assert len(seen) > 5


def _rows(state) -> int:
    while not isinstance(state, torch.Tensor):
        state = next(part for part in state if part is not None and len(part))
    return len(state)


def test_all_leave_at_the_first_exit_and_the_second_is_never_run(model, images, monkeypatch):
    steps, step = [], model.backbone.step
    monkeypatch.setattr(model.backbone, "step", lambda n, state: (steps.append(n), step(n, state))[1])
    assert EarlyExit(model, [0.0] * model.n_exits)(images).exit.tolist() == [0] * N
    assert steps == [0]


def test_nobody_leaves_early_when_no_confidence_is_enough(model, images):
    confidence, prediction = everything(model, images)
    results = EarlyExit(model, [np.inf] * model.n_exits)(images)
    assert results.exit.tolist() == [model.n_exits - 1] * N
    assert results.prediction.tolist() == prediction[-1].tolist()


def test_results_are_named_tensors_of_fixed_types_also_for_an_empty_batch(model, images):
    for x in (images[:3], images[:0]):
        results = EarlyExit(model, [0.5] * model.n_exits)(x)
        assert results._fields == ("prediction", "confidence", "exit")
        assert [column.dtype for column in results] == [torch.int64, torch.float32, torch.int64]
        assert [column.shape for column in results] == [(len(x),)] * 3


def test_neither_images_nor_model_change(model, images):
    before, weights = images.clone(), copy.deepcopy(model.state_dict())
    model.train()
    try:
        EarlyExit(model, quantile_thresholds(everything(model.eval(), images)[0], 0.5))(images)
        model.train()
        EarlyExit(model, [0.5] * model.n_exits)(images)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(images, before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_limit_of_cost_is_shared_by_the_batch_and_exit_0_always_runs(model, images):
    costs = [10.0 * (n + 1) for n in range(model.n_exits)]
    never = [np.inf] * model.n_exits
    confidence, prediction = everything(model, images)
    for limit, reached in ((0, 0), (10, 0), (29.9, 1), (30, 2), (1e9, model.n_exits - 1)):
        results = EarlyExit(model, never, costs)(images, max_cost=limit)
        assert results.exit.tolist() == [reached] * N
        assert results.prediction.tolist() == prediction[reached].tolist()
    thresholds = quantile_thresholds(confidence, 0.3)
    free, limited = EarlyExit(model, thresholds, costs)(images), EarlyExit(model, thresholds, costs)(images, max_cost=20)
    assert limited.exit.tolist() == free.exit.clamp(max=1).tolist()


def test_a_deadline_stops_between_two_steps(model, images, monkeypatch):
    run = EarlyExit(model, [np.inf] * model.n_exits)
    assert run(images, deadline_ms=0).exit.tolist() == [0] * N
    assert run(images, deadline_ms=1e9).exit.tolist() == [model.n_exits - 1] * N
    step = model.backbone.step
    monkeypatch.setattr(model.backbone, "step", lambda n, state: (time.sleep(0.4 * (n == 1)), step(n, state))[1])
    assert run(images[:1], deadline_ms=300).exit.tolist() == [1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["plain", "growing", "folded"])
def test_a_deadline_leaves_what_the_simulation_of_the_steps_before_it_says(model, images, form, device, monkeypatch):
    """On a GPU the clock has to include what the device has not done yet when the host asks; on the CPU it is moved by hand."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)   # whose roundings differ from batch size to batch size
    on_device = copy.deepcopy(model).to(device)
    ready, x = on_device if form == "plain" else prepare_for_inference(on_device, form), images.to(device)
    confidence, prediction = everything(ready, x)
    thresholds = quantile_thresholds(confidence, 0.3)
    run, nobody = EarlyExit(ready, thresholds), EarlyExit(ready, [np.inf] * model.n_exits)
    step, slow, now = ready.backbone.step, 0, [0.0]

    def delayed(n, state):
        if n == slow and device == "cuda":
            torch.cuda._sleep(3 * 10**9)   # cycles, above a second; the host does not wait
        now[0] += n == slow
        return step(n, state)

    run(x), nobody(x)   # libraries are loaded at the first call
    assert int(run(x, deadline_ms=1e9).exit.max()) == model.n_exits - 1
    monkeypatch.setattr(ready.backbone, "step", delayed)
    if device == "cpu":
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for slow in (0, 1, model.n_exits - 2):
        results = run(x, deadline_ms=700)
        assert int(results.exit.max()) == slow
        assert_as_simulated(results, confidence[:slow + 1], prediction, [*thresholds[:slow], -np.inf], rounding=1e-5)
        assert nobody(x, deadline_ms=700).exit.tolist() == [slow] * N


def test_the_clock_of_a_deadline_waits_for_the_device_once_a_step(monkeypatch):
    waits, now = [], [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    device = torch.device("cuda")
    deadline = _Deadline(5, device)
    assert not deadline.passed() and waits == [device]
    deadline.waited()   # by reading confidences
    assert not deadline.passed() and len(waits) == 1
    now[0] = 0.004999
    assert not deadline.passed() and len(waits) == 2   # what was begun since then
    now[0] = 0.005
    assert deadline.passed() and len(waits) == 3
    assert not _Deadline(None, device).passed() and not _Deadline(6, torch.device("cpu")).passed() and len(waits) == 3


@pytest.mark.parametrize("form", ["plain", "growing", "folded"])
def test_thresholds_fitted_in_bfloat16_hold_in_bfloat16(model, images, form):
    ready = model if form == "plain" else prepare_for_inference(model, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        confidence, prediction = everything(ready, images)
        thresholds = quantile_thresholds(confidence, 0.4)
        results = EarlyExit(ready, thresholds)(images)
    # Sums in another order move a bfloat16 logit by a hundredth; most confidences are further from their threshold.
    assert results.confidence.dtype == torch.float32
    expected = exit_index(confidence, np.array([*thresholds[:-1], -np.inf]))
    assert (results.exit.numpy() == expected).mean() > 0.8
    leavers = results.exit.numpy() == expected
    assert (results.prediction.numpy()[leavers] == prediction[expected, np.arange(N)][leavers]).mean() > 0.9


@pytest.mark.parametrize(("more", "message"), [
    (dict(thresholds=[0.5]), "one for each exit"),
    (dict(thresholds="nan"), "thresholds must be"),
    (dict(costs=[1, 2]), "costs must be"),
    (dict(thresholds="one nan"), "thresholds must be"),
    *((dict(costs=costs), "costs must be")
      for costs in ("falling", "from zero", "infinite", "falling in the middle", "falling at the end")),
    (dict(calibration=[1.0]), "calibration must be"),
    (dict(calibration="zero"), "calibration must be"),
    (dict(calibration="infinite"), "calibration must be"),
])
def test_what_makes_no_sense_is_refused(model, more, message):
    n = model.n_exits
    rising = list(range(1, n + 1))
    words = {"nan": [np.nan] * n, "one nan": [np.nan, *[0.5] * (n - 1)], "falling": rising[::-1], "from zero": [0, *rising[1:]],
             "infinite": [*rising[:-1], np.inf], "falling in the middle": [1, n - 0.5, n - 0.6, *rising[3:]],
             "falling at the end": [*rising[:-1], 1], "zero": [*[1.0] * (n - 1), 0.0]}
    arguments = {"thresholds": [0.5] * n, **{k: words.get(v, v) if isinstance(v, str) else v for k, v in more.items()}}
    with pytest.raises(ValueError, match=message):
        EarlyExit(model, **arguments)


def test_limits_that_make_no_sense_are_refused(model, images):
    run = EarlyExit(model, [0.5] * model.n_exits)
    with pytest.raises(ValueError, match="max_cost needs the costs"):
        run(images, max_cost=5)
    with pytest.raises(ValueError, match="deadline_ms must be"):
        run(images, deadline_ms=float("nan"))
    for limit in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="max_cost must be"):
            EarlyExit(model, [0.5] * model.n_exits, range(1, model.n_exits + 1))(images, max_cost=limit)
    with pytest.raises(ValueError, match="BoostedNet"):
        EarlyExit(model.backbone, [0.5] * model.n_exits)


class Given(nn.Module):
    """A backbone whose images are the two logits of every exit themselves, (B, n_exits, 2)."""

    n_exits = 3

    def start(self, x):
        return x

    def step(self, n, state):
        return state[:, n], state


def test_costs_may_be_equal_and_below_one_and_calibrations_below_one_too():
    EarlyExit(BoostedNet(Given(), [0.0] * 3), [0.5] * 3, [0.25, 0.5, 0.5], calibration=[0.5, 1.0, 2.0])


def test_a_calibration_divides_the_logits_of_its_exit_for_the_confidence():
    images = torch.tensor([[[1.0, 0]] * 3, [[0.2, 0]] * 3])
    found = EarlyExit(BoostedNet(Given(), [0.0] * 3).eval(), [0.7, 0.7, 0.0], calibration=[2.0, 0.5, 4.0])(images)
    assert found.exit.tolist() == [1, 2] and found.prediction.tolist() == [0, 0]
    torch.testing.assert_close(found.confidence, torch.tensor([1 / 0.5, 0.2 / 4]).sigmoid())


class Carried(Given):
    def step(self, n, state):
        return state[:, n].clone(), state


@pytest.mark.parametrize("sizes", [None, 8])
def test_a_state_that_is_the_images_themselves_is_copied_before_rows_move(sizes):
    logits = torch.linspace(0, 3, 30).repeat(2)
    images = torch.stack([logits, torch.zeros(60)], dim=1)[:, None].expand(-1, 3, -1).contiguous()
    before, copies = images.clone(), []
    early = EarlyExit(BoostedNet(Carried(), [0.0] * 3).eval(), [0.6, 0.8, 0.0], sizes_per_doubling=sizes)
    found = early(images)
    assert torch.equal(images, before)
    confidence = logits.sigmoid().numpy()
    assert found.exit.tolist() == np.where(confidence >= 0.6, 0, 2).tolist()
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-6)
    running = _Running(images)
    other = torch.zeros(3)
    assert running._writable(other) is other
    for shared in (images, images[5:]):
        copies.append(running._writable(shared))
        assert torch.equal(copies[-1], shared) and copies[-1].data_ptr() != shared.data_ptr()


def test_the_sizes_that_a_batch_may_have():
    for per_doubling, allowed in ((8, [*range(1, 17), *range(18, 33, 2), *range(36, 65, 4)]), (1, [1, 2, 4, 8, 16, 32, 64]),
                                  (2, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]), (None, list(range(1, 65)))):
        for n in range(1, 65):
            assert _allowed_size(n, per_doubling) == min(size for size in allowed if size >= n), (n, per_doubling)
    assert SIZES_PER_DOUBLING == 8


def test_the_host_says_when_it_has_waited_and_asks_the_clock_between_steps(monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, milliseconds, device):
            calls.append((milliseconds, device))

        def waited(self):
            calls.append("waited")

        def passed(self):
            calls.append("passed")
            return False

    monkeypatch.setattr(early_exit, "_Deadline", Recorder)
    images = torch.tensor([[[1.0, 0], [1, 0], [1, 0]]])
    model = BoostedNet(Given(), [0.0] * 3).eval()
    EarlyExit(model, [1.0, 1.0, 0.0])(images, deadline_ms=7)
    assert calls == [(7, torch.device("cpu")), "waited", "passed", "waited", "passed"]
    calls.clear()
    EarlyExit(model, [2.0, 2.0, 0.0])(images)
    assert calls[1:] == ["passed", "passed"]   # a confidence that nobody reads is not waited for


@pytest.mark.parametrize("threshold", [1e300, -1e300, np.inf])
def test_thresholds_beyond_float32_are_everybody_or_nobody_without_a_warning(threshold):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exits_of([1.0], [threshold, 0.0, 0.0]) == [0 if threshold < 0 else 1]


def exits_of(logits: list[float], thresholds: list[float]) -> list[int]:
    """Exits of rows whose first logit is given at all exits, the second is 0."""
    images = torch.stack([torch.tensor(logits), torch.zeros(len(logits))], dim=1)[:, None].expand(-1, 3, -1).contiguous()
    return EarlyExit(BoostedNet(Given(), [0.0] * 3).eval(), thresholds)(images).exit.tolist()


def test_a_confidence_that_equals_its_threshold_leaves_and_one_just_below_does_not():
    assert torch.tensor([200.0, 0]).softmax(0)[0] == 1
    assert exits_of([200.0, 1.0], [1.0, 2.0, 0.0]) == [0, 2]         # certain to the last bit
    assert exits_of([200.0, 1.0], [1 + 1e-12, 2.0, 0.0]) == [2, 2]   # more than certain is nobody
    confidence = torch.tensor([1.0, 0]).softmax(0)[0].item()
    assert exits_of([1.0, 0.0], [confidence, 2.0, 0.0]) == [0, 2]
    assert exits_of([1.0, 0.0], [confidence + 1e-12, confidence, 0.0]) == [1, 2]
    assert exits_of([1.0, 0.0], [confidence - 1e-12, 2.0, 0.0]) == [0, 2]
    assert exits_of([1.0, 0.0], [0.0, 2.0, 0.0]) == exits_of([1.0, 0.0], [-1.0, 2.0, 0.0]) == [0, 0]


# Forms for inference

@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("form", ["growing", "folded"])
@pytest.mark.parametrize("network", ["msdnet", "msdnet_min", "msdnet_narrow", "ranet", "ranet_equal"])
def test_forms_for_inference_compute_the_same_network(network, form, image_size):
    torch.manual_seed(2)
    large = image_size == 224
    factors = dict(gr_factor=[1, 2, 4, 4], bn_factor=[1, 2, 4, 4]) if large else {}
    if network == "ranet_equal":
        backbone = RANet(n_blocks=2, n_channels=4, step=2, num_classes=7, image_size=image_size,
                         scale_list=[1, 2, 3, 3] if not large else [1, 2, 3, 4], gr_factor=[4, 2, 1, 1], bn_factor=[4, 2, 1, 1],
                         step_mode="lin_grow", compress_factor=0.5)
    elif network == "ranet":
        backbone = small_ranet() if not large else RANet(
            n_blocks=2, n_channels=4, step=1, num_classes=7, image_size=224, scale_list=[1, 2, 3, 4], gr_factor=[4, 2, 2, 1],
            bn_factor=[4, 2, 2, 1], bottleneck=False)
    else:
        more = {"msdnet_min": dict(prune="min"), "msdnet_narrow": dict(bottleneck=False, reduction=0.3)}.get(network, {})
        backbone = small_msdnet(image_size=image_size, **factors, **more)
    size = dict(n=2, side=224) if large else dict(n=5, side=32)
    backbone.train()
    with torch.no_grad():
        backbone(torch.randn(size["n"], 3, size["side"], size["side"]))
    model = BoostedNet(backbone, [0.5] * backbone.n_exits).eval()
    before = copy.deepcopy(model.state_dict())
    ready = prepare_for_inference(model, form)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    for n in (1, size["n"]):
        x = torch.randn(n, 3, size["side"], size["side"])
        with torch.inference_mode():
            for want, got in zip(model(x), ready(x)):
                assert (want - got).abs().max() <= 1e-4 * want.abs().max()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["growing", "folded"])
def test_forms_for_inference_leave_rows_where_their_own_simulation_says(model, images, form):
    ready = prepare_for_inference(model, form)
    confidence, prediction = everything(ready, images)
    for share in (0.2, 0.6):
        thresholds = quantile_thresholds(confidence, share)
        for sizes in (None, 1, 4):
            results = EarlyExit(ready, thresholds, sizes_per_doubling=sizes)(images)
            assert_as_simulated(results, confidence, prediction, thresholds)


def test_an_unknown_form_is_refused(model):
    with pytest.raises(ValueError, match="choose one of growing, folded, compiled"):
        prepare_for_inference(model, "fast")
    assert FORMS == ("growing", "folded", "compiled")


@pytest.mark.slow
def test_compiled_steps_leave_rows_where_their_own_simulation_says(images):
    torch.manual_seed(1)
    plain = trained_like(MSDNet(n_blocks=2, n_channels=4, base=2, step=1, num_classes=7))
    ready = prepare_for_inference(plain, "compiled")
    confidence, prediction = everything(ready, images)
    assert np.abs(confidence - everything(plain, images)[0]).max() < 1e-4
    thresholds = quantile_thresholds(confidence, 0.5)
    for n in (1, 7, N):
        assert_as_simulated(EarlyExit(ready, thresholds)(images[:n]), confidence, prediction, thresholds, rounding=1e-5)


# Trained weights, real images

@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("run", ["msdnet_boost", "ranet_boost"])
def test_trained_networks_leave_as_simulated_for_all_budgets_and_batch_sizes(run):
    model, saved = load_model(RUNS / run / "model_anytime.pth")
    data = build_data(dataset="cifar100", data_root=Path(os.environ["BOOSTNET_TEST_DATA"]) / "cifar100", eval_batch_size=256,
                      split=Split.from_dict(saved["split"]), quiet=True)
    macs = measure_model(model, 32, 32)[0]
    valid = torch.cat([batch.images for batch, _ in zip(data.valid(), range(8))])
    test = torch.cat([batch.images for batch, _ in zip(data.test(), range(8))])
    held_out = np.concatenate([everything(model, part)[0] for part in valid.split(256)], axis=1)
    confidence, prediction = (np.concatenate(column, axis=1) for column in zip(*(everything(model, p) for p in test.split(256))))
    differ = total = 0
    for fraction in (0.1, 0.3, 0.5, 0.8):
        shares = exit_shares(solve_exit_rate(macs, macs[0] + fraction * (macs[-1] - macs[0])), len(macs))
        thresholds = fit_thresholds(held_out, shares)
        for batch_size, n in ((1, 100), (7, 500), (64, 2048), (256, 2048)):
            parts = [EarlyExit(model, thresholds)(part) for part in test[:n].split(batch_size)]
            results = Exits(*(torch.cat(column) for column in zip(*parts)))
            differ += assert_as_simulated(results, confidence, prediction, thresholds)
            total += n
    assert differ <= total / 1000   # each within ROUNDING of its threshold
