"""Every training method through the programs: trained, stopped and resumed to the bit, evaluated; and what each one promises."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import command, differences, make_images, one_line_error, outcome, signal_at_step

import args as cli
import eval_cifar100
import train_cifar100
from adaptive_inference import EarlyExit
from models import BoostedNet, CollaborativeNet, MSDNet, RANet, map_state
from utils.core.errors import STOPPED, UserError
from utils.evaluation.fast_form import FORMS, prepare_for_inference
from utils.methods import Method, build_method, imta, l2w
from utils.methods.base import Outcome
from utils.methods.block_losses import BlockLosses
from utils.methods.distillation import Distillation
from utils.methods.losses import cross_entropies, divergence
from utils.options.catalog import METHODS
from utils.runs import checkpoint
from utils.training.optim import build_optimizer

# Flags of a run for every method; {joint} and {boost} are finished runs. Batches of 13: the last of 40 images is alone.
SETUPS = {
    "l2w": "--method l2w --meta_interval 2 --meta_net_hidden_size 8 --lr-type cosine --nesterov --ema 0.9",
    "boost_l2w": "--method boost_l2w --meta_net_hidden_size 8 --meta_net_input_type both --constraint_dimension row "
                 "--batch-size 13",
    "local error": "--method block_losses --overlap 1 --distill_weight 0.3 --ema 0.9 --nesterov --label_smoothing 0.1",
    "taught blocks": "--method block_losses --groups 2 --distill_weight 0.5 --teacher {boost}/model_best.pth",
    "boost_distill": "--method boost_distill --loss_equal",
    "imta": "--method imta --checkpoint {joint}/model_best.pth --batch-size 13 --ema 0.9",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """Folders of uninterrupted runs, trained when first asked for."""
    folder, known = tmp_path_factory.mktemp("finished"), {}

    def run(setup: str) -> Path:
        if setup not in known:
            flags = SETUPS.get(setup, f"--method {setup}")
            places = {name: run(name) for name in ("joint", "boost") if f"{{{name}}}" in flags}
            known[setup] = folder / setup.replace(" ", "_")
            assert train_cifar100.main(command(images, known[setup], *flags.format(**places).split())) == 0
        return known[setup]

    return run


def flags_of(setup: str, finished) -> list[str]:
    return SETUPS[setup].format(joint=finished("joint"), boost=finished("boost")).split()


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_of_any_method_stopped_in_mid_epoch_ends_as_if_it_had_not_been(images, finished, tmp_path, monkeypatch, setup):
    line = command(images, tmp_path, *flags_of(setup, finished))
    with monkeypatch.context() as patch:
        signal_at_step(patch, 5)
        assert train_cifar100.main(line) == STOPPED
    if "--checkpoint" in line:   # belongs to the first start only
        place = line.index("--checkpoint")
        del line[place:place + 2]
    assert train_cifar100.main([*line, "--resume"]) == 0
    assert not list(differences(outcome(tmp_path), outcome(finished(setup))))


@pytest.mark.parametrize("setup", SETUPS)
def test_evaluation_takes_the_method_from_the_checkpoint(images, finished, tmp_path, setup):
    run = finished(setup)
    line = ["--data-root", str(images), "--evaluate-from", str(run / "model_latest.pth"), "--result_dir", str(tmp_path)]
    for mode in ("anytime", "dynamic", "realtime"):
        assert eval_cifar100.main([*line, "--evalmode", mode, "--device", "cpu", "--threads", "1"]) == 0
    evaluated, tested = (json.loads((folder / "anytime.json").read_text()) for folder in (tmp_path, run))
    assert evaluated["top1"] == tested["top1"] and evaluated["method"] == tested["method"] == SETUPS[setup].split()[1]
    assert any(evaluated["temperatures"]) == evaluated["method"].startswith("boost")


def test_every_method_has_a_run_here(finished):
    assert {"joint", "boost", *(flags.split()[1] for flags in SETUPS.values())} == set(METHODS)


@pytest.mark.parametrize("piece", ["weight_net", "meta_optimizer", "batches"])
def test_the_comparison_notices_a_piece_of_sample_weighting_that_is_not_restored(images, finished, tmp_path, monkeypatch, piece):
    load, flags = l2w.SampleWeighting.load_state_dict, flags_of("l2w", finished)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 8)
        assert train_cifar100.main(command(images, tmp_path, *flags)) == STOPPED
    monkeypatch.setattr(l2w.SampleWeighting, "load_state_dict",
                        lambda self, state: load(self, {**self.state_dict(), **{k: v for k, v in state.items() if k != piece}}))
    assert train_cifar100.main([*command(images, tmp_path, *flags), "--resume"]) == 0
    assert list(differences(outcome(tmp_path), outcome(finished("l2w"))))


def network(boosted: bool, *, ranet: bool = False, n_blocks: int = 3) -> BoostedNet:
    torch.manual_seed(0)
    if ranet:
        backbone = RANet(n_blocks=1, block_step=1, n_channels=4, num_classes=5, scale_list=[1, 2, 3], gr_factor=[4, 2, 1],
                         bn_factor=[4, 2, 1])
    else:
        backbone = MSDNet(n_blocks=n_blocks, n_channels=4, base=1, num_classes=5)
    return BoostedNet(backbone.double(), [0.5 if boosted else 0.0] * backbone.n_exits).train()


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=draw, dtype=torch.float64), torch.arange(size) % 5


LEARNERS = {"boost": (Method, {}), "joint": (Method, {}), "l2w": (l2w.SampleWeighting, {}),
            "boost_l2w": (l2w.SampleWeighting, {}),
            "block_losses": (BlockLosses, {"overlap": 1, "distill_weight": 0.35, "temperature": 2.5}),
            "imta": (imta.Collaboration, {}), "boost_distill": (Distillation, {"distill_weight": 0.35, "temperature": 2.5})}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_the_loss_of_every_exit_on_a_batch_seen_again_and_again(name):
    method, options = LEARNERS[name]
    model, (x, y) = network(boosted=name.startswith("boost")), batch(10)
    model.backbone = (CollaborativeNet(model.backbone) if name == "imta" else model.backbone).double()
    model.train()
    optimizer = build_optimizer(model.backbone, name="sgd", lr=0.05, momentum=0.9, weight_decay=[1e-4])
    learner = method(model, optimizer, **options)
    losses = [learner.step(x, y).per_sample.mean(dim=1) for _ in range(12)]
    assert (losses[-1] < losses[0]).all(), torch.stack(losses)


def gradients(method: Method) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in method.model.named_parameters()}


def still(model: BoostedNet) -> torch.optim.Optimizer:
    """An optimiser that leaves the parameters as they are."""
    return torch.optim.SGD(model.backbone.parameters(), lr=0.0)


def test_boosted_self_distillation_is_the_boosted_loss_plus_the_divergence_of_the_sums():
    model, (x, y) = network(boosted=True), batch()
    outcome = Distillation(model, still(model), distill_weight=0.35, temperature=2.5).loss(x, y, share=0.5)
    predictions = model(x)
    ce = cross_entropies(predictions, y).mean(dim=1).sum()
    kl = sum(divergence(p, predictions[-1], 2.5) for p in predictions)
    torch.testing.assert_close(outcome.total, 0.5 * (ce + 0.35 * kl))


def smoothed(predictions: list[torch.Tensor], labels: torch.Tensor, share: float) -> torch.Tensor:
    """Cross entropies (n_exits, B) of targets with this share spread evenly over the classes, by the definition."""
    logs = torch.stack([p.log_softmax(dim=1) for p in predictions])
    of_label = logs[:, torch.arange(len(labels)), labels]
    return -(1 - share) * of_label - share * logs.mean(dim=2)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_smooths_the_labels_of_its_cross_entropies_and_of_nothing_else(name):
    more = {"imta": "--checkpoint c.pth", "block_losses": "--overlap 1 --distill_weight 0.35"}.get(name, "")
    args = cli.parse_args(f"--method {name} --label_smoothing 0.2 {more}".split())
    model, (x, y) = network(boosted=METHODS[name].boosted), batch()
    model.backbone = (CollaborativeNet(model.backbone) if name == "imta" else model.backbone).double()
    learner = build_method(args, model.train(), still(model), network=model)
    weights = []
    if "l2w" in name:
        weights.append(learner.weights)
        learner.weights = lambda *a: weights.append(weights[0](*a)) or weights[-1]
    outcome = learner.loss(x, y)
    by_hand = smoothed(outcome.predictions, y, 0.2)
    torch.testing.assert_close(outcome.per_sample, by_hand, rtol=1e-12, atol=1e-12)
    per_exit, predictions = by_hand.mean(dim=1), outcome.predictions
    if name == "imta":
        teacher = model.backbone.with_teacher(x)[1]
        expected = per_exit[-1] + sum(0.1 * loss + 0.9 * 9 * divergence(p, teacher, 3.0)
                                      for loss, p in zip(per_exit[:-1], predictions))
    elif "l2w" in name:
        expected = (weights[1] * by_hand).mean(dim=1).sum()
        torch.testing.assert_close(weights[1], weights[0](predictions, by_hand), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(weights[1], weights[0](predictions, smoothed(predictions, y, 0.0)))
    else:
        divergences = [divergence(p, predictions[-1], 2.5) for p in predictions[:-1]] if args.distill_weight else []
        expected = per_exit.sum() + sum(0.35 * d for d in divergences)
    torch.testing.assert_close(outcome.total, expected, rtol=1e-12, atol=1e-12)


def test_the_trial_and_the_held_out_loss_of_sample_weighting_are_smoothed():
    model, (x, y) = network(boosted=False), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = l2w.SampleWeighting(model, optimizer, epsilon=0.0, label_smoothing=0.2)
    found = method.meta_loss(x[:3], y[:3], x[3:], y[3:])
    optimizer.zero_grad()
    smoothed(model(x[:3]), y[:3], 0.2).mean(dim=1).sum().backward()   # with epsilon 0 every weight is 1
    optimizer.step()
    predictions = model(x[3:])
    by_hand = smoothed(predictions, y[3:], 0.2)
    confidence = torch.stack([p.softmax(dim=1).amax(dim=1) for p in predictions])
    expected = sum(by_hand[n, index].mean() for n, index in enumerate(l2w.leaving(confidence, method.shares)) if len(index))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_run_says_that_its_losses_are_smoothed_and_one_without_smoothing_says_nothing(images, finished, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_cifar100.main(command(images, tmp_path, "--label_smoothing", "0.1", "--epochs", "1")) == 0
    for run, smoothing, tag in ((tmp_path, 0.1, "train_loss_smoothed/exit1"), (finished("boost"), None, "train_loss/exit1")):
        [entry, *_] = json.loads((run / "results.json").read_text())["epochs"]
        assert entry.get("label_smoothing") == smoothing
        events = EventAccumulator(str(run / "log"))
        events.Reload()
        assert [name for name in events.Tags()["scalars"] if "loss" in name and name.endswith("exit1")] == [tag]


@pytest.mark.parametrize(("method", "more"), [("boost_distill", []), ("block_losses", ["--overlap", "1"])])
def test_a_teacher_s_last_exit_teaches_every_exit_and_is_not_trained(method, more):
    flags = ["--result_dir", "run", "--method", method, "--teacher", "file.pth", "--distill_weight", "0.2", "--distill_T", "1.5"]
    model, (x, y) = network(boosted=method == "boost_distill"), batch()
    teacher = network(boosted=True)
    for classifier in teacher.backbone.classifier:   # exits unlike each other, and unlike the student's
        torch.nn.init.normal_(classifier.linear.weight)
    learner = build_method(cli.parse_args([*flags, *more]), model, still(model), network=model, teacher=teacher)
    assert not teacher.training and learner.teacher is teacher
    outcome = learner.loss(x, y)
    with torch.no_grad():
        log_answer = (teacher(x)[-1] / 1.5).log_softmax(dim=1)
        kl = [(log_answer.exp() * (log_answer - (p / 1.5).log_softmax(dim=1))).sum(dim=1).mean() for p in outcome.predictions]
        ce = cross_entropies(outcome.predictions, y).mean(dim=1).sum()
    assert len(kl) == 3
    torch.testing.assert_close(outcome.total.detach(), ce + 0.2 * sum(kl))
    learner.backward(outcome.total)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_the_weight_of_distillation_may_be_one_and_with_zero_there_is_none():
    model, (x, y) = network(boosted=True), batch()
    with torch.no_grad():
        predictions = model(x)
        ce = cross_entropies(predictions, y).mean(dim=1).sum()
        kl = sum(divergence(p, predictions[-1], 2.5) for p in predictions)
    for weight in (0.0, 1.0):
        total = Distillation(model, still(model), distill_weight=weight, temperature=2.5).loss(x, y).total.detach()
        torch.testing.assert_close(total, ce + weight * kl)


def test_a_start_takes_all_weights_and_those_of_other_classes_only_where_new_ones_are_wanted():
    model, other = network(boosted=True), MSDNet(n_blocks=3, n_channels=4, base=1, num_classes=7)
    Method.load_start(model, {"state_dict": network(boosted=True).backbone.state_dict()}, "file")
    assert not list(differences(model.state_dict(), network(boosted=True).state_dict()))
    with pytest.raises(UserError, match="file"):
        Method.load_start(model, {"state_dict": other.double().state_dict()}, "file")
    Method.load_start(model, {"state_dict": other.state_dict()}, "file", new_classifier=True)
    assert not list(differences(model.backbone.blocks.state_dict(), other.blocks.state_dict()))


def test_the_loss_is_the_sum_over_the_exits_and_its_moving_average_comes_back():
    model, (x, y) = network(boosted=True), batch()
    plain = sum(torch.nn.functional.cross_entropy(p, y) for p in model(x)).detach()
    method = Method(model, still(model))
    for result in (method.loss(x, y), method.update(x, y), method.step(x, y)):
        torch.testing.assert_close(result.total.detach(), plain)
        assert not result.per_sample.requires_grad
    torch.testing.assert_close(method.step(x, y, share=0.5).total.detach(), plain / 2)
    equalised, again = (Method(model, still(model), equalise=True) for _ in range(2))
    equalised.step(x, y)
    again.load_state_dict(equalised.state_dict())
    assert torch.equal(again.objective.average, equalised.objective.average)


def test_weighting_with_epsilon_zero_is_a_plain_step_on_each_half():
    for boosted in (False, True):
        (x, y), results = batch(7), []
        for weighted in (True, False):
            model = network(boosted)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if weighted:
                l2w.SampleWeighting(model, optimizer, epsilon=0.0).step(x, y)
            else:
                for half in (slice(None, 3), slice(3, None)):
                    Method(model, optimizer).step(x[half], y[half])
            results.append(model.state_dict())
        assert not list(differences(*results)), boosted


def test_the_rate_of_the_weight_network_falls_to_zero_as_a_cosine_batch_by_batch(images, tmp_path, monkeypatch):
    seen, meta_step = [], l2w.SampleWeighting.meta_step
    monkeypatch.setattr(l2w.SampleWeighting, "meta_step", lambda self, *parts: seen.append(
        self.meta_optimizer.param_groups[0]["lr"]) or meta_step(self, *parts))
    line = command(images, tmp_path, *"--method l2w --meta_lr 0.2 --meta_net_hidden_size 4 --batch-size 20".split())
    assert train_cifar100.main(line) == 0   # two epochs of two batches, with two meta steps each
    assert seen == pytest.approx([0.2, 0.2, 0.1707107, 0.1707107, 0.1, 0.1, 0.0292893, 0.0292893], abs=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_trial_step_is_the_optimisers_own_next_step(nesterov):
    """Without and with a momentum buffer, and for a parameter without a gradient."""
    model, (x, y) = network(boosted=False), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    method = l2w.SampleWeighting(model, optimizer)
    for _ in range(2):
        Method(model, still(model)).step(x, y)   # leaves gradients
        gradients_before = [p.grad for p in model.parameters()]
        gradients_before[0] = next(model.parameters()).grad = None
        [group] = optimizer.param_groups
        trial = [method._after_sgd(p, g, group).clone() for p, g in zip(model.parameters(), gradients_before)]
        optimizer.step()
        for p, expected in zip(model.parameters(), trial):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_meta_steps_come_every_so_many_batches_one_for_each_half(monkeypatch):
    model, (x, y), seen = network(boosted=True), batch(5), []
    method = l2w.SampleWeighting(model, still(model), meta_interval=3)
    monkeypatch.setattr(method, "meta_step", lambda *halves: seen.append((method.batches, *(len(h.labels) for h in halves))))
    for _ in range(5):
        method.step(x, y)
    assert seen == [(n, *sizes) for n in (0, 3) for sizes in ((2, 3), (3, 2))]
    assert method.batches == 5 and method.step(x[:1], y[:1]).per_sample.shape == (3, 1)   # a single image needs no halves
    assert method.batches == 5 and len(seen) == 4


def test_a_meta_step_changes_the_weight_network_and_nothing_else():
    model, (x, y) = network(boosted=True), batch()
    method = l2w.SampleWeighting(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy((model.state_dict(), method.weight_net.state_dict()))
    method.meta_step(l2w.Half(x[:3], y[:3], 1.0), l2w.Half(x[3:], y[3:], 1.0))
    assert not list(differences(model.state_dict(), before[0]))
    assert list(differences(method.weight_net.state_dict(), before[1]))
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_of_a_meta_step_weighs_by_the_held_out_half_and_is_averaged_over_the_processes(monkeypatch):
    model, (x, y), averaged = network(boosted=True), batch(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = l2w.SampleWeighting(model, optimizer, hidden_size=8, meta_weight_decay=0.0)
    parameters = list(method.weight_net.parameters())
    wanted = torch.autograd.grad(method.meta_loss(x[:3], y[:3], x[3:], y[3:]), parameters)
    before = copy.deepcopy(method.weight_net.state_dict())

    def average(given) -> None:   # with processes whose gradients make this one's zero
        averaged.extend(p.grad.clone() for p in given)
        for p in parameters:
            p.grad.zero_()

    monkeypatch.setattr(l2w, "average_gradients", average)
    method.meta_step(l2w.Half(x[:3], y[:3], 1.0), l2w.Half(x[3:], y[3:], 0.5))
    assert all(gradient.abs().max() > 0 for gradient in wanted)
    torch.testing.assert_close(averaged, [0.5 * gradient for gradient in wanted], rtol=1e-9, atol=0)
    assert not list(differences(method.weight_net.state_dict(), before))


def test_a_batch_of_two_or_three_images_has_halves_and_both_are_trained_on(monkeypatch):
    model, (x, _), seen = network(boosted=True), batch(3), []
    method = l2w.SampleWeighting(model, still(model), meta_interval=9)
    monkeypatch.setattr(method, "meta_step", lambda *parts: None)
    update = method.update
    monkeypatch.setattr(method, "update", lambda *half: seen.append(half[1].tolist()) or update(*half))
    for n, halves in ((2, [[0], [1]]), (3, [[0], [1, 2]]), (1, [[0]])):
        seen.clear()
        outcome = method.step(x[:n], torch.arange(n))
        assert seen == halves and outcome.labels.tolist() == list(range(n))
        assert outcome.per_sample.shape == (3, n) and [p.shape for p in outcome.predictions] == [(n, 5)] * 3


def test_the_outcome_of_two_halves_is_theirs_side_by_side():
    halves = [Outcome(torch.tensor(total), [torch.full((n, 2), total + value) for value in (1.0, 2.0)], torch.arange(n),
                      torch.full((2, n), total)) for n, total in ((1, 3.0), (2, 5.0))]
    joined = l2w._joined(*halves)
    assert joined.total == 8 and joined.labels.tolist() == [0, 0, 1]
    assert [p.tolist() for p in joined.predictions] == [[[4, 4], [6, 6], [6, 6]], [[5, 5], [7, 7], [7, 7]]]
    assert joined.per_sample.tolist() == [[3, 5, 5]] * 2


def test_the_weight_network_is_a_perceptron_with_relu_and_one_number_for_each_exit():
    torch.manual_seed(0)
    net, x = l2w.WeightNet(4, 3, 6, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    weights = list(net.state_dict().values())
    assert [tuple(weight.shape) for weight in weights[::2]] == [(6, 4), (6, 6), (6, 6), (3, 6)]
    expected = x
    for weight, bias in zip(weights[:6:2], weights[1:6:2]):
        expected = (expected @ weight.T + bias).clamp(min=0)
    torch.testing.assert_close(net(x), (expected @ weights[6].T + weights[7]).tanh())


@pytest.mark.parametrize(("reads", "width"), [("loss", 3), ("conf", 3), ("both", 6)])
@pytest.mark.parametrize(("centring", "over"), [("row", 1), ("col", 0), ("mat", (0, 1))])
def test_the_weights_of_samples_by_hand(reads, width, centring, over):
    model, (x, y) = network(boosted=True), batch()
    method = l2w.SampleWeighting(model, still(model), reads=reads, centring=centring, epsilon=0.4, hidden_size=8)
    predictions = [p.detach() for p in model(x)]
    losses = cross_entropies(predictions, y)
    confidence = torch.stack([p.softmax(dim=1).max(dim=1).values for p in predictions])
    known = {"loss": losses, "conf": confidence, "both": torch.cat([losses, confidence])}[reads]
    assert method.weight_net.first_hidden_layer.fc.in_features == len(known) == width
    output = method.weight_net(known.T).T
    torch.testing.assert_close(method.weights(predictions, losses), 1 + 0.4 * (output - output.mean(dim=over, keepdim=True)))
    total = (method.weights(predictions, losses) * losses).mean(dim=1).sum()
    torch.testing.assert_close(method.loss(x, y, share=0.5).total, 0.5 * total)
    torch.testing.assert_close(method.loss(x, y).total, total)


def test_the_state_of_sample_weighting_comes_back():
    model, (x, y) = network(boosted=True), batch()
    trained, again = (l2w.SampleWeighting(model, still(model), hidden_size=8, equalise=True) for _ in range(2))
    trained.step(x, y)
    again.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert again.batches == trained.batches == 1 and torch.equal(again.objective.average, trained.objective.average)
    assert not list(differences(again.weight_net.state_dict(), trained.weight_net.state_dict()))
    states = [list(method.meta_optimizer.state.values()) for method in (trained, again)]
    assert states[0] and not list(differences(*states))


def test_samples_leave_in_the_order_of_confidence_and_each_only_once():
    confidence = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.4, 0.3], [0.5, 0.5, 0.5, 0.6]])
    leavers = l2w.leaving(confidence, [0.3, 0.26, 0.44])   # a quota of 1, 1 and the rest
    assert [index.tolist() for index in leavers] == [[0], [2], [3, 1]]
    confidence = torch.zeros(2, 100)   # 0.29 * 100 is 29 in float32, and a little less in float64
    assert [len(index) for index in l2w.leaving(confidence, torch.tensor([0.29, 0.71], dtype=torch.float64))] == [29, 71]


@pytest.mark.parametrize("ranet", [False, True])
@pytest.mark.parametrize("more", [{"overlap": 1}, {"overlap": 2}, {"overlap": 2, "include_final": True}, {"groups": "1, rest"},
                                  {"groups": "all"}])
def test_one_routed_backward_pass_equals_a_pass_for_every_exit_with_features_cut_off(ranet, more):
    """Also for RANet, whose blocks hand lists of features to each other."""
    model, (x, y) = network(boosted=False, ranet=ranet), batch()
    n_exits = model.n_exits
    if "groups" in more:
        more = {"groups": [1, n_exits - 1] if more["groups"] == "1, rest" else [n_exits]}
    reference = copy.deepcopy(model)
    method = BlockLosses(model, still(model), distill_weight=0.0, temperature=1.0, **more)
    method.step(x, y)
    for n, first in enumerate(method.first_blocks):
        state = reference.backbone.start(x)
        for i in range(n + 1):
            if i == first:
                state = map_state(torch.Tensor.detach, state)
            logits, state = reference.backbone.step(i, state)
        torch.nn.functional.cross_entropy(logits, y).backward()
    for (name, got), want in zip(gradients(method).items(), (p.grad for p in reference.parameters()), strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("more", "first_blocks"), [
    ({"overlap": 1}, [0, 1, 2]), ({"overlap": 2}, [0, 0, 1]), ({"overlap": 3}, [0, 0, 0]), ({"overlap": 9}, [0, 0, 0]),
    ({"overlap": 1, "include_final": True}, [0, 1, 0]), ({"groups": [1, 2]}, [0, 1, 1]), ({"groups": [2, 1]}, [0, 0, 2])])
def test_blocks_that_the_loss_of_each_exit_trains(more, first_blocks):
    model = network(boosted=False)
    assert BlockLosses(model, still(model), distill_weight=0.0, temperature=1.0, **more).first_blocks == first_blocks


def test_groups_that_do_not_fit_are_refused():
    model = network(boosted=False)
    for wrong in ({"groups": [1, 1]}, {"overlap": 0}, {}):
        with pytest.raises(ValueError):
            BlockLosses(model, still(model), distill_weight=0.0, temperature=1.0, **wrong)


# Collaborating exits.

@pytest.mark.parametrize("ranet", [False, True])
@pytest.mark.parametrize("form", FORMS[:2])
def test_collaborating_exits_run_in_every_form_and_leave_early(ranet, form):
    model = network(boosted=False, ranet=ranet).float()
    model = BoostedNet(CollaborativeNet(model.backbone), [0.0] * model.n_exits).eval()
    for classifier in model.backbone.classifier:   # answers of an untrained network hardly differ
        torch.nn.init.normal_(classifier.weight)
    x = 3 * batch(24)[0].float()
    with torch.no_grad():
        logits = torch.stack(model(x))
        ready = prepare_for_inference(model, form)
        torch.testing.assert_close(torch.stack(ready(x)), logits, rtol=1e-4, atol=1e-4)
    confidence = logits.softmax(dim=2).amax(dim=2)
    thresholds = confidence.sort(dim=1).values[:, 11:13].mean(dim=1)   # between two of them
    for network_of_the_form in (model, ready):
        result = EarlyExit(network_of_the_form, thresholds, sizes_per_doubling=None)(x)
        stays = confidence < thresholds[:, None]
        want = (~stays[:-1]).float().argmax(dim=0).where((~stays[:-1]).any(dim=0), torch.tensor(model.n_exits - 1))
        assert torch.equal(result.exit, want) and len(set(want.tolist())) > 1
        assert torch.equal(result.prediction, logits.argmax(dim=2)[want, torch.arange(24)])
        torch.testing.assert_close(result.confidence, confidence[want, torch.arange(24)], rtol=1e-4, atol=1e-5)


def test_the_frozen_network_stays_as_trained_statistics_included(finished):
    before = checkpoint.load(finished("joint") / "model_best.pth")["state_dict"]
    after = checkpoint.load(finished("imta") / "model_latest.pth")["state_dict"]
    assert not list(differences(before, {name.removeprefix("net."): t for name, t in after.items() if name.startswith("net.")}))
    assert {name.split(".")[0] for name in after} == {"net", "classifier", "isc_modules"}


def test_the_loss_of_collaborating_exits_by_hand():
    model, (x, y) = network(boosted=False, n_blocks=2), batch()
    model = BoostedNet(CollaborativeNet(model.backbone).double(), [0.0, 0.0]).train()
    outcome = imta.Collaboration(model, still(model), gamma=0.25, temperature=2.0).loss(x, y)
    (first, last), teacher = model.backbone.with_teacher(x)
    ce = [torch.nn.functional.cross_entropy(p, y) for p in (first, last)]
    log_teacher = (teacher / 2).log_softmax(dim=1)
    kl = (log_teacher.exp() * (log_teacher - (first / 2).log_softmax(dim=1))).sum(dim=1).mean()
    torch.testing.assert_close(outcome.total, ce[1] + 0.75 * ce[0] + 0.25 * 4 * kl)


def test_collaborating_exits_weigh_a_part_of_a_batch_by_its_share_by_hand():
    model, (x, y) = network(boosted=False, n_blocks=2), batch()
    model = BoostedNet(CollaborativeNet(model.backbone).double(), [0.0, 0.0]).train()
    method = imta.Collaboration(model, still(model))
    whole = method.loss(x, y).total
    torch.testing.assert_close(method.step(x, y).total, whole)
    for share in (0.5, 1.0, 2.0):
        torch.testing.assert_close(method.loss(x, y, share=share).total, share * whole)


def test_collaborating_exits_have_the_paper_s_constants_and_leave_a_single_image_out():
    model, (x, y) = network(boosted=False, n_blocks=2), batch()
    model = BoostedNet(CollaborativeNet(model.backbone).double(), [0.0, 0.0]).train()
    method = imta.Collaboration(model, still(model))
    assert (method.gamma, method.temperature, method.scale) == (0.9, 3.0, pytest.approx(8.1))
    assert method.step(x[:1], y[:1]) is None and method.step(x[:0], y[:0]) is None
    assert method.step(x[:2], y[:2]).per_sample.shape == (2, 2)


def test_collaborating_exits_start_from_a_network_whose_exits_predict_alone():
    model = network(boosted=False, n_blocks=2)
    weights = {name: torch.full_like(value, 3) for name, value in model.backbone.state_dict().items()}
    model = BoostedNet(CollaborativeNet(model.backbone).double(), [0.0, 0.0])
    with pytest.raises(UserError, match="file has boosted exits"):
        imta.Collaboration.load_start(model, {"state_dict": weights, "temperatures": [0.0, 0.5]}, "file")
    for saved in ({}, {"temperatures": [0.0, 0.0]}):
        model.backbone.net.blocks[0][0].layers[0].net[0].weight.data.zero_()
        imta.Collaboration.load_start(model, {"state_dict": weights, **saved}, "file")
        assert (model.backbone.net.blocks[0][0].layers[0].net[0].weight == 3).all()


# Mistakes that only show with the files at hand.

@pytest.mark.parametrize(("flags", "message"), [
    ("--method imta --checkpoint {boost}/model_best.pth", "boosted exits"),
    ("--method imta --checkpoint {joint}/model_best.pth --seed 1", "another hold-out split"),
    ("--method imta --resume", "nothing to resume"),
    ("--freeze_backbone --resume", "nothing to resume"),
    ("--method boost_distill --teacher {joint}/model_best.pth --valid_size 9", "another hold-out split"),
    ("--method boost_distill --teacher {joint}/results.json", "it is a text file"),
    ("--method boost_distill --teacher {joint}/none.pth", "no such checkpoint"),
    ("--method l2w --nBlocks 3 --checkpoint {joint}/model_best.pth", "does not fit"),
])
def test_files_that_do_not_fit_are_refused_with_one_line(images, finished, tmp_path, capsys, flags, message):
    line = command(images, tmp_path / "run", *flags.format(joint=finished("joint"), boost=finished("boost")).split())
    capsys.readouterr()
    assert message in one_line_error(capsys, lambda: train_cifar100.main(line))


def test_a_teacher_of_other_classes_is_refused(images, finished, tmp_path, capsys):
    line = command(make_images(tmp_path / "two", classes=2), tmp_path / "run", "--method", "boost_distill",
                   "--teacher", str(finished("joint") / "model_best.pth"))
    finished("joint")
    capsys.readouterr()
    assert "other classes" in one_line_error(capsys, lambda: train_cifar100.main(line))


def test_fine_tuning_never_holds_out_what_the_network_was_trained_on(images, finished, tmp_path, capsys):
    start = ["--checkpoint", str(finished("boost") / "model_best.pth"), "--epochs", "1"]
    line = command(images, tmp_path / "a", *start, "--seed", "1")
    assert "another hold-out split" in one_line_error(capsys, lambda: train_cifar100.main(line))
    assert train_cifar100.main(command(images, tmp_path / "b", *start)) == 0
    other = make_images(tmp_path / "other", train=12)   # other images may be held out as one likes
    flags = ["--seed", "1", "--batch-size", "7"]
    assert train_cifar100.main(command(other, tmp_path / "c", *start, *flags)) == 0


def test_a_teacher_that_has_changed_ends_the_run_it_taught(images, finished, tmp_path, monkeypatch, capsys):
    teacher = tmp_path / "teacher.pth"
    teacher.write_bytes((finished("joint") / "model_best.pth").read_bytes())
    line = command(images, tmp_path / "run", "--method", "boost_distill", "--teacher", str(teacher))
    with monkeypatch.context() as patch:
        signal_at_step(patch, 3)
        assert train_cifar100.main(line) == STOPPED
    teacher.write_bytes((finished("boost") / "model_best.pth").read_bytes())
    capsys.readouterr()
    assert "teacher_hash was" in one_line_error(capsys, lambda: train_cifar100.main([*line, "--resume"]))


def test_collaboration_refuses_batches_that_it_would_all_leave_out(capsys):
    flags = "--method imta --checkpoint file.pth --result_dir run --batch-size".split()
    assert "at least 2 images" in one_line_error(capsys, lambda: cli.parse_args([*flags, "1"]))
    assert cli.parse_args([*flags, "2"]).batch_size == 2
