"""All the small images of a class-folder data set as one array."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.core.errors import UserError
from utils.core.log import note
from utils.data.cache import load_or_build, place_to_write, places_for
from utils.data.decoders import decode
from utils.data.folders import Listing
from utils.data.workers import in_parallel
from utils.options.catalog import LARGE_FROM

CHUNK = 500  # images per task of the decoding pool
FORMAT = 2  # of the cache; since 2 images are turned as their EXIF orientation says


def read_class_folders(data_root: Path, train: Listing | None, test: Listing, image_size: int,
                       quiet: bool = False) -> dict[str, np.ndarray]:
    """All images of the listings as arrays, through a cache of one file.

    The cache lies beside the data, or in the user's cache folder when the data are read-only, and is renewed when any
    file's name, size or time changes.

    Returns:
        {train,test}_images (n, 3, image_size, image_size) uint8, {train,test}_labels (n,) int64, class_names; those of `train`
        only where there is one.
    Raises:
        UserError: on an unreadable image or one of another size.
    """
    parts = {"train": train, "test": test} if train else {"test": test}
    places = places_for(data_root, "images" if train else "test_images")

    def build() -> dict[str, np.ndarray]:
        if not quiet:   # a minute of silence where there is no terminal to show a bar
            n_images, place = sum(len(listing.files) for listing in parts.values()), place_to_write(places)
            note(f"reading {n_images:,} images of {data_root} once; kept in {place}" if place else
                 f"reading {n_images:,} images of {data_root}")
        arrays = {"class_names": np.array(test.class_names)}
        for part, listing in parts.items():
            arrays |= {f"{part}_images": decode_all(listing, image_size, quiet), f"{part}_labels": listing.labels}
        return arrays

    key = " ".join([f"{FORMAT} {image_size}", *(listing.content_key() for listing in parts.values())])
    return load_or_build(places, key, build)


def decode_all(listing: Listing, image_size: int, quiet: bool) -> np.ndarray:
    """(n, 3, image_size, image_size) uint8 of every file in `listing`, decoded by all cores."""
    paths = [listing.path(i) for i in range(len(listing.files))]
    tasks = [(paths[start:start + CHUNK], image_size) for start in range(0, len(paths), CHUNK)]
    images = np.empty((len(paths), 3, image_size, image_size), np.uint8)
    with tqdm(total=len(paths), desc=f"reading {listing.folder.name} images", unit="img", disable=quiet or None) as bar:
        for start, part in zip(range(0, len(paths), CHUNK), in_parallel(_decode_chunk, tasks)):
            images[start:start + len(part)] = part
            bar.update(len(part))
    return images


def _decode_chunk(task: tuple[list[str], int]) -> np.ndarray:
    paths, size = task
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for image, path in zip(images, paths):
        decoded = decode(path)
        if decoded.size != (size, size):
            raise UserError(f"{path} is {decoded.width}x{decoded.height} pixels, but --image_size {size} needs every image to "
                            f"be {size}x{size}; --stem large scales and crops images of any size (the default from {LARGE_FROM} "
                            "pixels on)")
        image[:] = np.asarray(decoded).transpose(2, 0, 1)
    return images
