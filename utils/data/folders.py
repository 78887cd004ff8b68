"""Which image files a class-folder data set consists of, in which order, and how that list is kept."""
from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.data.cache import load_or_build, user_cache_folder

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TEST_NAMES = ("test", "val")
FORMAT = 1


class PackedStrings(Sequence):
    """Many strings in two arrays: a million Python objects would be copied page by page into every decoding process.

    Attributes:
        text: (n_bytes,) uint8, all strings in UTF-8 one after the other.
        ends: (n,) int64, where each of them ends in `text`.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, strings: Sequence[str]) -> PackedStrings:
        encoded = [os.fsencode(string) for string in strings]
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(text, np.cumsum([len(part) for part in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.text[start:self.ends[i]].tobytes())


@dataclass(frozen=True)
class Listing:
    """The image files of one split in a fixed order: classes by name, files by name within a class.

    Attributes:
        folder: the split's folder.
        class_names: names of the class folders, sorted; a label is a position in this list.
        files: path of each image relative to `folder`.
        labels: (n,) int64.
    """

    folder: Path
    class_names: list[str]
    files: Sequence[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)

    def path(self, i: int) -> str:
        return f"{self.folder}/{self.files[i]}"

    def content_key(self) -> str:
        """Changes when a file is added, removed, renamed or written to: from all names, sizes and times."""
        digest = hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape"))
        for status in (os.stat(self.path(i)) for i in range(len(self.files))):
            digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()


def scan(folder: Path) -> Listing:
    """List `folder/<class>/*`, leaving out hidden files and other extensions than `EXTENSIONS`.

    Raises:
        FileNotFoundError: when there is no such folder.
        UserError: when it has no class folders or one of them is empty.
    """
    class_names = find_classes(folder)
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = sorted(entry.name for entry in os.scandir(folder / name) if _is_image(entry.name) and _holds(entry.is_file))
        if not found:
            raise UserError(f"{folder / name} has no images ({', '.join(EXTENSIONS)}); fill this class folder or remove it")
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    return Listing(folder, class_names, PackedStrings.pack(files), np.array(labels, np.int64))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


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
        raise FileNotFoundError(f"{folder}: no such folder; expected {folder.name}/<class>/ with images in {folder.parent}")
    names = sorted(entry.name for entry in os.scandir(folder) if _holds(entry.is_dir) and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; expected {folder}/<class>/ with images in each")
    return names


def find_test_folder(data_root: Path, names: Sequence[str] = TEST_NAMES) -> Path:
    """The first of `data_root/<names>` that exists: a third folder beside it is not ours to judge.

    Raises:
        FileNotFoundError: when none does.
    """
    for name in names:
        if (data_root / name).is_dir():
            return data_root / name
    raise FileNotFoundError(f"{data_root} has no {' or '.join(map(repr, names))} folder; expected one beside 'train'")


def check_same_classes(train: Listing, test: Listing) -> None:
    """Raise UserError when the two splits do not have the same class folders."""
    for has, lacks in ((train, test), (test, train)):
        missing = sorted(set(has.class_names) - set(lacks.class_names))
        if missing:
            raise UserError(f"{lacks.folder} lacks {len(missing)} of the class folders of {has.folder} "
                            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); both need the same classes")


def cache_places(data_root: Path, kind: str) -> list[Path]:
    """Where a cache about `data_root` may lie: beside the data, else in the user's cache folder."""
    root = hashlib.sha256(os.fsencode(data_root.resolve())).hexdigest()[:16]
    return [data_root / f".boostnet_{kind}.npz", user_cache_folder() / f"{kind}-{root}.npz"]


def scan_once(data_root: Path, test_names: Sequence[str] = TEST_NAMES) -> tuple[Listing, Listing]:
    """Training and test listing of `data_root`, read from a cache while no class folder has changed.

    A folder's modification time changes when a file is added, removed or renamed, so that a thousand look-ups stand in for
    a million.

    Raises:
        FileNotFoundError, UserError: as `scan`, `find_test_folder` and `check_same_classes`.
    """
    folders = [data_root / "train"]
    names = [find_classes(folders[0])]
    folders.append(find_test_folder(data_root, test_names))
    names.append(find_classes(folders[1]))
    digest = hashlib.sha256()
    for folder, class_names in zip(folders, names):
        for name in class_names:
            digest.update(os.fsencode(f"{folder.name}/{name}\n") + b"%d\n" % os.stat(folder / name).st_mtime_ns)

    def build() -> dict[str, np.ndarray]:
        train, test = (scan(folder) for folder in folders)
        check_same_classes(train, test)
        return {f"{part}_{name}": array for part, listing in (("train", train), ("test", test)) for name, array in
                (("text", listing.files.text), ("ends", listing.files.ends), ("labels", listing.labels))}

    arrays = load_or_build(cache_places(data_root, "files"), f"{FORMAT} {digest.hexdigest()}", build)
    train, test = (Listing(folder, class_names, PackedStrings(arrays[f"{part}_text"], arrays[f"{part}_ends"]),
                           arrays[f"{part}_labels"]) for part, folder, class_names in zip(("train", "test"), folders, names))
    return train, test
