"""The networks, the boosted head, its gradients and its SGD trajectory equal the released implementation in float64."""
import golden
import pytest
import torch

from args import parse_args
from models import BoostedNet, build_backbone
from op_counter import measure_model
from utils.methods import Method
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer

MODELS = ["msdnet_cifar100_anytime", "msdnet_ge_cifar100_anytime", "msdnet_ge_cifar100_batch_base4",
          "msdnet_ge_cifar100_batch_base8", "msdnet_ge_imagenet_step4", "ranet_cifar100_anytime", "ranet_cifar100_batch_model1"]
CONFIGS = golden.load("macs")["configs"]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    reference = golden.load(request.param)
    return reference, golden.fill(build_backbone(parse_args(reference["flags"].split())))


def test_state_dict_names_order_and_shapes_are_the_released_ones(case):
    reference, backbone = case
    assert [[name, list(t.shape)] for name, t in backbone.state_dict().items()] == reference["state_dict"]


def test_eval_logits_and_boosted_predictions(case):
    reference, backbone = case
    backbone.eval()
    stored = reference["eval"]
    with torch.no_grad():
        raw = backbone(golden.images(stored["batch"], reference["input_hw"]))
    assert len(raw) == backbone.n_exits == reference["exits"]
    for got, want in zip(raw, stored["raw"], strict=True):
        golden.assert_logits(got, want)
    for got, want in zip(BoostedNet(backbone, reference["ensemble_reweight"]).boost(raw), stored["boosted_forward"], strict=True):
        golden.assert_logits(got, want)


def _training_temperatures(reference, method):
    """The released training code applies each temperature one exit later than the paper's equation does."""
    if method == "joint":
        return [0.0] * reference["exits"]
    return [0.0, *reference["ensemble_reweight"][:-1]]


@pytest.mark.parametrize("method, form", [("boost", "grouped"), ("joint", "grouped"), ("boost", "plain")])
def test_training_losses_gradients_and_sgd_steps(case, method, form):
    reference, backbone = case
    stored, want = reference["train"], reference["train"][method]
    golden.fill(backbone)
    model = BoostedNet(backbone, _training_temperatures(reference, method)).train()
    x = golden.images(stored["batch"], reference["input_hw"])
    y = golden.targets(stored["batch"], reference["num_classes"])
    assert y.tolist() == stored["targets"]
    optimizer = build_optimizer(backbone, name="sgd", lr=0.1, momentum=0.9, weight_decay=[1e-4])
    training = Method(model, optimizer, network=training_forward(model, batch_size=len(x)) if form == "grouped" else None)

    total_losses = []
    steps = len(want.get("sgd_total_losses") or [None])
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = training.loss(x, y)
        total_losses.append(loss.total.item())
        if step == 0:
            assert loss.per_sample.mean(dim=1).tolist() == pytest.approx(want["exit_losses"], rel=1e-9)
            assert loss.total.item() == pytest.approx(want["total_loss"], rel=1e-9)
        if step < max(steps - 1, 1):
            loss.total.backward()
        if step == 0:
            _assert_gradients(backbone, want["grads"], noise=_biases_before_normalisation(backbone))
            buffers = want["bn_buffers_after_first_forward"]
            for kind in ("running_mean", "running_var"):
                stats = golden.sum_l2(t for name, t in backbone.named_buffers() if name.endswith(kind))
                assert stats.sum == pytest.approx(buffers[kind]["sum"], rel=1e-9)
                assert stats.l2 == pytest.approx(buffers[kind]["l2"], rel=1e-9)
        if step < steps - 1:
            optimizer.step()
    if steps > 1:
        assert total_losses == pytest.approx(want["sgd_total_losses"], rel=1e-8)
        stats = golden.sum_l2(backbone.parameters())
        assert stats.sum == pytest.approx(want["after_3_steps"]["parameters"]["sum"], rel=1e-8)
        assert stats.l2 == pytest.approx(want["after_3_steps"]["parameters"]["l2"], rel=1e-8)


def _biases_before_normalisation(backbone):
    return {name for name, p in backbone.named_parameters() if name.endswith("layers.0.0.bias")}


def _assert_gradients(backbone, stored, noise):
    got = dict(backbone.named_parameters())
    assert list(got) == [name for name, *_ in stored]
    for name, total, l2 in stored:
        if name not in noise:   # zero in exact arithmetic: what is stored there is rounding noise
            stats = golden.sum_l2([got[name].grad])
            assert stats.l2 == pytest.approx(l2, rel=1e-8), name
            assert abs(stats.sum - total) <= 1e-8 * l2, name


@pytest.mark.parametrize("config", CONFIGS, ids=[c["name"] for c in CONFIGS])
def test_macs_and_parameters_of_every_configuration_are_exact(config):
    backbone = build_backbone(parse_args(config["flags"].split()))
    for _ in range(2):   # a second call counts the same
        macs, params = measure_model(backbone, config["input_hw"], config["input_hw"])
        assert macs == config["macs"]
        assert params == config["params"]
    assert params[-1] == config["total_params"] == sum(p.numel() for p in backbone.parameters())
