"""A network of one's own, as its author writes it; tests name it with --arch."""
from torch import nn

from models import ChainNet, PooledClassifier


def build(num_classes: int, image_size: int) -> ChainNet:
    """Three exits; the map of the first stage has an eighth of the image's side."""
    widths = (3, 4, 6, 8)
    stages = [nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
              for before, after in zip(widths, widths[1:])]
    stages[0] = nn.Sequential(nn.AvgPool2d(4), stages[0])
    return ChainNet(stages, [PooledClassifier(width, num_classes) for width in widths[1:]], rescale_gradients=True)


def without_pool(num_classes: int, image_size: int) -> ChainNet:
    """The same with classifiers that are not a linear layer on what they pool."""
    net = build(num_classes, image_size)
    for n, classifier in enumerate(net.classifier):
        net.classifier[n] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier.linear)
    return net
