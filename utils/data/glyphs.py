"""Glyphs: 32x32 colour images of the characters 0-9 and A-Z, drawn here, so that a first run needs no download.

The images are synthetic and made so that some are easy and some hard: a difficulty drawn per image controls scale, shift,
rotation, clutter, contrast and noise together. Results on them show that the program works. They are no evidence for any
method. The settings were fixed once with the joint baseline and are frozen by a hash in the tests.

Every image follows from (SEED, part, number) alone. Its parameters are plain arithmetic on NumPy's PCG64 stream, the same
everywhere but for the last bit of a sine or a power. The outlines come from Pillow's built-in font through FreeType. Pillow
10.1 to 13.0 drew identical images; other versions may round single pixels differently, so that the cache belongs to one pair
of versions.
"""
from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version
from tqdm import tqdm

from utils.core.errors import UserError
from utils.data.cache import in_user_cache, load_or_build
from utils.data.workers import in_parallel

CLASS_NAMES = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SIZES = {"train": 20_000, "test": 4_000}
SIZE = 32  # pixels
SEED = 2022
FORMAT = 1
FONT_SIZE = 48  # of the mask that is scaled and rotated into the image
MASK = 64  # its height and width
CLEAN_SCALE = 0.52
CHUNK = 500  # images per task

# How far the hardest image may go; a clean glyph has none of it. Settled with the joint baseline, not to be tuned again.
HARDNESS = 0.45  # exponent of the uniform number behind the difficulty: below 1 there are more hard images than easy ones
SCALE = (-0.6, 0.3)  # logarithm of the glyph's size against a clean one's
SHIFT = 8.0  # pixels, each way
ROTATION = math.radians(45)  # each way
CLUTTER = 4  # pieces of other glyphs
CLUTTER_CONTRAST = (0.2, 0.9)  # against the ink's
CONTRAST = (170.0, 70.0)  # levels between ink and background of the clean and of the hardest glyph
NOISE = (2.0, 16.0)  # standard deviation in levels, clean and hardest


class _Stream:
    """Random numbers of one image; only what is the same in every NumPy release is used."""

    def __init__(self, part: str, number: int) -> None:
        seed = np.random.SeedSequence([SEED, list(SIZES).index(part), number])
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.generator.random()

    def tint(self) -> np.ndarray:
        return 2 * self.generator.random(3) - 1

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Zero mean, unit variance, near to normal: the sum of three uniform numbers."""
        return 2 * (self.generator.random((3, *shape)).sum(0) - 1.5)


def difficulty(part: str, number: int) -> float:
    """Between 0, a clean glyph, and 1, everything at its strongest."""
    return _difficulty(_Stream(part, number))


def _difficulty(stream: _Stream) -> float:
    return stream.uniform(0, 1) ** HARDNESS


def label(number: int) -> int:
    """Classes take turns, so that each has as many images as any other (within one)."""
    return number % len(CLASS_NAMES)


def draw(part: str, number: int) -> np.ndarray:
    """(3, 32, 32) uint8: image `number` of `part`."""
    stream = _Stream(part, number)
    hard = _difficulty(stream)
    background, ink = _colours(stream, hard)
    canvas = np.empty((SIZE, SIZE, 3))
    canvas[:] = background
    for _ in range(int(stream.uniform(0, 1 + CLUTTER * hard))):
        angle, distance = stream.uniform(0, 2 * math.pi), stream.uniform(10, 18)
        piece = _place(CLASS_NAMES[int(stream.uniform(0, len(CLASS_NAMES)))], scale=stream.uniform(0.2, 0.45),
                       angle=stream.uniform(-math.pi, math.pi), dx=distance * math.cos(angle), dy=distance * math.sin(angle))
        colour = background + stream.uniform(*CLUTTER_CONTRAST) * (ink - background)
        canvas += piece[:, :, None] * (colour - canvas)
    glyph = _place(CLASS_NAMES[label(number)], scale=CLEAN_SCALE * math.exp(hard * stream.uniform(*SCALE)),
                   angle=hard * stream.uniform(-ROTATION, ROTATION), dx=hard * stream.uniform(-SHIFT, SHIFT),
                   dy=hard * stream.uniform(-SHIFT, SHIFT))
    canvas += glyph[:, :, None] * (ink - canvas)
    canvas += _between(NOISE, hard) * stream.noise(canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8).transpose(2, 0, 1)


def _between(ends: tuple[float, float], hard: float) -> float:
    return ends[0] + hard * (ends[1] - ends[0])


def _colours(stream: _Stream, hard: float) -> tuple[np.ndarray, np.ndarray]:
    """Background and ink, both tinted; which of them is the brighter one is drawn."""
    contrast = _between(CONTRAST, hard * stream.uniform(0.5, 1))
    dark = stream.uniform(0, 255 - contrast)
    levels = (dark, dark + contrast) if stream.uniform(0, 1) < 0.5 else (dark + contrast, dark)
    background, ink = (np.clip(level + 30 * stream.tint(), 0, 255) for level in levels)
    return background, ink


def _place(character: str, *, scale: float, angle: float, dx: float, dy: float) -> np.ndarray:
    """(32, 32) coverage in [0, 1] of a glyph turned by `angle` (radians) and moved (dx, dy) pixels from the centre."""
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = SIZE / 2 + dx, SIZE / 2 + dy
    # Pillow asks for the mask position of each image pixel, that is for the inverse of the movement
    inverse = (cos, sin, MASK / 2 - cos * x - sin * y, -sin, cos, MASK / 2 + sin * x - cos * y)
    placed = _mask(character).transform((SIZE, SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    return np.asarray(placed) / 255


@cache
def _mask(character: str) -> Image.Image:
    """The glyph in white on black, its box centred."""
    font = ImageFont.load_default(size=FONT_SIZE)
    mask = Image.new("L", (MASK, MASK))
    left, top, right, bottom = font.getbbox(character)
    ImageDraw.Draw(mask).text(((MASK - left - right) / 2, (MASK - top - bottom) / 2), character, fill=255, font=font)
    return mask


def _draw_chunk(task: tuple[str, int, int]) -> np.ndarray:
    part, start, stop = task
    return np.stack([draw(part, number) for number in range(start, stop)])


def versions() -> tuple[str, str]:
    """The versions of Pillow and FreeType, on which single pixels may depend.

    Raises:
        UserError: when Pillow was built without FreeType and so has no scalable font.
    """
    if not features.check("freetype2"):
        raise UserError("this Pillow was built without FreeType, which draws the glyphs; install its wheel: pip install pillow")
    return pillow_version, features.version("freetype2")


def build(quiet: bool = False) -> dict[str, np.ndarray]:
    """Draw everything; the result does not depend on the number of processes.

    Returns:
        {train,test}_images (n, 3, 32, 32) uint8, {train,test}_labels (n,) int64, class_names.
    """
    arrays = {"class_names": np.array(CLASS_NAMES)}
    with tqdm(total=sum(SIZES.values()), desc="drawing glyphs", unit="img", disable=quiet or None) as bar:
        for part, n in SIZES.items():
            images = np.empty((n, 3, SIZE, SIZE), np.uint8)
            tasks = [(part, start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
            for (_, start, stop), drawn in zip(tasks, in_parallel(_draw_chunk, tasks)):
                images[start:stop] = drawn
                bar.update(stop - start)
            arrays[f"{part}_images"] = images
            arrays[f"{part}_labels"] = np.array([label(number) for number in range(n)], np.int64)
    return arrays


def read_glyphs(data_root: Path, quiet: bool = False) -> dict[str, np.ndarray]:
    """`build()` through a cache in the user's cache folder, or in `data_root` where that cannot be written."""
    key = " ".join(map(str, (FORMAT, SEED, *versions())))
    return load_or_build([*in_user_cache("glyphs.npz"), data_root / ".boostnet_glyphs.npz"], key, lambda: build(quiet))
