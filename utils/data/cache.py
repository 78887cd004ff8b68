"""Arrays that are expensive to make, kept in one file and made again whenever their key or the file is not right."""
from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.core.files import atomic_write, sweep

logger = logging.getLogger("boostnet")


def in_user_cache(name: str) -> list[Path]:
    """Where a cache goes that cannot lie beside the data: $XDG_CACHE_HOME/boostnet/name, by default ~/.cache/boostnet/name.

    Empty for a user without a home folder, as a container may have.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(folder) / "boostnet" / name] if os.path.isabs(folder) else []


def places_for(data_root: Path, kind: str) -> list[Path]:
    """Where a cache about `data_root` may lie: beside the data, else in the user's cache folder."""
    root = hashlib.sha256(os.fsencode(data_root.resolve())).hexdigest()[:16]
    return [data_root / f".boostnet_{kind}.npz", *in_user_cache(f"{kind}-{root}.npz")]


def place_to_write(places: list[Path]) -> Path | None:
    """The first of these files that can be written, as far as one can tell beforehand; None where none can."""
    def is_writable(place: Path) -> bool:
        nearest = next(folder for folder in place.absolute().parents if os.path.exists(folder))
        return os.access(nearest, os.W_OK)

    return next(filter(is_writable, places), None)


def load_or_build(places: list[Path], key: str, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays stored under `key` in one of the files `places`, else those of `build()`, stored in the first writable one.

    A file with another key is out of date; one that cannot be read (the archive format checks its own sums) or has other
    arrays than were stored is damaged: both are replaced. Where no place is writable the arrays are simply not kept.
    """
    for place in places:
        arrays = _read(place, key)
        if arrays is not None:
            return arrays
    arrays = build()
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            sweep(place.parent)
            with atomic_write(place) as file:
                np.savez(file, key=np.array(key), layout=np.array(_layout(arrays)), **arrays)
            return arrays
        except OSError as error:
            logger.info("no cache at %s: %s", place, error)
    logger.warning("none of %s is writable: the data will be prepared again next time", ", ".join(map(str, places)))
    return arrays


def _layout(arrays: dict[str, np.ndarray]) -> str:
    """Names, types and shapes of the arrays."""
    return "; ".join(f"{name} {arrays[name].dtype.str} {arrays[name].shape}" for name in sorted(arrays))


def _read(place: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        if not place.is_file():
            return None
    except OSError:   # another user's folder; before Python 3.14 such a question is an error
        return None
    try:
        with np.load(place, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            arrays = {name: stored[name] for name in stored.files if name not in ("key", "layout")}
            if str(stored["layout"]) != _layout(arrays):
                raise ValueError("its arrays are not those that were stored")
            return arrays
    except Exception as error:  # a damaged archive raises nearly anything
        logger.warning("%s is damaged (%s): preparing the data again", place, error)
        return None
