"""Early exits on any chain of modules."""
from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import rescale_at_exit


class PooledClassifier(nn.Module):
    """The mean over the map, and a linear layer: from (B, channels, H, W), any H and W, to logits (B, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.mean, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, num_classes)

    def pool(self, x: Tensor) -> Tensor:
        """The features (B, channels) that the linear layer reads."""
        return self.mean(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x))


class ChainNet(Backbone):
    """A backbone of modules that run one after the other, with a classifier behind each of them.

        stages = [nn.Sequential(conv1, relu), block1, block2]
        net = ChainNet(stages, [PooledClassifier(width, num_classes) for width in (16, 32, 64)])

    It meets the protocol of `models.backbone.Backbone`, which says what is asked of any backbone; its state is what the last
    stage returned. docs/own_network.md has a whole example.

    Args:
        stages: each takes what the one before returned, the first one images (B, 3, H, W), and returns a tensor whose first
            dimension is the image's place in the batch. Where a network has no exit behind one of them, join two with
            nn.Sequential. The first operation of a stage does not work in place.
        classifiers: for each stage one, from what it returns to logits (B, num_classes); `PooledClassifier` or any other module.
        rescale_gradients: gradient rescaling at every exit (backward pass only), see `rescale_at_exit`.
    Raises:
        ValueError: when there is not one classifier for each stage.
    """

    def __init__(self, stages: Iterable[nn.Module], classifiers: Iterable[nn.Module], *, rescale_gradients: bool = False) -> None:
        super().__init__()
        self.stages, self.classifier = nn.ModuleList(stages), nn.ModuleList(classifiers)
        self.rescale_gradients = rescale_gradients
        if len(self.stages) != len(self.classifier) or not len(self.stages):
            raise ValueError(f"{len(self.stages)} stages and {len(self.classifier)} classifiers; give one classifier for each "
                             "stage, and join stages without an exit with nn.Sequential")

    def start(self, x: Tensor) -> Tensor:
        return x

    def advance(self, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stages[n](state)
        return rescale_at_exit(x, n, self.n_exits) if self.rescale_gradients else (x, x)

    def block(self, n: int) -> list[nn.Module]:
        """The modules that step n runs in front of its classifier."""
        return [self.stages[n]]
