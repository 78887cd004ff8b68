"""Learning to weight samples: a small network says how much each sample counts at each exit."""
from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaptive_inference import released_shares
from utils.core.distributed import average_gradients
from utils.methods.base import Method, Outcome, is_divisible, parts_of_batch

CENTRED_OVER = {"row": 1, "col": 0, "mat": (0, 1)}   # dimension of (n_exits, B): samples, exits, both


class Half(NamedTuple):
    """Half of a process's part of a batch; `share` weights the mean over it, as `ExitLosses` has it."""

    images: Tensor
    labels: Tensor
    share: float


class _Hidden(nn.Module):
    """Linear layer with ReLU; the name `fc` is part of the checkpoint format."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


class WeightNet(nn.Module):
    """Perceptron from what is known of a sample, (B, in_width), to one number in (-1, 1) per exit, (B, n_exits)."""

    def __init__(self, in_width: int, n_exits: int, hidden_size: int, n_layers: int) -> None:
        super().__init__()
        self.first_hidden_layer = _Hidden(in_width, hidden_size)
        self.rest_hidden_layers = nn.Sequential(*(_Hidden(hidden_size, hidden_size) for _ in range(n_layers - 1)))
        self.output_layer = nn.Linear(hidden_size, n_exits)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.rest_hidden_layers(self.first_hidden_layer(x))).tanh()


class SampleWeighting(Method):
    """Learning to weight samples (L2W-DEN, arXiv:2209.08310).

    Each half of a batch is trained on in turn, weighted, after a meta step: the weight network is moved so that the SGD step
    which its weights would cause lowers the loss of the other half, where a sample counts only at the exit it would leave at.
    Batch-norm statistics of that trial are thrown away. With a boosted head all of this looks at the predictions F_n.

    In a batch of odd size the second half is the larger one. A single image is trained on as it is, without a meta step.

    In several processes each one halves its own part of the batch, and makes trial and meta loss of these; gradients of both
    networks are means over the processes, weighted by the sizes of their halves. A batch that leaves any process with a single
    image is trained on as it is by all.

    Args:
        hidden_size, n_layers: of the weight network.
        reads: "loss", "conf" (largest softmax probability) or "both": what it knows of a sample at every exit.
        centring: the mean taken off its output is over the samples ("row"), the exits ("col") or both ("mat").
        epsilon: weight = 1 + epsilon * centred output.
        target_p_index: the held-out half leaves in shares proportional to q^n, q = target_p_index / 20.
        meta_interval: batches from one with meta steps to the next.
        meta_lr, meta_weight_decay: of Adam on the weight network.
    """

    def __init__(self, *args: Any, hidden_size: int = 500, n_layers: int = 1, reads: str = "loss", centring: str = "mat",
                 epsilon: float = 0.3, target_p_index: int = 15, meta_interval: int = 1, meta_lr: float = 1e-4,
                 meta_weight_decay: float = 1e-4, **options: Any) -> None:
        super().__init__(*args, **options)
        n_exits, like = self.model.n_exits, next(self.model.parameters())
        # A copy, because SyncBatchNorm, which may replace the network's normalisation later, has no second derivative. It needs
        # no storage: every call brings parameters and buffers along.
        self.trial_network = copy.deepcopy(self.network).train().to("meta")
        self.weight_net = WeightNet(n_exits * (1 + (reads == "both")), n_exits, hidden_size, n_layers).to(like)
        self.meta_optimizer = torch.optim.Adam(self.weight_net.parameters(), lr=meta_lr, weight_decay=meta_weight_decay)
        self.reads, self.centring, self.epsilon = reads, centring, epsilon
        self.shares = released_shares(target_p_index / 20, n_exits)
        self.other_optimizers = (self.meta_optimizer,)
        self.meta_interval, self.batches = meta_interval, 0

    @classmethod
    def options(cls, args: argparse.Namespace) -> dict[str, Any]:
        return {"hidden_size": args.meta_net_hidden_size, "n_layers": args.meta_net_num_layers,
                "reads": args.meta_net_input_type, "centring": args.constraint_dimension, "epsilon": args.epsilon,
                "target_p_index": args.target_p_index, "meta_interval": args.meta_interval, "meta_lr": args.meta_lr,
                "meta_weight_decay": args.meta_weight_decay}

    def step(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        if not is_divisible(labels, share):
            return self.update(images, labels, share)
        first, second = _halves(images, labels, share)
        outcomes = []
        for training, held_out in ((first, second), (second, first)):
            if self.batches % self.meta_interval == 0:
                self.meta_step(training, held_out)
            outcomes.append(self.update(*training))
        self.batches += 1
        return _joined(*outcomes)

    @staticmethod
    def smallest_pass(n: int) -> int:
        return max(n // 2, 1)

    def loss(self, images: Tensor, labels: Tensor, share: float = 1.0) -> Outcome:
        predictions = self.predict(images)
        per_sample = self.cross_entropies(predictions, labels)
        with torch.no_grad():
            weights = self.weights(predictions, per_sample)
        return Outcome(self.objective(weights * per_sample, share), predictions, labels, per_sample.detach())

    def weights(self, predictions: list[Tensor], per_sample: Tensor) -> Tensor:
        """Weight (n_exits, B) of every sample at every exit, for their predictions and cross entropies (n_exits, B)."""
        known = [per_sample.detach()] if self.reads != "conf" else []
        if self.reads != "loss":
            known.append(_confidences(predictions))
        output = self.weight_net(torch.cat(known).T).T
        return 1 + self.epsilon * (output - output.mean(dim=CENTRED_OVER[self.centring], keepdim=True))

    def meta_step(self, training: Half, held_out: Half) -> None:
        """Move the weight network, by Adam, down the loss of the held-out half after a trial step on the training half."""
        loss = self.meta_loss(training.images, training.labels, held_out.images, held_out.labels)
        gradients = torch.autograd.grad(loss * held_out.share, list(self.weight_net.parameters()))
        for parameter, gradient in zip(self.weight_net.parameters(), gradients):
            parameter.grad = gradient
        average_gradients(self.weight_net.parameters())
        self.meta_optimizer.step()

    def meta_loss(self, images: Tensor, labels: Tensor, held_out_images: Tensor, held_out_labels: Tensor) -> Tensor:
        """Loss of the held-out half after a trial step, a function of the weight network's parameters."""
        parameters = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        predictions = self._trial(parameters, images)
        per_sample = self.cross_entropies(predictions, labels)
        weighted = self.objective(self.weights(predictions, per_sample) * per_sample)
        # Parameters that no exit reads have no gradient, and the optimiser leaves them alone.
        gradients = torch.autograd.grad(weighted, list(parameters.values()), create_graph=True, allow_unused=True)
        group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        moved = {name: self._after_sgd(p, g, group_of[p]) for (name, p), g in zip(parameters.items(), gradients)}
        predictions = self._trial(moved, held_out_images)
        per_sample = self.cross_entropies(predictions, held_out_labels)
        leavers = leaving(_confidences(predictions), self.shares)
        return sum(per_sample[n, index].mean() for n, index in enumerate(leavers) if len(index))

    def _trial(self, parameters: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """Predictions of the network with other parameters, frozen ones apart; its buffers stay as they are."""
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return functional_call(self.trial_network, {**dict(self.network.named_parameters()), **parameters, **buffers}, images)

    def _after_sgd(self, parameter: Tensor, gradient: Tensor | None, group: dict[str, Any]) -> Tensor:
        """Where the optimiser's next step would take a parameter of a group, a function of the gradient; all else is constant."""
        if gradient is None:
            return parameter.detach()
        gradient = gradient + group["weight_decay"] * parameter.detach()
        buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
        move = gradient if buffer is None else gradient + group["momentum"] * buffer
        if group["nesterov"]:
            move = gradient + group["momentum"] * move
        return parameter.detach() - group["lr"] * move

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weight_net": self.weight_net.state_dict(), "batches": self.batches,
                "meta_optimizer": self.meta_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.weight_net.load_state_dict(state["weight_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self.batches = state["batches"]


def _halves(images: Tensor, labels: Tensor, share: float) -> tuple[Half, Half]:
    """The two halves of this process's part of a batch, each weighted within the same half of all processes."""
    half, parts = len(labels) // 2, parts_of_batch(labels, share)
    first, second = sum(part // 2 for part in parts), sum(part - part // 2 for part in parts)
    return (Half(images[:half], labels[:half], half * len(parts) / first),
            Half(images[half:], labels[half:], (len(labels) - half) * len(parts) / second))


def leaving(confidence: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Which of N samples leave at which exit when every exit, from the first, takes its share of the most confident ones.

    Args:
        confidence: (n_exits, N).
        shares: (n_exits,) float32; an exit takes floor(N * share), the product in float32, and the last one the rest.
    Returns:
        n_exits int64 tensors of sample numbers, by falling confidence.
    """
    counts = torch.as_tensor(shares, dtype=torch.float32).mul(confidence.shape[1]).floor().int().tolist()
    left, leavers = torch.arange(confidence.shape[1], device=confidence.device), []
    for n, count in enumerate(counts):
        order = left[confidence[n, left].argsort(descending=True, stable=True)]
        count = len(order) if n == len(counts) - 1 else count
        leavers.append(order[:count])
        left = order[count:]
    return leavers


def _confidences(predictions: list[Tensor]) -> Tensor:
    """Largest softmax probability (n_exits, B), without gradient."""
    return torch.stack([p.detach().softmax(dim=1).amax(dim=1) for p in predictions])


def _joined(a: Outcome, b: Outcome) -> Outcome:
    """Outcome of a batch of its two halves'."""
    return Outcome(a.total + b.total, [torch.cat(pair) for pair in zip(a.predictions, b.predictions)],
                   torch.cat([a.labels, b.labels]), torch.cat([a.per_sample, b.per_sample], dim=1))
