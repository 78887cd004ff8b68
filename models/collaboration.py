"""New exits on a frozen backbone, each of which reads the answer of the one before it."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone

# What a step hands to the next one: the state of the frozen backbone, and the logits of the exit before (none before exit 0).
State = list[Any]


class CollaborativeNet(Backbone):
    """Inline subnetwork collaboration (arXiv:1908.06294): a backbone with other classifiers.

    Exit n is a linear layer on the pooled features of the backbone's classifier n, and from the second exit on also on the logits
    of exit n-1, passed through linear layer, normalisation and ReLU. Their gradient goes back into the exits before. The backbone
    is frozen: no gradient, and always in eval mode. It takes the place of a backbone wherever one is run step by step.

    Attribute names (`net`, `classifier`, `isc_modules`) are part of the checkpoint format.

    Args:
        net: a backbone with `advance`, whose classifiers are a linear layer on what they pool.
    Raises:
        ValueError: for any other network.
    """

    exit_names = ("classifier", "isc_modules")

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, Backbone):
            raise ValueError(f"collaborating exits take a network derived from models.Backbone, got {type(net).__name__}")
        heads = [net.head(n) for n in range(net.n_exits)]
        for head in heads:
            if not (hasattr(head, "pool") and isinstance(getattr(head, "linear", None), nn.Linear)):
                raise ValueError(f"collaborating exits read what a classifier gives its linear layer; {type(head).__name__} has "
                                 "not the parts `pool` and `linear`, as models.PooledClassifier has")
        self.net, self.image_size = net.requires_grad_(False), net.image_size
        linear = [head.linear for head in heads]
        num_classes = linear[0].out_features
        self.classifier = nn.ModuleList(
            nn.Linear(old.in_features * (2 if n else 1), num_classes) for n, old in enumerate(linear))
        self.isc_modules = nn.ModuleList(
            nn.Sequential(nn.Linear(num_classes, old.in_features), nn.BatchNorm1d(old.in_features), nn.ReLU(inplace=True))
            for old in linear[1:])
        self.train(self.training)

    def train(self, mode: bool = True) -> CollaborativeNet:
        super().train(mode)
        self.net.eval()
        return self

    def start(self, x: Tensor) -> State:
        """State in front of exit 0 for images x (B, 3, H, W)."""
        return [self.net.start(x), []]

    def step(self, n: int, state: State) -> tuple[Tensor, State]:
        """Run the blocks up to exit n on the state that step n-1 returned: (logits (B, num_classes), next state)."""
        logits, _, state = self._step(n, state)
        return logits, state

    def _step(self, n: int, state: State) -> tuple[Tensor, Tensor, State]:
        features, onward = self.net.advance(n, state[0])
        pooled = self.net.head(n).pool(features)
        read = torch.cat([pooled, self.isc_modules[n - 1](*state[1])], dim=1) if n else pooled
        logits = self.classifier[n](read)
        return logits, pooled, [onward, [logits]]

    def live(self, n: int, state: State) -> State:
        """The part of the state after step n that has been written to."""
        live = getattr(self.net, "live", lambda n, state: state)
        return [live(n, state[0]), state[1]]

    def with_teacher(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits (B, num_classes) of every exit, and those of the backbone's own last classifier."""
        state, all_logits = self.start(x), []
        for n in range(self.n_exits):
            logits, pooled, state = self._step(n, state)
            all_logits.append(logits)
        return all_logits, self.net.head(self.n_exits - 1).linear(pooled)
