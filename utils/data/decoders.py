"""From an image file to the uint8 crop the network sees, with Pillow or with a faster library.

`pillow`, the default, gives exactly the pixels of torchvision's RandomResizedCrop, Resize and CenterCrop on Pillow images,
which the paper's training used. `torchcodec` decodes to the same pixels with TorchCodec and scales them with PyTorch, which
rounds differently: on ImageNet images 3 % of the values of a training crop and 0.3 % of an evaluation crop are one of the 256
levels off, and fewer than one in a million are two.

One rule holds for training, evaluation and a user's own files, with both decoders: an image is turned as the orientation in
its EXIF data says, and of an animation the first frame is taken. (torchvision's ImageFolder leaves images as they are stored.)
"""
from __future__ import annotations

import math
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from utils.core.errors import UserError

AREAS = (0.08, 1.0)  # share of the image a random crop covers
ASPECTS = (3 / 4, 4 / 3)  # its width over its height
ATTEMPTS = 10
Box = tuple[int, int, int, int]  # left, top, right, bottom
JPEG_START = b"\xff\xd8"

# What puts an image upright, by the orientation in its EXIF data.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def decode(path: str | Path) -> Image.Image:
    """`read_rgb`, with an error for the user.

    Raises:
        UserError: naming the file, when it cannot be read.
    """
    try:
        return read_rgb(path)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise UserError(f"{path} cannot be read as an image: {explain(error)}") from error


def read_rgb(path: str | Path) -> Image.Image:
    """The image in `path`, or the first of several, upright and as 8-bit RGB, whatever its extension claims."""
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        rgb = image if image.mode == "RGB" else _to_rgb(image)  # a conversion to the same mode would copy
        return rgb if turn is None else rgb.transpose(turn)


def explain(error: Exception) -> str:
    """Why an image could not be read, for a sentence; Pillow's own words show the file object in place of its name."""
    if isinstance(error, UnidentifiedImageError):
        return "it is of no image format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> Any:
    """The orientation that the EXIF data of a loaded image state, if any; damaged EXIF data state none."""
    if "exif" not in image.info:
        return None
    exif = Image.Exif()
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        exif.load(image.info["exif"])
        return exif.get(ExifTags.Base.Orientation)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; the shades of 16-bit grey are scaled down, not clipped."""
    if image.mode.startswith("I"):  # "I;16", or "I" in older versions of Pillow
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


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


def short_side(size: int, cropped: bool = True) -> int:
    """What an image's shorter side is scaled to before its middle is taken: 256 for crops of 224, without a margin for images of
    data that are not cropped."""
    return size * 8 // 7 if cropped else size


def evaluation_crop(decoder: Any, image: Any, size: int, cropped: bool = True) -> np.ndarray:
    """(size, size, 3) uint8 from a decoded image: its middle, scaled as `short_side` says."""
    return decoder.centre_crop(image, short_side(size, cropped), size)


class PillowDecoder:
    """The faithful default."""

    def load(self, path: str) -> Image.Image:
        return read_rgb(path)

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
    """TorchCodec and PyTorch instead of Pillow for JPEG; other formats are left to Pillow, so that both see the same.

    TorchCodec turns JPEG images as their EXIF orientation says, like `read_rgb`.

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
        content = Path(path).read_bytes()
        if content.startswith(JPEG_START):
            with suppress(ValueError, RuntimeError):  # Pillow may read it, and its message is the one users can look up
                return self.decode_image(content, mode="RGB")
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
