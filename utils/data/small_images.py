"""All the small images of a class-folder data set as one array."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.core.errors import UserError
from utils.data.cache import load_or_build
from utils.data.decoders import decode
from utils.data.folders import Listing, cache_places, check_same_classes, find_test_folder, scan
from utils.data.workers import in_parallel

CHUNK = 500  # images per task of the decoding pool
FORMAT = 2  # of the cache; since 2 images are turned as their EXIF orientation says


def read_class_folders(data_root: Path, image_size: int, quiet: bool = False) -> dict[str, np.ndarray]:
    """All images under `data_root/{train,test}/<class>/` as arrays, through a cache of one file.

    The cache lies beside the data, or in the user's cache folder when the data are read-only, and is renewed when any
    file's name, size or time changes.

    Returns:
        {train,test}_images (n, 3, image_size, image_size) uint8, {train,test}_labels (n,) int64, class_names.
    Raises:
        FileNotFoundError: when a folder is missing.
        UserError: on an unreadable image, one of another size, an empty class or differing classes.
    """
    train, test = scan(data_root / "train"), scan(find_test_folder(data_root))
    check_same_classes(train, test)

    def build() -> dict[str, np.ndarray]:
        return {"train_images": decode_all(train, image_size, quiet), "train_labels": train.labels,
                "test_images": decode_all(test, image_size, quiet), "test_labels": test.labels,
                "class_names": np.array(train.class_names)}

    key = f"{FORMAT} {image_size} {train.content_key()} {test.content_key()}"
    return load_or_build(cache_places(data_root, "images"), key, build)


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
            raise UserError(f"{path} is {decoded.width}x{decoded.height} pixels, but --image_size {size} needs every image "
                            f"to be {size}x{size}; --image_size 224 crops and scales images of any size")
        image[:] = np.asarray(decoded).transpose(2, 0, 1)
    return images
