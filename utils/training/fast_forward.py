"""A faster forward and backward pass for training: the grouped form, and on request layout, bfloat16, torch.compile, CUDA graphs.

Only the backbone is run differently. Its logits come out in float32, so that the additive head, the losses and the
optimiser stay as they are, weights stay float32, and checkpoints and evaluation see the plain network.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import BoostedNet
from models.grouped import grouped_form
from utils.core import distributed
from utils.core.errors import UserError

AMP_TYPES = {"off": None, "bf16": torch.bfloat16}
WARM_UP = 3   # passes before a capture: libraries choose kernels and reserve memory in the first ones

Forward = Callable[[Tensor], list[Tensor]]


def training_forward(model: BoostedNet, *, batch_size: int, amp: str = "off", channels_last: bool = False,
                     compiled: bool = False, cuda_graphs: bool = False) -> BoostedNet:
    """What to call for the training forward pass: a network of the same parameters and buffers.

    Args:
        batch_size: images of a full batch. Others (the last of an epoch) are neither compiled nor captured: each size would
            have to be compiled anew, and padding would change the statistics of batch normalisation.
        amp: "bf16" runs convolutions and linear layers in bfloat16 (torch.autocast).
        channels_last: keep maps and convolution weights in that memory layout; those of `model` are converted.
        compiled: through torch.compile.
        cuda_graphs: record forward and backward pass once, at the first full batch, and replay them.
    Raises:
        UserError: when the machine cannot do it.
    """
    device = next(model.parameters()).device
    if cuda_graphs and device.type != "cuda":
        raise UserError("--cuda_graphs needs a CUDA device, and this run is on the CPU; leave the flag out")
    if cuda_graphs and distributed.world_size() > 1:
        raise UserError("--cuda_graphs is for one process, because what the processes exchange is not captured; leave it out")
    if compiled:
        _require_compiler(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    backbone = grouped_form(model.backbone)
    if amp != "off" or channels_last or compiled or cuda_graphs:
        backbone = FastBackbone(backbone, batch_size=batch_size, amp=amp, channels_last=channels_last, compiled=compiled,
                                cuda_graphs=cuda_graphs)
    return BoostedNet(backbone, model.temperatures, model.trainable_ensemble)


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(64, device=device))
    except Exception as error:   # whatever a missing or an unfit compiler raises
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"--compile: torch.compile does not work here ({reason}); leave the flag out") from error


class FastBackbone(nn.Module):
    """A backbone for training only; arguments as for `training_forward`."""

    def __init__(self, backbone: nn.Module, *, batch_size: int, amp: str, channels_last: bool, compiled: bool,
                 cuda_graphs: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.batch_size, self.amp_type, self.channels_last = batch_size, AMP_TYPES[amp], channels_last
        # Other ranks' or later batches of another size run eagerly, hence no code for sizes in general.
        self._full_batch: Forward = torch.compile(self._run, dynamic=False) if compiled else self._run
        self._uncaptured = cuda_graphs

    @property
    def n_exits(self) -> int:
        return self.backbone.n_exits

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raw logits (B, num_classes) of every exit, at least float32, for images x (B, 3, H, W)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if len(x) != self.batch_size:
            return self._run(x)
        if self._uncaptured:   # not before the first step: by then a resumed run has its weights
            self._full_batch, self._uncaptured = GraphedPass(self._full_batch, self.backbone, x), False
        return self._full_batch(x)

    def _run(self, x: Tensor) -> list[Tensor]:
        # Each weight is used once per pass, so autocast's cache of cast weights is of no use, and graphs do not bear it.
        with torch.autocast(x.device.type, dtype=self.amp_type, enabled=self.amp_type is not None, cache_enabled=False):
            logits = self.backbone(x)
        return [f.float() if f.dtype == torch.bfloat16 else f for f in logits]


class GraphedPass:
    """A function of one batch and its backward pass as two CUDA graphs, which autograd sees as one operation.

    The host launches two graphs in place of thousands of kernels. Outputs and gradients live in memory that the next call
    overwrites: they are to be used up within a step, and gradients to be dropped before the next one (`set_to_none`).

    Args:
        run: images to logits, differentiable in the parameters of `module`.
        module: its buffers, and the generators of random numbers, are left as they were.
        images: a batch of the shape and layout that is to come.
    """

    def __init__(self, run: Forward, module: nn.Module, images: Tensor) -> None:
        self.run = run
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.images = images.clone()
        before = [(buffer, buffer.clone()) for buffer in module.buffers()]
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            _on_side_stream(self._warm_up, images.device)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        self.forward_graph, self.outputs = _capture(self._forward)
        self.output_gradients = [torch.empty_like(output) for output in self.outputs]
        self.backward_graph, self.gradients = _capture(self._backward, self.forward_graph.pool())
        del self._live   # its nodes belong to the capture's stream, and autograd would wait for that in every later step

    def __call__(self, images: Tensor) -> list[Tensor]:
        return list(_Replay.apply(self, images, *self.parameters))

    def _forward(self) -> list[Tensor]:
        self._live = self.run(self.images)   # with the autograd graph that _backward goes through
        return [output.detach() for output in self._live]

    def _backward(self) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self._live, self.parameters, self.output_gradients, allow_unused=True)

    def _warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.output_gradients = [torch.ones_like(output) for output in self._forward()]
            self._backward()


def _on_side_stream(function: Callable[[], None], device: torch.device) -> None:
    # The stream of ordinary work must not be the one that was warmed up for a capture (PyTorch notes, "CUDA Graphs").
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        function()
    main.wait_stream(side)


def _capture(function: Callable[[], list | tuple], pool=None) -> tuple[torch.cuda.CUDAGraph, list | tuple]:
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads that pin memory for the next batches go on while this one records.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphed: GraphedPass, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphed = graphed
        graphed.images.copy_(images)
        graphed.forward_graph.replay()
        return tuple(output.detach() for output in graphed.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        for static, gradient in zip(ctx.graphed.output_gradients, output_gradients, strict=True):
            static.copy_(gradient)
        ctx.graphed.backward_graph.replay()
        return None, None, *(g if g is None else g.detach() for g in ctx.graphed.gradients)
