"""Which image files a class-folder data set consists of, in which order, and what was left out."""
from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.core.errors import UserError

# Those of torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("test", "val")
SHOWN_KINDS = 5   # of the files left out, in a message

logger = logging.getLogger("boostnet")


@dataclass(frozen=True)
class Listing:
    """The image files of one split in the order of torchvision's ImageFolder: classes by name, files by folder and name.

    Attributes:
        folder: the split's folder.
        class_names: names of the class folders, sorted; a label is a position in this list.
        files: (n,) bytes, path of each image relative to `folder`. An array, because a million Python strings would be copied
            page by page into every decoding process.
        labels: (n,) int64.
        left_out: how many files of each kind, in words, were found and are not images.
    """

    folder: Path
    class_names: list[str]
    files: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    left_out: Counter[str] = field(default_factory=Counter, repr=False)

    def path(self, i: int) -> str:
        return f"{self.folder}/{os.fsdecode(self.files[i])}"

    def content_key(self) -> str:
        """Changes when a file is added, removed, renamed or written to: from all names, sizes and times."""
        digest = hashlib.sha256(b"\n".join(self.files.tolist()))
        for status in (os.stat(self.path(i)) for i in range(len(self.files))):
            digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def report_left_out(self) -> None:
        """Log a warning that says what was left out, if anything."""
        if self.left_out:
            total, shown = sum(self.left_out.values()), self.left_out.most_common(SHOWN_KINDS)
            kinds = [f"{n:,} {kind}" for kind, n in shown]
            if others := total - sum(n for _, n in shown):
                kinds.append(f"{others:,} others")
            logger.warning("%s: %s left out, no images: %s", self.folder, f"{total:,} files and links", ", ".join(kinds))


def scan(folder: Path) -> Listing:
    """List the files under `folder/<class>/`, with those in folders of a class, that have one of `EXTENSIONS`.

    Hidden files and folders, and links that lead nowhere, are left out.

    Raises:
        FileNotFoundError: when there is no such folder.
        UserError: when it has no class folders or one of them is empty.
    """
    class_names = find_classes(folder)
    left_out = Counter("images outside class folders" if _is_image(entry.name) and _holds(entry.is_file) else _kind(entry)
                       for entry in os.scandir(folder) if not _holds(entry.is_dir))
    files: list[bytes] = []
    labels: list[int] = []
    status = os.stat(folder)
    above = ((status.st_dev, status.st_ino),)
    for label, name in enumerate(class_names):
        found = [f"{place}/{file}" for place, images in sorted(_walk(folder, name, above, left_out)) for file in sorted(images)]
        if not found:
            raise UserError(f"{folder / name} has no images ({', '.join(EXTENSIONS)}); fill this class folder or remove it")
        files += map(os.fsencode, found)
        labels += [label] * len(found)
    return Listing(folder, class_names, np.array(files), np.array(labels, np.int64), left_out)


def _walk(root: Path, place: str, above: tuple[tuple[int, int], ...],
          left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Names of the images in the folder `root/place` and in each folder below it; counts what is none."""
    status = os.stat(root / place)
    here = status.st_dev, status.st_ino
    if here in above:
        left_out["links to a folder around them"] += 1
        return
    images = []
    with os.scandir(root / place) as entries:
        for entry in entries:
            if _holds(entry.is_dir) and not entry.name.startswith("."):
                yield from _walk(root, f"{place}/{entry.name}", (*above, here), left_out)
            elif _is_image(entry.name) and _holds(entry.is_file):
                images.append(entry.name)
            else:
                left_out[_kind(entry)] += 1
    yield place, images


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _kind(entry: os.DirEntry) -> str:
    """What a message calls an entry that is no image."""
    if entry.name.startswith("."):
        return "hidden"
    if not _holds(entry.is_file):
        return "dangling links" if entry.is_symlink() else "no files"
    return os.path.splitext(entry.name)[1].lower() or "without extension"


def _holds(is_kind: Callable[[], bool]) -> bool:
    """`is_kind()` of a directory entry, where a link that leads to itself is like one that leads nowhere: of no kind."""
    try:
        return is_kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def find_classes(folder: Path) -> list[str]:
    """Names of the class folders of `folder`, sorted; hidden ones do not count.

    Raises:
        FileNotFoundError: when there is no such folder.
        UserError: when it has no class folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {folder.name}/<class>/ with images in {folder.parent}"
                                f"{_hint(folder.parent)}")
    names = list_classes(folder)
    if not names:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/ with images in each")
    return names


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders of `folder`, sorted, if any."""
    return sorted(entry.name for entry in os.scandir(folder) if _holds(entry.is_dir) and not entry.name.startswith("."))


def find_test_folder(data_root: Path, names: Sequence[str] = TEST_NAMES, class_names: Sequence[str] | None = None) -> Path:
    """The first of `data_root/<names>` with class folders, those of `class_names` where given; else the first that exists.

    ImageNet and its smaller relatives come with a flat folder `test` of images whose classes are not published.

    Raises:
        FileNotFoundError: when none exists.
        UserError: for images in one folder with their classes in a text file, as Tiny ImageNet's.
    """
    present = [data_root / name for name in names if (data_root / name).is_dir()]
    if not present:
        raise FileNotFoundError(f"{data_root} has no {' or '.join(map(repr, names))} folder; expected {names[0]}/<class>/ with "
                                f"images {'beside train' if class_names else f'in {data_root}'}{_hint(data_root)}")
    for folder in present:
        found = list_classes(folder)
        if found == list(class_names) if class_names else found:
            return folder
    for folder in present:
        annotations = sorted(folder.glob("*annotations*.txt"))
        if annotations and list_classes(folder) == ["images"]:
            raise UserError(f"{folder} has all images in one folder and their classes in {annotations[0].name}; move each image "
                            f"to {folder}/<class>/, for example: cd {folder} && while read -r file class _; do mkdir -p $class; "
                            f"mv images/$file $class/; done < {annotations[0].name} && rmdir images")
    return present[0]


def find_root_nearby(data_root: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The one folder right above or below `data_root` that is a root of the data, where that one is given by mistake."""
    below = sorted(folder for folder in data_root.glob("*") if not folder.name.startswith("."))
    found = [folder for folder in (data_root.parent, *below) if _is(is_root, folder)]
    return found[0] if len(found) == 1 else None


def _is(is_root: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return is_root(folder)
    except OSError:   # another user's
        return False


def _hint(data_root: Path) -> str:
    """The end of a message about missing images."""
    near = find_root_nearby(data_root, lambda folder: (folder / "train").is_dir()
                            and any((folder / name).is_dir() for name in TEST_NAMES))
    return f"; {near} has them: pass --data-root {near}" if near else ""


def check_same_classes(train: Listing, test: Listing) -> None:
    """Raise UserError when the two splits do not have the same class folders."""
    for has, lacks in ((train, test), (test, train)):
        missing = sorted(set(has.class_names) - set(lacks.class_names))
        if missing:
            raise UserError(f"{lacks.folder} lacks {len(missing)} of the class folders of {has.folder} "
                            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); both need the same classes")


def scan_parts(data_root: Path, test_names: Sequence[str] = TEST_NAMES,
               needs_train: bool = True) -> tuple[Listing | None, Listing]:
    """Training and test listing of `data_root`; without `needs_train`, None where there is no folder `train`.

    Raises:
        FileNotFoundError, UserError: as `scan`, `find_test_folder` and `check_same_classes`.
    """
    folder = data_root / "train"
    train = scan(folder) if needs_train or folder.is_dir() else None
    test = scan(find_test_folder(data_root, test_names, train.class_names if train else None))
    if train:
        check_same_classes(train, test)
    return train, test
