"""What a network is, besides its weights."""
from __future__ import annotations

import hashlib
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.options.catalog import ARCHITECTURES, LEAST_SIDE, METHODS, STEMS, family_of, stem_for

# A mistyped number of blocks should be an error, not a machine that swaps. The largest published network has 160.
MAX_LAYERS = 1000


class OwnNetwork(str):
    """--arch FILE.py:FUNCTION. As text it is the name that checkpoints and results have, without the folder of the file.

    Args:
        text: as given on the command line.
    Attributes:
        file: path of the file.
        function: name of the function in it that makes the network.
    """

    FORM = re.compile(r"(.*\.py):([^\W\d]\w*)", re.DOTALL)

    def __new__(cls, text: str) -> OwnNetwork:
        file, function = cls.FORM.fullmatch(text).groups()
        made = super().__new__(cls, f"{Path(file).name}:{function}")
        made.file, made.function = file, function
        return made

    def file_hash(self) -> str:
        """SHA-256 (hex) of the file.

        Raises:
            UserError: when it cannot be read.
        """
        try:
            return hashlib.sha256(Path(self.file).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"--arch {self.file}:{self.function}: the file cannot be read: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A network without its weights: the command line makes it, checkpoints store it, `models.build_backbone` reads it.

    Attributes:
        arch ... compress_factor: the flags of the network, under their names in the parsed command line.
        num_classes: outputs of a classifier.
        image_size: height and width in pixels.
        stem: first layer, one of `catalog.STEMS`.
        method: training method, which decides whether the exits are boosted.
        temperatures: t_n, one for all exits, two that are interpolated, or one per exit; 0 where exits predict alone.
        trainable_ensemble: whether gradients flow through the earlier exits' sum.
        file_hash: of a person's own network, SHA-256 (hex) of the file whose code makes it.
    """

    arch: str
    nBlocks: int
    base: int
    step: int
    stepmode: str
    nChannels: int
    growthRate: int
    grFactor: list[int]
    bnFactor: list[int]
    prune: str
    reduction: float
    bottleneck: bool
    block_step: int
    scale_list: list[int]
    compress_factor: float
    num_classes: int
    image_size: int
    stem: str
    method: str
    temperatures: list[float]
    trainable_ensemble: bool = False
    file_hash: str | None = None

    @classmethod
    def from_args(cls, args: Namespace) -> NetworkSpec:
        """The network of a parsed command line whose number of classes is known."""
        temperatures = args.ensemble_reweight if METHODS[args.method].boosted else [0.0]
        return cls(**{name: getattr(args, name) for name in ARCHITECTURE}, method=args.method, temperatures=list(temperatures),
                   trainable_ensemble=args.trainable_ensemble,
                   file_hash=args.arch.file_hash() if isinstance(args.arch, OwnNetwork) else None)

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], source: str | Path) -> NetworkSpec:
        """The network that a checkpoint (from `checkpoint.load`) says it holds.

        Raises:
            UserError: when it says nothing, or something that the command line would not accept.
        """
        if "architecture" not in saved:
            raise UserError(f"{source} holds weights only, nothing about its network; expected a checkpoint of a training run "
                            "here")
        stored = {"stem": stem_of(saved["architecture"]), "file_hash": None, **saved["architecture"], "method": saved["method"],
                  "temperatures": saved["temperatures"], "trainable_ensemble": saved["trainable_ensemble"]}
        kinds = {field.name: field.type for field in fields(cls)}
        wrong = [name for name, kind in kinds.items() if name not in stored or not _IS[kind](stored[name])]
        wrong += [name for name in stored if name not in kinds]
        if not wrong:
            spec = cls(**stored)
            is_own = OwnNetwork.FORM.fullmatch(spec.arch) is not None
            wrong = [name for name, unusable in (("arch", not is_own and spec.arch not in ARCHITECTURES),
                                                 ("file_hash", is_own != (spec.file_hash is not None)),
                                                 ("stem", spec.stem not in STEMS), ("method", spec.method not in METHODS),
                                                 ("nBlocks", n_layers(spec) > MAX_LAYERS)) if unusable]
        if wrong:
            value = stored.get(wrong[0], "missing")
            raise UserError(f"{source} was changed, or is from another version: its {wrong[0]} makes no sense ({value!r:.60})")
        return spec

    def to_checkpoint(self) -> dict[str, Any]:
        """Entries of a checkpoint, the inverse of `from_checkpoint`."""
        stored, file_hash = {**asdict(self), "arch": str(self.arch)}, {}
        if (value := stored.pop("file_hash")) is not None:
            file_hash["file_hash"] = value
        return {"architecture": {name: stored.pop(name) for name in ARCHITECTURE} | file_hash, **stored}

    def made_by(self, arch: str | None, source: str | Path) -> NetworkSpec:
        """The same network with --arch in place of the name in its checkpoint, which of a person's own does not say where it is.

        Raises:
            UserError: when they are not the same.
        """
        if arch is not None and arch != self.arch:
            raise UserError(f"{source} was trained with --arch {self.arch}, but the command line says {arch}")
        return self if arch is None else replace(self, arch=arch)

    def with_temperatures(self, temperatures: tuple[float, ...]) -> NetworkSpec:
        """The same network with these temperatures."""
        return replace(self, temperatures=list(temperatures))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= 100_000


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


# What a value of each kind of field has to be in a checkpoint.
_IS = {"str": lambda value: isinstance(value, str), "str | None": lambda value: value is None or isinstance(value, str),
       "bool": lambda value: isinstance(value, bool), "int": _is_size, "float": _is_finite,
       "list[int]": lambda value: isinstance(value, list) and value != [] and all(map(_is_size, value)),
       "list[float]": lambda value: isinstance(value, list) and value != [] and all(map(_is_finite, value))}

ARCHITECTURE = tuple(field.name for field in fields(NetworkSpec)
                     if field.name not in ("method", "temperatures", "trainable_ensemble", "file_hash"))
# The flags that describe the network; the data set settles the other two.
NETWORK = tuple(name for name in ARCHITECTURE if name not in ("num_classes", "image_size"))


def stem_of(stored: Mapping[str, Any]) -> str:
    """First layer of a stored network; of a file from before there was a choice, the one of its image size."""
    side = stored.get("image_size")
    return stored.get("stem") or stem_for(side if isinstance(side, int) else LEAST_SIDE)   # later checks name what is wrong


def is_msdnet(network: NetworkSpec | Namespace) -> bool:
    return family_of(network.arch) == "msdnet"


def n_layers(network: NetworkSpec | Namespace) -> int:
    """Layers of an MSDNet, or of all sub-networks of a RANet, computed without building it; 0 where no flag sets the depth."""
    if family_of(network.arch) not in ("msdnet", "ranet"):
        return 0
    if is_msdnet(network):
        later = network.nBlocks - 1
        growing = network.step * network.nBlocks * later // 2 + later
        return network.base + (network.step * later if network.stepmode == "even" else growing)
    blocks = [network.nBlocks + network.block_step * s for s in range(len(network.scale_list))]
    return network.step * sum(n if network.stepmode == "even" else n * (n + 1) // 2 for n in blocks)
