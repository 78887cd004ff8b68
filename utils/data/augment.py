"""Random crop, flip and normalisation of small images as batched tensor operations without host synchronisation."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.sampling import seeded_generator
from utils.options.catalog import is_cropped

CIFAR_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CACHED_VALUES = 2**20


def statistics_of(dataset: str, image_size: int, stem: str | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that images are normalised with: ImageNet's for cropped ones, else CIFAR-100's.

    Arguments as for `is_cropped`.
    """
    return IMAGENET_STATISTICS if is_cropped(dataset, image_size, stem) else CIFAR_STATISTICS


class CropFlip:
    """Zero padding, a random crop back to the image's size and a random horizontal flip, on uint8 images.

    With `flips=False` images are only shifted, for data whose mirror images mean something else (characters). The padding, an
    eighth of the image on each side, is black because it comes before normalisation.

    Every combination of row shift, column shift and flip is one row of two tables, of the rows and of the columns of the padded
    image that a crop consists of, so that a whole batch is two table look-ups and one gather.
    """

    def __init__(self, size: int, flips: bool = True, device: str | torch.device = "cpu") -> None:
        self.pad = size // 8   # 4 for 32 pixels, as in the paper
        self.n_choices = (2 if flips else 1) * (2 * self.pad + 1) ** 2
        dy, dx, flip = self.decode(torch.arange(self.n_choices))
        steps = torch.arange(size)
        # Positions in the flattened image: where each row of the crop begins, and each column's distance from there.
        self.rows = ((dy[:, None] + steps) * (size + 2 * self.pad)).to(device)
        self.columns = (dx[:, None] + torch.where(flip[:, None], steps.flip(0), steps)).to(device)

    def decode(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row shift and column shift in 0..2*pad and the flip (bool) that `choice` (n,) stands for."""
        shifts = 2 * self.pad + 1
        return choice // shifts % shifts, choice % shifts, choice >= shifts**2

    def draw(self, n_images: int, *, seed: int, epoch: int) -> Tensor:
        """(n_images,) int64 on the CPU: one choice per image of the data set, whatever batch or rank it ends up in."""
        return torch.randint(self.n_choices, (n_images,), generator=seeded_generator("crop", seed, epoch))

    def __call__(self, images: Tensor, choice: Tensor) -> Tensor:
        """Transform `images` (B, C, size, size) by `choice` (B,), both on the tables' device."""
        padded = F.pad(images, (self.pad,) * 4).flatten(2)
        positions = self.rows.index_select(0, choice)[:, :, None] + self.columns.index_select(0, choice)[:, None]
        return padded.gather(2, positions.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


class Normalise:
    """uint8 (B, 3, H, W) to float32 ((x / 255) - mean) / std, with the same roundings as torchvision's ToTensor and Normalize."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Contiguous whatever the layout of `images`."""
        normalised = torch.empty(images.shape, device=images.device)
        # Four passes over the pixels: on a CPU they are made over as many images at a time as its cache holds.
        n = max(len(images), 1) if images.is_cuda else CACHED_VALUES // images.shape[1:].numel() + 1
        for source, target in zip(images.split(n), normalised.split(n)):
            target.copy_(source).div_(255).sub_(self.mean).div_(self.std)
        return normalised
