"""The additive head of BoostNet: every exit corrects the frozen, reweighted sum of the exits before it."""
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class BoostedNet(nn.Module):
    """A backbone whose exits are trained and read as an additive model (BoostNet, arXiv:2211.16726, eq. 5-8).

    `F_1 = f_1` and `F_n = t_n F_{n-1} + f_n`. With every t_n = 0 this is the jointly trained baseline.

    Args:
        backbone: network that returns the raw logits f_n of its exits, `n_exits` of them.
        temperatures: t_1 ... t_N, one per exit; t_1 is not used.
        trainable_ensemble: let gradients flow through F_{n-1} (the paper's ablation).
    Raises:
        ValueError: when there is not one temperature per exit.
    """

    def __init__(self, backbone: nn.Module, temperatures: Sequence[float], trainable_ensemble: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.temperatures = tuple(float(t) for t in temperatures)   # not a buffer: checkpoints hold the backbone alone
        self.trainable_ensemble = trainable_ensemble
        if len(self.temperatures) != backbone.n_exits:
            raise ValueError(f"{len(self.temperatures)} temperatures for {backbone.n_exits} exits; give one per exit")
        if not all(map(math.isfinite, self.temperatures)):
            raise ValueError(f"temperatures must be finite, got {self.temperatures}")

    @property
    def n_exits(self) -> int:
        return self.backbone.n_exits

    def boost(self, logits: Sequence[Tensor], trainable: bool = False) -> list[Tensor]:
        """Turn raw logits f_n into predictions F_n.

        Args:
            logits: raw logits (B, num_classes) of every exit.
            trainable: keep t_n F_{n-1} in the graph; otherwise it is a constant to the loss of exit n.
        Returns:
            Predictions (B, num_classes) of every exit, before softmax.
        """
        predictions: list[Tensor] = []
        for n, raw in enumerate(logits):
            predictions.append(self.add(n, raw, predictions[-1] if n else None, trainable))
        return predictions

    def add(self, n: int, raw: Tensor, previous: Tensor | None, trainable: bool = False) -> Tensor:
        """F_n from f_n and F_{n-1} (None in front of exit 0), for runs that go exit by exit."""
        if previous is None:
            return raw
        return self.temperatures[n] * (previous if trainable else previous.detach()) + raw

    def forward(self, x: Tensor) -> list[Tensor]:
        """Predictions F_n (B, num_classes) of every exit for images x (B, 3, H, W)."""
        return self.boost(self.backbone(x), self.trainable_ensemble)


def expand_temperatures(values: Sequence[float], n_exits: int) -> list[float]:
    """One temperature per exit from one value for all, two interpolated linearly from first to last exit, or all of them.

    Raises:
        ValueError: for any other number of values.
    """
    if len(values) == n_exits:
        return list(values)
    if len(values) == 1:
        return list(values) * n_exits
    if len(values) == 2:
        first, last = values
        return [first + (last - first) * n / max(n_exits - 1, 1) for n in range(n_exits)]
    raise ValueError(f"--ensemble_reweight has {len(values)} values for {n_exits} exits; pass 1, 2 or {n_exits}")
