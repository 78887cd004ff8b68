"""What a network with early exits has to offer, and the check that it does."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 3   # images of the check
TOLERANCE = 1e-3   # of the check, in parts of the largest logit: batches of other sizes round differently


class Backbone(nn.Module):
    """A network that can be run exit by exit, each step on the state that the one before returned.

    The protocol. Training, evaluation, early exit, export and cost counts ask of a network, which is an nn.Module, only

        n_exits              number of exits, at least 1;
        start(x)             the state in front of exit 0, for images x (B, 3, H, W);
        step(n, state)       what lies between exit n-1 and exit n, and its classifier, run on what step n-1 returned:
                             (raw logits (B, num_classes), next state);
        forward(x)           raw logits of every exit, shallow to deep: a list.

    A state is a tensor, or a list, tuple or NamedTuple of states. Images that leave are taken out of the batch by
    taking their rows out of every tensor of the state. Hence row i of each tensor belongs to image i of the batch and shares
    memory with nothing else, no row depends on another in eval mode, and a step does not write to the state it is given.
    `check_backbone` holds a network to this.

    This class is one way to have it: subclasses define `start`, a ModuleList `classifier` with one module for each exit, and

        advance(n, state)    run the blocks up to exit n; return (what its classifier reads, next state).

    Some options need more. New exits that read each other's answers (`CollaborativeNet`) take `advance`, and classifiers that
    are `linear(pool(x))`. Weight decay interpolated from exit to exit takes `block(n)`, the modules that step n alone runs in
    front of its classifier (for n = 0 with those of `start`), and `head(n)`. Training the exits only takes `freeze`.

    Attributes:
        exit_names: names of the submodules that make up the exits.
        added_names: of those among them that the published network of this kind has not, whose weights may be a start.
        stem_names: names of the submodules that depend on the size of the images.
        image_size: height and width of its images in pixels, where it says so.
        frozen: see `freeze`.
    """

    exit_names: tuple[str, ...] = ("classifier",)
    added_names: tuple[str, ...] = ()
    stem_names: tuple[str, ...] = ()
    image_size: int | None = None
    frozen = False

    @property
    def n_exits(self) -> int:
        return len(self.classifier)

    def head(self, n: int) -> nn.Module:
        """The classifier of exit n."""
        return self.classifier[n]

    def step(self, n: int, state: Any) -> tuple[Tensor, Any]:
        """Run the blocks up to exit n and its classifier: (raw logits (B, num_classes), next state)."""
        features, state = self.advance(n, state)
        return self.head(n)(features), state

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raw logits (B, num_classes) of every exit, shallow to deep, for images x (B, 3, H, W)."""
        state, logits = self.start(x), []
        for n in range(self.n_exits):
            exit_logits, state = self.step(n, state)
            logits.append(exit_logits)
        return logits

    def freeze(self) -> None:
        """Let training change the exits only: all other parameters have no gradient, all other modules stay in eval mode."""
        self.frozen = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in self.exit_names)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.frozen:
            for name, child in self.named_children():
                child.train(mode and name in self.exit_names)
        return self


def map_state(function: Callable[[Tensor], Any], state: Any) -> Any:
    """A state, as `start` or `step` of a backbone returned it, with `function` of every tensor in the tensor's place."""
    if isinstance(state, Tensor):
        return function(state)
    if state is None:   # in forms for inference
        return None
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else parts


@torch.no_grad()
def check_backbone(backbone: nn.Module, *, num_classes: int, image_size: int) -> None:
    """Run a few random images through a network, to see that it meets the protocol of `Backbone`; it is left as it is.

    Raises:
        ValueError: saying what it lacks.
    """
    kind = type(backbone).__name__
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"a backbone is a torch.nn.Module, got {kind}")
    missing = [name for name in ("n_exits", "start", "step") if not hasattr(backbone, name)]
    if missing:
        raise ValueError(f"{kind} has no {', '.join(missing)}; a backbone has n_exits, start(x) and step(n, state): derive it "
                         "from models.Backbone, or make a models.ChainNet of its stages")
    n_exits = backbone.n_exits
    if type(n_exits) is not int or n_exits < 1:
        raise ValueError(f"{kind}.n_exits is {n_exits!r}; it takes a whole number of at least 1")
    like = next(backbone.parameters(), torch.empty(0))
    images = torch.randn(ROWS, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(like)
    with _evaluating(backbone):
        at_once = backbone(images)
        if not isinstance(at_once, (list, tuple)) or len(at_once) != n_exits:
            found = f"{len(at_once)} of them" if isinstance(at_once, (list, tuple)) else type(at_once).__name__
            raise ValueError(f"{kind}.forward returned {found}; it has {n_exits} exits, and returns a list of their logits")
        _check_steps(backbone, images, at_once, num_classes)


def _check_steps(backbone: nn.Module, images: Tensor, at_once: list[Tensor], num_classes: int) -> None:
    """Run step by step, from the second exit on with two of the rows, in another order."""
    kind, rows, place = type(backbone).__name__, torch.arange(ROWS, device=images.device), "start"
    of_its_own = {tensor.untyped_storage().data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    state = backbone.start(images)
    for n, expected in enumerate(at_once):
        given = _checked_tensors(state, len(rows), f"{kind}.{place}", of_its_own)
        versions, place = [tensor._version for tensor in given], f"step({n}, state)"
        returned = backbone.step(n, state)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Tensor):
            raise ValueError(f"{kind}.{place} returned {_shown(returned)}; it returns (logits, next state)")
        logits, state = returned
        if logits.shape != (len(rows), num_classes):
            raise ValueError(f"{kind}.{place} returned logits of shape {list(logits.shape)} for {len(rows)} images and "
                             f"{num_classes} classes; expected {[len(rows), num_classes]}")
        if [tensor._version for tensor in given] != versions:
            raise ValueError(f"{kind}.{place} writes to the state it is given, which other exits and methods still read; let its "
                             "first operation not be in place, such as nn.ReLU() for nn.ReLU(inplace=True)")
        difference = (logits - expected[rows]).abs().max()
        if difference > TOLERANCE * expected.abs().max():   # not where either is NaN, which says nothing of the protocol
            raise ValueError(f"{kind}.{place} gives other logits than {kind}.forward"
                             + (" gave those images in a larger batch: a row of the state belongs to one image, and no row may "
                                "depend on another in eval mode" if n else ""))
        if n == 0 and len(at_once) > 1:
            _checked_tensors(state, len(rows), f"{kind}.{place}", of_its_own)
            rows = rows[[2, 0]]
            state = map_state(lambda tensor: tensor[[2, 0]], state)


def _checked_tensors(state: Any, n_rows: int, place: str, of_its_own: set[int]) -> list[Tensor]:
    """The tensors of a state whose rows can be taken; raise ValueError for any other state."""
    if isinstance(state, (list, tuple)):
        return [tensor for part in state for tensor in _checked_tensors(part, n_rows, place, of_its_own)]
    if not isinstance(state, Tensor):
        raise ValueError(f"{place} returned a state with {_shown(state)} in it; a state is a tensor, or lists and tuples of "
                         "tensors")
    if state.ndim < 1 or len(state) != n_rows:
        raise ValueError(f"{place} returned a state with a tensor of shape {list(state.shape)} for {n_rows} images; its first "
                         "dimension has to be the image's place in the batch")
    expanded = any(stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True))
    if expanded or state.untyped_storage().data_ptr() in of_its_own:
        raise ValueError(f"{place} returned a state with a tensor that shares memory, between its rows or with the network's own "
                         "tensors; early exit moves rows in place, so return a clone()")
    return [state]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode while the block runs; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
