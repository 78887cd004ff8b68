"""The hold-out split: which training images are kept away from training, drawn once and then only ever reused."""
from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.data.sampling import seeded_generator

FORMAT = 1


def hash_labels(labels: Tensor) -> str:
    """SHA-256 (hex) of all labels in file order.

    A cheap check that an index list belongs to a data set. It sees other classes, numbers of images and orders of the
    classes, not other images under the same labels.
    """
    return hashlib.sha256(labels.cpu().to(torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Split:
    """Which of `n_total` training images are held out.

    Attributes:
        valid_index: (n_valid,) int64, sorted; all other images are for training.
        n_total: number of images in the whole training set.
        seed: seed the split was drawn with.
        labels_hash: `hash_labels` of the whole training set.
    """

    valid_index: Tensor
    n_total: int
    seed: int
    labels_hash: str

    def __post_init__(self):
        index = self.valid_index
        well_formed = (isinstance(index, Tensor) and index.layout == torch.strided and index.dtype == torch.int64
                       and index.ndim == 1 and len(index) > 0 and type(self.n_total) is int and type(self.seed) is int
                       and isinstance(self.labels_hash, str) and self.labels_hash.isascii())
        if not well_formed or not 0 <= int(index[0]) <= int(index[-1]) < self.n_total or bool((index.diff() <= 0).any()):
            raise UserError("the hold-out split is damaged: its index is not a rising list of image numbers")

    @classmethod
    def draw(cls, labels: Tensor, valid_size: int, seed: int) -> Split:
        """Hold out `valid_size` images drawn without replacement.

        Raises:
            UserError: when nothing would be left on one of the two sides.
        """
        if not 0 < valid_size < len(labels):
            raise UserError(f"cannot hold {valid_size} of {len(labels)} training images out; "
                            f"pass --valid_size between 1 and {len(labels) - 1}")
        order = torch.randperm(len(labels), generator=seeded_generator("split", seed))
        return cls(order[:valid_size].sort().values, len(labels), int(seed), hash_labels(labels))

    @classmethod
    def from_permutation(cls, labels: Tensor, order: Tensor, valid_size: int) -> Split:
        """Hold out the last `valid_size` images of an order of all of them, as programs of this family store it in index.pth.

        Raises:
            UserError: when it is no order of as many images as there are labels.
        """
        is_order = isinstance(order, Tensor) and order.ndim == 1 and not order.is_floating_point()
        if not is_order or not torch.equal(order.cpu().long().sort().values, torch.arange(len(labels))):
            raise UserError(f"the stored order of images (index.pth) is not one of the {len(labels)} training images here")
        if not 0 < valid_size < len(labels):
            raise UserError(f"cannot hold {valid_size} of {len(labels)} training images out; "
                            f"pass --valid_size between 1 and {len(labels) - 1}")
        return cls(order[-valid_size:].cpu().long().sort().values, len(labels), 0, hash_labels(labels))

    @property
    def train_index(self) -> Tensor:
        """(n_total - n_valid,) int64, sorted: the images that are trained on."""
        is_train = torch.ones(self.n_total, dtype=torch.bool)
        is_train[self.valid_index] = False
        return is_train.nonzero().squeeze(1)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over everything the split says; equal hashes mean the same images of the same data."""
        digest = hashlib.sha256(f"{FORMAT} {self.n_total} {self.seed} {self.labels_hash}\n".encode())
        digest.update(self.valid_index.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def check(self, labels: Tensor) -> None:
        """Raise UserError when this split was drawn from other data than `labels` (n_total,)."""
        if len(labels) != self.n_total:
            raise UserError(f"the saved hold-out split is of {self.n_total} training images, but the data folder has "
                            f"{len(labels)}; evaluate with the data the run was trained on")
        if hash_labels(labels) != self.labels_hash:
            raise UserError("the saved hold-out split belongs to other data: the labels differ in value or order (class folders "
                            "and the python archive list CIFAR in different orders); use the layout the run was trained on")

    def to_dict(self) -> dict:
        """Plain types and one tensor, so that `torch.load(weights_only=True)` reads it back."""
        return {"format": FORMAT, "valid_index": self.valid_index, "n_total": self.n_total, "seed": self.seed,
                "labels_hash": self.labels_hash, "hash": self.hash}

    @classmethod
    def from_dict(cls, saved: dict) -> Split:
        """Inverse of `to_dict`.

        Raises:
            UserError: when an entry is missing or the stored hash does not fit the content.
        """
        try:
            content = saved["valid_index"].cpu(), int(saved["n_total"]), int(saved["seed"]), str(saved["labels_hash"])
            stored_hash = saved["hash"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"the hold-out split is damaged: {type(error).__name__} {error}") from error
        split = cls(*content)
        if stored_hash != split.hash:
            raise UserError("the hold-out split is damaged: its hash does not fit its content")
        return split

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as file:
            torch.save(self.to_dict(), file)

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: when there is none.
            UserError: when it is not a split.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no hold-out split there; training with --use-valid writes one")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read as a hold-out split: {str(error).splitlines()[0]}") from error
        if not isinstance(saved, dict):
            raise UserError(f"{path} cannot be read as a hold-out split: it holds a {type(saved).__name__}")
        return cls.from_dict(saved)
