"""ResNet-18 and ResNet-34 of torchvision, with an exit after each of their four stages."""
from __future__ import annotations

from torch import Tensor, nn

from models.backbone import Backbone
from models.chain import PooledClassifier
from models.layers import check_choice, check_positive, choose_stem, rescale_at_exit

ARCHITECTURES = ("resnet18", "resnet34")


class ResNet(Backbone):
    """torchvision's ResNet (arXiv:1512.03385), cut into its stages.

    All parameters have torchvision's names, the last classifier `fc` too, so that its weight files load; those of the first three
    classifiers are in `classifier`. For small images the first convolution is the usual 3x3 one with stride 1, without pooling
    behind it.

    Args:
        arch: "resnet18" or "resnet34".
        num_classes, image_size: classes; side of the images in pixels.
        stem: "small" or "large" (torchvision's own); default: large for images from 97 pixels on.
        rescale_gradients: gradient rescaling at every exit (backward pass only).
    Raises:
        ValueError: on values that do not describe a network.
    """

    exit_names = ("classifier", "fc")
    stem_names = ("conv1", "bn1")
    added_names = ("classifier",)

    def __init__(self, arch: str = "resnet18", *, num_classes: int = 1000, image_size: int = 224, stem: str | None = None,
                 rescale_gradients: bool = False) -> None:
        from torchvision.models import resnet  # here, because it is slow to import

        super().__init__()
        check_choice("arch", arch, ARCHITECTURES)
        check_positive(num_classes=num_classes)
        stem = choose_stem(image_size, stem)
        self.rescale_gradients, self.image_size = rescale_gradients, image_size
        net = getattr(resnet, arch)(num_classes=num_classes)
        if stem == "small":
            net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")   # as torchvision's
            net.maxpool = nn.Identity()
        for name, module in net.named_children():
            setattr(self, name, module)
        widths = [stage[-1].conv2.out_channels for stage in (self.layer1, self.layer2, self.layer3)]
        self.classifier = nn.ModuleList(PooledClassifier(width, num_classes) for width in widths)
        last = PooledClassifier(net.fc.in_features, num_classes)
        self.avgpool, self.fc = last.mean, last.linear
        self._last = (last,)   # in a tuple, so that its parts are registered under torchvision's names only

    @property
    def n_exits(self) -> int:
        return 4

    def head(self, n: int) -> nn.Module:
        return self._last[0] if n == 3 else self.classifier[n]

    def block(self, n: int) -> list[nn.Module]:
        """The modules that step n runs in front of its classifier."""
        stem = [self.conv1, self.bn1, self.relu, self.maxpool] if n == 0 else []
        return [*stem, getattr(self, f"layer{n + 1}")]

    def start(self, x: Tensor) -> Tensor:
        return x

    def advance(self, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
        x = state
        for module in self.block(n):
            x = module(x)
        return rescale_at_exit(x, n, self.n_exits) if self.rescale_gradients else (x, x)
