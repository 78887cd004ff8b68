"""Images in class folders, `root/{train,test}/<class>/*.png`: listing them, decoding them, and all of them as one array."""

import hashlib
import os
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.array_cache import load_or_build, user_cache_folder
from utils.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEST_NAMES = ("test", "val")
CHUNK = 500  # images per task of the decoding pool
CACHE_FORMAT = 1


@dataclass(frozen=True)
class Listing:
    """The image files of one split in a fixed order: classes by name, files by name within a class.

    Attributes:
        folder: the split's folder.
        class_names: names of the class folders, sorted; a label is a position in this list.
        files: path of each image relative to `folder`.
        labels: (n,) int64.
        stamps: (n, 2) int64, size in bytes and modification time in ns of each file.
    """

    folder: Path
    class_names: list[str]
    files: list[str]
    labels: np.ndarray = field(repr=False)
    stamps: np.ndarray = field(repr=False)

    def key(self) -> str:
        """Changes when a file is added, removed, renamed or written to."""
        digest = hashlib.sha256("\n".join(self.files).encode())
        digest.update(self.stamps.tobytes())
        return digest.hexdigest()


def scan(folder: Path) -> Listing:
    """List `folder/<class>/*`, leaving out hidden files and other extensions than `EXTENSIONS`.

    Raises:
        FileNotFoundError: when there is no such folder.
        UserError: when it has no class folders or one of them is empty.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {folder.name}/<class>/*.png in {folder.parent}")
    class_names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not class_names:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/ with images in each")
    files, labels, stamps = [], [], []
    for label, name in enumerate(class_names):
        entries = sorted(
            (entry for entry in os.scandir(folder / name) if _is_image(entry.name) and entry.is_file()), key=lambda e: e.name
        )
        if not entries:
            raise UserError(f"{folder / name} has no images ({', '.join(EXTENSIONS)}); fill this class folder or remove it")
        files += [f"{name}/{entry.name}" for entry in entries]
        labels += [label] * len(entries)
        stamps += [(status.st_size, status.st_mtime_ns) for status in (entry.stat() for entry in entries)]
    return Listing(folder, class_names, files, np.array(labels, np.int64), np.array(stamps, np.int64))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def find_test_folder(data_root: Path, names=TEST_NAMES) -> Path:
    """The first of `data_root/<names>` that exists.

    Raises:
        FileNotFoundError: when none does.
    """
    for name in names:
        if (data_root / name).is_dir():
            return data_root / name
    raise FileNotFoundError(f"{data_root} has a 'train' folder but none called {' or '.join(map(repr, names))}")


def check_same_classes(train: Listing, test: Listing) -> None:
    """Raise UserError when the two splits do not have the same class folders."""
    for has, lacks in ((train, test), (test, train)):
        missing = sorted(set(has.class_names) - set(lacks.class_names))
        if missing:
            raise UserError(
                f"{lacks.folder} lacks {len(missing)} of the class folders of {has.folder} "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); both need the same classes"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; the shades of 16-bit grey are scaled down, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode(path) -> Image.Image:
    """The image in `path` as RGB, whatever its extension claims.

    Raises:
        UserError: naming the file, when it cannot be read.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise UserError(f"{path} cannot be read as an image: {error}") from error


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

    def build():
        return {
            "train_images": decode_all(train, image_size, quiet),
            "train_labels": train.labels,
            "test_images": decode_all(test, image_size, quiet),
            "test_labels": test.labels,
            "class_names": np.array(train.class_names),
        }

    name = hashlib.sha256(str(data_root.resolve()).encode()).hexdigest()[:16]
    places = [data_root / ".boostnet_cache.npz", user_cache_folder() / f"folder-{name}.npz"]
    return load_or_build(places, f"{CACHE_FORMAT} {image_size} {train.key()} {test.key()}", build)


def decode_all(listing: Listing, image_size: int, quiet: bool) -> np.ndarray:
    """(n, 3, image_size, image_size) uint8 of every file in `listing`, decoded by all cores."""
    paths = [str(listing.folder / file) for file in listing.files]
    tasks = [(paths[start : start + CHUNK], image_size) for start in range(0, len(paths), CHUNK)]
    images = np.empty((len(paths), 3, image_size, image_size), np.uint8)
    with tqdm(total=len(paths), desc=f"reading {listing.folder.name} images", unit="img", disable=quiet or None) as bar:
        for start, part in zip(range(0, len(paths), CHUNK), in_parallel(_decode_chunk, tasks)):
            images[start : start + len(part)] = part
            bar.update(len(part))
    return images


def _decode_chunk(task) -> np.ndarray:
    paths, size = task
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for image, path in zip(images, paths):
        decoded = decode(path)
        if decoded.size != (size, size):
            raise UserError(
                f"{path} is {decoded.width}x{decoded.height} pixels, but --image_size {size} needs every image to be {size}x{size}"
            )
        image[:] = np.asarray(decoded).transpose(2, 0, 1)
    return images


def in_parallel(function, tasks: list):
    """Results of `function(task)` in the order of `tasks`, by one process per core where processes can be forked.

    Forked workers start at once and need nothing imported; elsewhere (and for few tasks) the work is done here.
    """
    n_workers = min(_usable_cores(), len(tasks))
    if n_workers < 2 or os.uname().sysname != "Linux":
        yield from map(function, tasks)
        return
    with get_context("fork").Pool(n_workers) as pool:
        yield from pool.imap(function, tasks)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
