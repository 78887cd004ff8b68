"""CIFAR-10 and CIFAR-100 as their authors publish them: the python archive, read directly or downloaded by torchvision."""
from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.options.catalog import DATASETS

# data set -> (folder, training files, test file, names file, key of the names, key of the labels)
ARCHIVES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "label_names",
                "labels"),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", "fine_label_names", "fine_labels"),
}
DOWNLOAD_TIMEOUT_S = 30


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays and refuses everything else, so a crafted file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it; the published files name the oldest place
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def archive_folder(data_root: Path, dataset: str) -> Path:
    """Where torchvision unpacks `dataset` (it need not exist)."""
    return data_root / ARCHIVES[dataset][0]


def read_archive(data_root: Path, dataset: str) -> dict[str, np.ndarray]:
    """The published python archive as arrays.

    Returns:
        {train,test}_images (n, 3, 32, 32) uint8, {train,test}_labels (n,) int64, class_names.
    Raises:
        FileNotFoundError: when one of its files is missing.
        UserError: when one of its files is damaged or holds something else.
    """
    folder, train_files, test_file, names_file, names_key, labels_key = ARCHIVES[dataset]
    folder, n_classes = data_root / folder, DATASETS[dataset].num_classes

    def images_and_labels(content: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = content["data"], np.asarray(content[labels_key])
        _require(isinstance(images, np.ndarray) and images.dtype == np.uint8, "its images are not bytes")
        _require(images.ndim == 2 and images.shape[1] == 3072 and len(images), f"its images have shape {images.shape}")
        _require(labels.dtype.kind in "iu" and labels.shape == images.shape[:1], "it has not one whole number per image as label")
        _require(0 <= labels.min() <= labels.max() < n_classes, f"its labels go from {labels.min()} to {labels.max()}")
        return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)

    def class_names(content: Any) -> np.ndarray:
        names = content[names_key]
        _require(isinstance(names, list) and all(isinstance(name, str) for name in names), "its class names are not text")
        _require(len(names) == n_classes, f"it has {len(names)} class names")
        return np.array(names)

    arrays = {}
    for split, files in (("train", train_files), ("test", [test_file])):
        parts = [_read_pickle(folder / file, images_and_labels) for file in files]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = (np.concatenate(column) for column in zip(*parts))
    arrays["class_names"] = _read_pickle(folder / names_file, class_names)
    return arrays


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _read_pickle(path: Path, convert: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack the whole archive there or delete {path.parent} to download it again")
    try:
        with open(path, "rb") as file:
            return convert(_ArrayUnpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is damaged ({error}); delete {path.parent} to download it again") from error


def download(data_root: Path, dataset: str) -> None:
    """Fetch and unpack the archive into `data_root` with torchvision, which shows progress and checks the file's sum.

    Raises:
        UserError: when that fails, listing the layouts that work without a network.
    """
    import torchvision.datasets

    missing = [folder for folder in (data_root, *data_root.parents) if not folder.exists()]
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        getattr(torchvision.datasets, dataset.upper())(str(data_root), train=True, download=True)
    except Exception as error:
        for folder in missing:  # leave nothing behind, unless it holds part of a download
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(
            f"no {dataset} in {data_root} and downloading it failed ({error}); expected {archive_folder(data_root, dataset)} "
            f"(the python archive) or {data_root}/{{train,test}}/<class>/*.png"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
