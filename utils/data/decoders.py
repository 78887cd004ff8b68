"""From an image file to the uint8 crop the network sees, with Pillow or with a faster library.

`pillow`, the default, gives exactly the pixels of torchvision's RandomResizedCrop, Resize and CenterCrop on Pillow images,
which the paper's training used. `torchcodec` decodes to the same pixels with TorchCodec and scales them with PyTorch, which
rounds differently: on ImageNet images 3 % of the values of a training crop and 0.3 % of an evaluation crop are one of the 256
levels off, and fewer than one in a million are two.
"""
from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.core.errors import UserError
from utils.data.small_images import to_rgb

AREAS = (0.08, 1.0)  # share of the image a random crop covers
ASPECTS = (3 / 4, 4 / 3)  # its width over its height
ATTEMPTS = 10
Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_box(generator: np.random.Generator, width: int, height: int) -> Box:
    """Crop of random area and aspect ratio, distributed as torchvision's RandomResizedCrop draws it."""
    for _ in range(ATTEMPTS):
        area = width * height * generator.uniform(*AREAS)
        aspect = math.exp(generator.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.random() * (width - w + 1)), int(generator.random() * (height - h + 1))
            return left, top, left + w, top + h
    # An image so long that nothing fitted: its middle, at the nearest allowed aspect ratio.
    w, h = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one image in one epoch, whichever process decodes it."""
    purpose = zlib.crc32(b"random resized crop")
    return np.random.Generator(np.random.PCG64([purpose, seed & 0xFFFFFFFFFFFFFFFF, epoch, index]))


def scaled_size(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height with the shorter side scaled to `short`, the longer one rounded down."""
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def evaluation_crop(decoder: Any, image: Any, size: int) -> np.ndarray:
    """(size, size, 3) uint8 from a decoded image: shorter side to 256 for crops of 224, to the size itself where that is 32."""
    return decoder.centre_crop(image, size * 8 // 7 if size != 32 else size, size)


class PillowDecoder:
    """The faithful default."""

    def load(self, path: str) -> Image.Image:
        with open(path, "rb") as file, Image.open(file) as image:
            if image.mode != "RGB":
                return to_rgb(image)
            image.load()  # spares the copy that a conversion to the same mode makes
            return image

    def size(self, image: Image.Image) -> tuple[int, int]:
        return image.size

    def resized_crop(self, image: Image.Image, box: Box, size: int, flip: bool) -> np.ndarray:
        """(size, size, 3) uint8 from the pixels inside `box`."""
        image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)

    def centre_crop(self, image: Image.Image, short: int, size: int) -> np.ndarray:
        """(size, size, 3) uint8 from the middle of the image after scaling its shorter side to `short`."""
        image = image.resize(scaled_size(*image.size, short), Image.Resampling.BILINEAR)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)))


class TorchCodecDecoder:
    """TorchCodec and PyTorch instead of Pillow; formats it does not know are left to Pillow.

    Raises:
        UserError: when the library is not installed.
    """

    def __init__(self) -> None:
        try:
            from torchcodec.decoders import decode_image
        except (ImportError, RuntimeError) as error:  # the second when its libraries do not fit the installed torch
            raise UserError(f"--decoder torchcodec needs TorchCodec 0.16 or newer: pip install torchcodec ({error})") from error
        self.decode_image = decode_image
        self.pillow = PillowDecoder()

    def load(self, path: str) -> Tensor:
        try:
            return self.decode_image(path, mode="RGB")
        except (ValueError, RuntimeError):  # Pillow reads more formats, and its message is the one users can look up
            return torch.from_numpy(np.array(self.pillow.load(path))).permute(2, 0, 1)

    def size(self, image: Tensor) -> tuple[int, int]:
        return image.shape[2], image.shape[1]

    def resized_crop(self, image: Tensor, box: Box, size: int, flip: bool) -> np.ndarray:
        left, top, right, bottom = box
        image = self._resize(image[:, top:bottom, left:right], (size, size))
        return (image.flip(2) if flip else image).permute(1, 2, 0).numpy()

    def centre_crop(self, image: Tensor, short: int, size: int) -> np.ndarray:
        width, height = scaled_size(*self.size(image), short)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return self._resize(image, (height, width))[:, top:top + size, left:left + size].permute(1, 2, 0).numpy()

    @staticmethod
    def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
        image = image[None].contiguous(memory_format=torch.channels_last)  # the layout PyTorch scales uint8 images fastest in
        return F.interpolate(image, size, mode="bilinear", antialias=True)[0]


DECODERS: dict[str, Any] = {"pillow": PillowDecoder, "torchcodec": TorchCodecDecoder}
