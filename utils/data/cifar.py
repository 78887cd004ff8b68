"""CIFAR-10 and CIFAR-100 as their authors publish them: the python archive, read directly or downloaded by torchvision."""
from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.core.errors import UserError
from utils.options.catalog import DATASETS


class Archive(NamedTuple):
    """Where a published archive keeps what.

    Attributes:
        packed: file that torchvision downloads.
        folder: that it unpacks to, with all other files in it.
        names_key, labels_key: of the class names in `names_file` and of the labels in the others.
    """

    packed: str
    folder: str
    train_files: list[str]
    test_file: str
    names_file: str
    names_key: str
    labels_key: str


ARCHIVES = {
    "cifar10": Archive("cifar-10-python.tar.gz", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch",
                       "batches.meta", "label_names", "labels"),
    "cifar100": Archive("cifar-100-python.tar.gz", "cifar-100-python", ["train"], "test", "meta", "fine_label_names",
                        "fine_labels"),
}
DOWNLOAD_TIMEOUT_S = 30


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays and refuses everything else, so a crafted file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it; the published files name the oldest place
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):   # of newer pickles
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(shape, order=order)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def archive_folder(data_root: Path, dataset: str) -> Path:
    """Where torchvision unpacks `dataset` (it need not exist)."""
    return data_root / ARCHIVES[dataset].folder


def read_archive(data_root: Path, dataset: str, needs_train: bool = True) -> dict[str, np.ndarray]:
    """The published python archive as arrays.

    Args:
        needs_train: without it, the training images are left out where none of their files is there.
    Returns:
        {train,test}_images (n, 3, 32, 32) uint8, {train,test}_labels (n,) int64, class_names.
    Raises:
        FileNotFoundError: when one of its files is missing.
        UserError: when one of its files is damaged or holds something else.
    """
    archive, n_classes = ARCHIVES[dataset], DATASETS[dataset].num_classes
    folder = archive_folder(data_root, dataset)

    def images_and_labels(content: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = content["data"], np.asarray(content[archive.labels_key])
        _require(isinstance(images, np.ndarray) and images.dtype == np.uint8, "its images are not bytes")
        _require(images.ndim == 2 and images.shape[1] == 3072 and len(images), f"its images have shape {images.shape}")
        _require(labels.dtype.kind in "iu" and labels.shape == images.shape[:1], "it has not one whole number per image as label")
        _require(0 <= labels.min() <= labels.max() < n_classes, f"its labels go from {labels.min()} to {labels.max()}")
        return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)

    def class_names(content: Any) -> np.ndarray:
        names = content[archive.names_key]
        _require(isinstance(names, list) and all(isinstance(_text(name), str) for name in names), "its class names are not text")
        _require(len(names) == n_classes, f"it has {len(names)} class names")
        return np.array(list(map(_text, names)))

    parts = {"train": archive.train_files, "test": [archive.test_file]}
    if not needs_train and not any((folder / file).exists() for file in archive.train_files):
        del parts["train"]
    arrays = {}
    for part, files in parts.items():
        columns = zip(*(_read_pickle(folder / file, images_and_labels) for file in files))
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = (np.concatenate(column) for column in columns)
    arrays["class_names"] = _read_pickle(folder / archive.names_file, class_names)
    return arrays


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _text(value: Any) -> Any:
    """Bytes, as some Python 3 programs leave the published files' text when they write them anew, as text."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def _read_pickle(path: Path, convert: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {path.parent} has to be the whole python archive")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")   # NumPy's, of how the published files were written
        try:
            content = _ArrayUnpickler(file, encoding="latin1").load()
            return convert({_text(key): value for key, value in content.items()})
        except OSError:   # a file that cannot be read is not damaged
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise UserError(f"{path} is damaged ({error}); delete {path.parent} to download it again") from error


def download(data_root: Path, dataset: str) -> None:
    """Fetch and unpack the archive into `data_root` with torchvision, which shows progress and checks the file's sum.

    Everything happens in a folder beside the final place and is moved there when it is complete; another run that needs the
    same archive waits.

    Raises:
        UserError: when that fails, listing the layouts that work without a network.
    """
    missing = [folder for folder in (data_root, *data_root.parents) if not folder.exists()]
    target = archive_folder(data_root, dataset)
    try:
        data_root.mkdir(parents=True, exist_ok=True)
        with _alone_in(data_root):
            if not target.is_dir():   # another run may have been faster
                _fetch(dataset, data_root, data_root / f".boostnet_{dataset}")
    except Exception as error:
        for folder in missing:  # leave nothing behind
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(
            f"no {dataset} in {data_root} and downloading it failed ({error}); expected {target} "
            f"(the python archive) or {data_root}/{{train,test}}/<class>/*.png"
        ) from error


def _fetch(dataset: str, data_root: Path, beside: Path) -> None:
    import torchvision.datasets

    archive = ARCHIVES[dataset]
    packed = data_root / archive.packed
    shutil.rmtree(beside, ignore_errors=True)   # of a run that was killed
    beside.mkdir()
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        if packed.exists():   # downloaded by hand
            (beside / archive.packed).symlink_to(packed.resolve())
        getattr(torchvision.datasets, dataset.upper())(str(beside), train=True, download=True)
        os.replace(beside / archive.folder, data_root / archive.folder)
        if not packed.exists() and (beside / archive.packed).exists():
            os.replace(beside / archive.packed, packed)
    finally:
        socket.setdefaulttimeout(previous_timeout)
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
