"""Each flag for speed keeps the course of the losses within its arithmetic, really does something, and survives the rest."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import command, differences, make_images, one_line_error, outcome, signal_at_step

import train_cifar100
from models import BoostedNet, MSDNet, RANet
from models.grouped import GroupedForm
from utils.core.errors import STOPPED, UserError
from utils.methods import Method
from utils.training import fast_forward as fast
from utils.training.engine import EpochMeters, train_epoch
from utils.training.fast_forward import training_forward
from utils.training.optim import build_optimizer

BATCH, STEPS = 6, 4   # and a last batch of 5
NETWORKS = {
    "msdnet": lambda: MSDNet(n_blocks=2, n_channels=4, base=1, step=1, num_classes=5, rescale_gradients=True),
    "ranet": lambda: RANet(n_blocks=1, block_step=1, n_channels=4, scale_list=[1, 2, 3], gr_factor=[4, 2, 1],
                           bn_factor=[4, 2, 1], num_classes=5),
}
GPU = torch.device("cuda")


def network(name: str = "msdnet", device="cpu", dtype=torch.float32) -> BoostedNet:
    torch.manual_seed(0)
    backbone = NETWORKS[name]()
    return BoostedNet(backbone, [0.5] * backbone.n_exits).to(device, dtype)


def batches(device="cpu", dtype=torch.float32) -> list[tuple]:
    # Not seed 1: there a value in front of a ReLU of the RANet is zero to rounding, and the number of threads decides its sign.
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 32, 32, generator=draw, dtype=torch.float64).to(device, dtype),
             torch.randint(0, 5, (n,), generator=draw).to(device), 1.0) for n in [BATCH] * STEPS + [BATCH - 1]]


def train(model: BoostedNet, forward: BoostedNet, data: list[tuple]) -> SimpleNamespace:
    """Losses (n_steps, n_exits) of every step, and what the model is at the end."""
    optimizer = build_optimizer(model.backbone, name="sgd", lr=1e-3, momentum=0.9, weight_decay=[1e-4])
    meters = EpochMeters(model.n_exits, data[0][0].device)
    sums = [meters.sums[0].clone()]

    def after_step(step: int) -> bool:
        sums.append(meters.sums[0].clone())
        return False

    train_epoch(Method(model, optimizer, network=forward), data, meters, after_step=after_step)
    return SimpleNamespace(losses=torch.stack(sums).diff(dim=0), state=model.state_dict())


def losses(name: str, device="cpu", dtype=torch.float32, **options) -> torch.Tensor:
    model = network(name, device, dtype)
    return train(model, training_forward(model, batch_size=BATCH, **options), batches(device, dtype)).losses


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs() / want).max().item()


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without its code generator, which takes a minute; returns the batch sizes that were compiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(max((x.shape[0] for x in inputs if x.dim() == 4 and x.shape[1:] == (3, 32, 32)), default=None))
        return graph

    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    yield compiled
    torch._dynamo.reset()


class FakeGraph:
    """Stands in for a CUDA graph: a replay runs the function again and writes its results over those of the first run."""

    replays = 0

    def __init__(self, function) -> None:
        self.function, self.results = function, function()

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self) -> None:
        FakeGraph.replays += 1
        with torch.enable_grad():
            new = self.function()
        for result, value in zip(self.results, new):
            if result is not None:
                result.copy_(value)


@pytest.fixture
def fake_graphs(monkeypatch):
    """Graphs on the CPU: everything of theirs but CUDA itself."""
    def capture(function, pool=None):
        before = [buffer.clone() for buffer in buffers]
        with torch.random.fork_rng([]):
            graph = FakeGraph(function)
        for buffer, value in zip(buffers, before):   # a capture runs nothing, so it changes nothing
            buffer.data.copy_(value)   # unnoticed by autograd
        return graph, graph.results

    def forward(model: BoostedNet) -> BoostedNet:
        buffers.extend(model.buffers())
        backbone = fast.FastBackbone(model.backbone, batch_size=BATCH, amp="off", channels_last=False, compiled=False,
                                     cuda_graphs=True)
        return BoostedNet(backbone, model.temperatures)

    buffers: list[torch.Tensor] = []
    monkeypatch.setattr(fast, "_capture", capture)
    monkeypatch.setattr(fast, "_on_side_stream", lambda function, device: function())
    monkeypatch.setattr(FakeGraph, "replays", 0)
    return forward


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_and_compile_keep_the_losses_to_rounding(name, quick_compile):
    want = losses(name, dtype=torch.float64)
    for options in ({"channels_last": True}, {"channels_last": True, "compiled": True}):
        assert deviation(losses(name, dtype=torch.float64, **options), want) < 1e-9
        assert deviation(losses(name, **options), want) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_keeps_the_losses_to_two_percent_and_does_change_them(name):
    assert 1e-5 < deviation(losses(name, amp="bf16"), losses(name)) < 0.02


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_keep_every_bit_and_leave_statistics_and_random_numbers_alone(name, fake_graphs):
    def noisy() -> BoostedNet:
        model = network(name)
        model.backbone.register_forward_pre_hook(lambda module, x: (x[0] + 0.01 * torch.randn_like(x[0]),))
        return model

    plain = noisy()
    want = train(plain, plain, batches())
    draw = torch.rand(3)
    graphed = noisy()
    got = train(graphed, fake_graphs(graphed), batches())
    assert not list(differences(vars(got), vars(want)))
    assert torch.equal(torch.rand(3), draw)
    assert FakeGraph.replays == 2 * STEPS   # forward and backward; the last batch is smaller and runs as ever


def test_without_a_flag_the_grouped_form_is_trained():
    model = network()
    forward = training_forward(model, batch_size=BATCH)
    assert isinstance(forward.backbone, GroupedForm) and forward.backbone.backbone is model.backbone
    assert forward.temperatures == model.temperatures


@pytest.mark.parametrize("name", ["msdnet", "ranet"])
def test_channels_last_is_the_layout_inside_and_nothing_is_left_of_it_in_a_checkpoint(name):
    seen = []
    model = network(name)
    forward = training_forward(model, batch_size=BATCH, channels_last=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append(
                [t.is_contiguous(memory_format=torch.channels_last) for t in (x[0], m.weight, y)]))
    forward.train()
    forward(batches()[0][0])
    assert seen and all(map(all, seen))
    assert list(model.state_dict()) == list(network(name).state_dict())


def test_bfloat16_is_inside_only():
    seen = set()
    model = network()
    forward = training_forward(model, batch_size=BATCH, amp="bf16")
    hooks = [m.register_forward_hook(lambda m, x, y: seen.add(y.dtype)) for m in model.modules()
             if isinstance(m, torch.nn.Conv2d)]
    predictions = forward(batches()[0][0])
    assert seen == {torch.bfloat16}
    for hook in hooks:
        hook.remove()
    sum(p.sum() for p in predictions).backward()
    float32 = [*predictions, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert {t.dtype for t in float32} == {torch.float32}
    assert {t.dtype for t in model.eval()(batches()[0][0])} == {torch.float32}


def test_only_full_batches_in_training_are_compiled(quick_compile):
    model = network()
    forward = training_forward(model, batch_size=BATCH, compiled=True)
    quick_compile.clear()   # of the trial whether compiling works at all
    train(model, forward, batches())
    assert quick_compile == [BATCH]
    model.eval()(batches()[0][0])
    assert quick_compile == [BATCH]
    assert list(model.state_dict()) == list(network().state_dict())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def stopped_and_resumed_equals_uninterrupted(images, folder, monkeypatch, *more: str) -> None:
    assert train_cifar100.main(command(images, folder / "whole", *more)) == 0
    with monkeypatch.context() as patch:
        signal_at_step(patch, 7)
        assert train_cifar100.main(command(images, folder / "cut", *more)) == STOPPED
    assert train_cifar100.main(command(images, folder / "cut", *more, "--resume")) == 0
    assert not list(differences(outcome(folder / "cut"), outcome(folder / "whole")))


def test_a_run_with_flags_for_speed_resumes_to_the_same_bits(images, tmp_path, monkeypatch, quick_compile):
    stopped_and_resumed_equals_uninterrupted(images, tmp_path, monkeypatch, "--amp", "bf16", "--channels_last", "--compile",
                                             "--ema", "0.8", "--lr-type", "linear")


def test_graphs_without_cuda_are_refused_with_one_line(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = command(images, tmp_path, "--device", "auto", "--cuda_graphs")
    assert "--cuda_graphs needs a CUDA device" in one_line_error(capsys, lambda: train_cifar100.main(line))


def test_graphs_of_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(fast.distributed, "world_size", lambda: 2)
    parameter = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(UserError, match="one process"):
        training_forward(SimpleNamespace(parameters=lambda: iter([parameter])), batch_size=BATCH, cuda_graphs=True)


def test_compile_without_a_compiler_is_refused_with_one_line(images, tmp_path, capsys, monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    message = one_line_error(capsys, lambda: train_cifar100.main(command(images, tmp_path, "--compile")))
    assert "no C++ compiler found" in message and "story" not in message


@pytest.mark.slow
def test_generated_code_keeps_the_losses_to_rounding():
    assert deviation(losses("msdnet", channels_last=True, compiled=True), losses("msdnet")) < 1e-4


CUDA_OPTIONS = [dict(channels_last=True), dict(cuda_graphs=True), dict(channels_last=True, cuda_graphs=True), dict(compiled=True),
                dict(compiled=True, channels_last=True, cuda_graphs=True), dict(amp="bf16", channels_last=True, cuda_graphs=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("options", CUDA_OPTIONS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_losses_on_a_gpu_stay_within_the_arithmetic(name, options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert deviation(losses(name, GPU, **options), losses(name, GPU)) < (0.02 if "amp" in options else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--amp", "bf16"], ["--amp", "bf16", "--ema", "0.8", "--lr-type", "linear"]])
def test_graphs_on_a_gpu_resume_to_the_same_bits(images, tmp_path, monkeypatch, deterministic, more):
    stopped_and_resumed_equals_uninterrupted(images, tmp_path, monkeypatch, "--device", "cuda", "--deterministic",
                                             "--cuda_graphs", *more)
