"""The split: which training images are held out and which are trained on, drawn once and then only ever reused."""
from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, replace
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


def _is_empty(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64 and index.shape == (0,)


def _is_index(index: object, n_total: int) -> bool:
    """Whether `index` is a rising list of at least one number below `n_total`."""
    return (isinstance(index, Tensor) and index.layout == torch.strided and index.dtype == torch.int64 and index.ndim == 1
            and len(index) > 0 and 0 <= int(index[0]) <= int(index[-1]) < n_total and not bool((index.diff() <= 0).any()))


def _draw_per_class(labels: Tensor, candidates: Tensor, n_images: int, seed: int) -> Tensor:
    """(classes * n_images,) int64, sorted: `n_images` of the `candidates` of each class in `labels`."""
    classes = labels.unique()
    counts = torch.bincount(labels[candidates], minlength=int(classes.max()) + 1)[classes]
    if int(counts.min()) < n_images:
        raise UserError(f"class {int(classes[counts.argmin()])} has {int(counts.min())} images to train on, fewer than "
                        f"--images_per_class {n_images}; pass a smaller number")
    order = torch.randperm(len(candidates), generator=seeded_generator("images_per_class", seed))
    shuffled = candidates[order]
    grouped = shuffled[labels[shuffled].argsort(stable=True)]   # class by class, at random within a class
    starts = counts.cumsum(0) - counts
    return grouped[(starts[:, None] + torch.arange(n_images)).flatten()].sort().values


@dataclass(frozen=True, eq=False)
class Split:
    """Which of `n_total` training images are held out, and which are trained on.

    Attributes:
        valid_index: (n_valid,) int64, sorted; empty only where `chosen` says what is trained on.
        n_total: number of images in the whole training set.
        seed: seed the split was drawn with.
        labels_hash: `hash_labels` of the whole training set.
        chosen: (n_train,) int64, sorted: the images that are trained on; None for all that are not held out.
    """

    valid_index: Tensor
    n_total: int
    seed: int
    labels_hash: str
    chosen: Tensor | None = None

    def __post_init__(self):
        well_formed = (type(self.n_total) is int and type(self.seed) is int and isinstance(self.labels_hash, str)
                       and self.labels_hash.isascii()
                       and (_is_index(self.valid_index, self.n_total) or self.chosen is not None and _is_empty(self.valid_index))
                       and (self.chosen is None or _is_index(self.chosen, self.n_total)))
        if not well_formed:
            raise UserError("the hold-out split is damaged: its index is not a rising list of image numbers")
        if self.chosen is not None and bool(torch.isin(self.chosen, self.valid_index, assume_unique=True).any()):
            raise UserError("the hold-out split is damaged: images are both held out and trained on")

    @classmethod
    def draw(cls, labels: Tensor, valid_size: int, seed: int, images_per_class: int | None = None) -> Split:
        """Hold out `valid_size` images drawn without replacement; then, with `images_per_class`, draw what is trained on.

        What is held out does not depend on `images_per_class`, and what is trained on with a smaller number is a part of what
        is with a larger one.

        Args:
            valid_size: 0 only with `images_per_class`.
            images_per_class: images of each class to train on, of those that are not held out; None for all of them.
        Raises:
            UserError: when nothing would be left on one of the two sides, or a class has too few images.
        """
        if not (0 if images_per_class else 1) <= valid_size < len(labels):
            raise UserError(f"cannot hold {valid_size} of {len(labels)} training images out; "
                            f"pass --valid_size between 1 and {len(labels) - 1}")
        order = torch.randperm(len(labels), generator=seeded_generator("split", seed))
        split = cls(order[:valid_size].sort().values, len(labels), int(seed), hash_labels(labels),
                    order[valid_size:].sort().values if images_per_class else None)
        if images_per_class:
            split = replace(split, chosen=_draw_per_class(labels, split.train_index, images_per_class, seed))
        return split

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
        """(n_train,) int64, sorted: the images that are trained on."""
        if self.chosen is not None:
            return self.chosen
        is_train = torch.ones(self.n_total, dtype=torch.bool)
        is_train[self.valid_index] = False
        return is_train.nonzero().squeeze(1)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over everything the split says; equal hashes mean the same images of the same data."""
        digest = hashlib.sha256(f"{FORMAT} {self.n_total} {self.seed} {self.labels_hash}\n".encode())
        digest.update(self.valid_index.numpy().astype("<i8").tobytes())
        if self.chosen is not None:
            digest.update(b"\nchosen " + self.chosen.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def holds_out_as(self, other: Split | None) -> bool:
        """Whether this split holds the same images of the same data out as `other`, whatever is trained on."""
        return (other is not None and torch.equal(self.valid_index, other.valid_index)
                and (self.n_total, self.seed, self.labels_hash) == (other.n_total, other.seed, other.labels_hash))

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
        chosen = {} if self.chosen is None else {"chosen": self.chosen}
        return {"format": FORMAT, "valid_index": self.valid_index, "n_total": self.n_total, "seed": self.seed,
                "labels_hash": self.labels_hash, **chosen, "hash": self.hash}

    @classmethod
    def from_dict(cls, saved: dict) -> Split:
        """Inverse of `to_dict`.

        Raises:
            UserError: when an entry is missing or the stored hash does not fit the content.
        """
        try:
            chosen = saved["chosen"].cpu() if "chosen" in saved else None
            content = saved["valid_index"].cpu(), int(saved["n_total"]), int(saved["seed"]), str(saved["labels_hash"]), chosen
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
            raise FileNotFoundError(f"{path}: no split there; training with --use-valid or --images_per_class writes one")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read as a hold-out split: {str(error).splitlines()[0]}") from error
        if not isinstance(saved, dict):
            raise UserError(f"{path} cannot be read as a hold-out split: it holds a {type(saved).__name__}")
        return cls.from_dict(saved)
