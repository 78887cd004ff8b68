"""Reading any file that may hold weights: what kind of file it is, and where in it the weights are. Code in it never runs."""
from __future__ import annotations

import io
import pickle
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.core.errors import UserError, is_out_of_memory

# Under these names programs save the weights of a network.
WEIGHT_KEYS = ("state_dict", "model", "net", "state_dict_ema", "model_ema")
# Entries that tell the training method, by its name here: L2W-DEN keeps its weight network beside the weights.
METHOD_OF_ENTRY = {"meta_state_dict": "l2w"}
# What wrappers (DataParallel, torch.compile) put in front of the names of weights.
PREFIXES = ("module.", "_orig_mod.")
# Of weights, and of the counters of batch normalisation.
WEIGHT_TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32}

# First bytes of files that are often named in place of a checkpoint.
KINDS = {
    b"\x1f\x8b": "it is a gzip archive; unpack it first", b"BZh": "it is a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "it is an xz archive; unpack it first", b"7z\xbc\xaf": "it is a 7z archive; unpack it first",
    b"version https://git-lfs": "it is a Git-LFS pointer, not the file itself; fetch that with: git lfs pull",
    b"\x89HDF": "it is an HDF5 file, as Keras writes them", b"\x93NUMPY": "it is a NumPy array",
    b"\x89PNG": "it is an image", b"\xff\xd8\xff": "it is an image", b"GIF8": "it is an image",
    b"PK": "it is damaged: a zip archive without its end",
}
# Start of the pickle that torch.save without archives puts first, after the two bytes that give the pickle's protocol.
TORCH_PICKLE = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


class _Ignored:
    """Takes the place of a harmless object beside the weights of which nothing is needed."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY = ("scalar", "_reconstruct")
_DTYPES = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32", "Float64",
           "LongDouble", "Complex64", "Complex128", "CLongDouble", "Bytes", "Str", "String", "Object", "Void", "DateTime64",
           "TimeDelta64", "Byte", "Short", "Int", "Long", "LongLong", "UByte", "UShort", "UInt", "ULong", "ULongLong")
_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
IGNORED = (*(f"{package}.multiarray.{name}" for package in ("numpy.core", "numpy._core") for name in _NUMPY), "numpy.ndarray",
           "numpy.dtype", *(f"numpy.dtypes.{name}DType" for name in _DTYPES), "argparse.Namespace",
           *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS))


def read_file(path: Path) -> Any:
    """Content of a file that torch.save wrote: tensors and plain values.

    Raises:
        FileNotFoundError: when there is no such file.
        UserError: saying what the file is, when it is damaged, of another kind, or holds other objects.
        OSError, MemoryError: when it cannot be read.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.pth"))
        raise UserError(f"{path} is a folder; name the checkpoint in it" + (f": {', '.join(inside)}" if inside else ""))
    try:
        stored = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such checkpoint") from error
    file = io.BytesIO(stored)   # in memory, so that whatever is wrong from here on is wrong with the content
    # By its start as well: a tar archive of a checkpoint ends like one.
    is_archive = stored.startswith(b"PK") and zipfile.is_zipfile(file)
    if is_archive:   # torch.load does not verify the checksums of its own format
        _check_archive(file, path)
    elif other := _other_kind(stored):
        raise UserError(f"{path} cannot be read as a checkpoint: {other}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Ignored, name) for name in IGNORED]):
            warnings.simplefilter("ignore")   # of an unusual pickle_protocol; whether it can be read shows at once
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:   # its message advises to switch the safety off
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path} is refused: it holds more than tensors and plain values ({name[1]}), and nothing else is "
                            "read; save the weights alone, torch.save(model.state_dict(), FILE)") from error
        reason = ("it was written with another pickle_protocol than torch.save's own" if is_archive else
                  "it was not written by torch.save with its own pickle_protocol, or is damaged")
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
    except Exception as error:   # torch.load raises a dozen kinds on damaged files
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Raise UserError for a zip archive that is damaged or that torch.save did not write."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.file_size]
            names = [entry.filename for entry in entries]
            # Where torch.save was told to leave the checksums out, all of them are 0.
            damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
    except Exception as error:   # whatever the damage makes of the table of contents
        raise UserError(f"{path} is damaged: {error}") from error
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} does not fit")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"{path} is a TorchScript program; name the file with the weights of its network instead")
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path} is a zip archive that torch.save did not write; it holds {listed(names) or 'nothing'}")


def _other_kind(stored: bytes) -> str | None:
    """What kind of file it is, where that is known and torch.save writes no such files."""
    if not stored:
        return "it is empty"
    if re.match(rb"\s*<(!doctype|html|\?xml)", stored[:512], re.IGNORECASE):
        return "it is a web page; download the file that the page is about"
    if kind := next((kind for start, kind in KINDS.items() if stored.startswith(start)), None):
        return kind
    if not re.search(rb"[^\x09-\x0d\x20-\x7e]", stored[:512]):
        return "it is a text file"
    if re.match(rb"[^\0].{3}\0{4}\s*\{", stored, re.DOTALL):   # the length of a header in JSON, and the header
        return "it is a safetensors file; read it with the library safetensors and write its tensors with torch.save"
    if re.match(rb"\x80[\x02-\x05]", stored) and not stored.startswith(TORCH_PICKLE, 2):
        return "it is a pickle that was not written by torch.save"
    # After the packed kinds, which the library would unpack in order to look.
    return "it is a tar archive; unpack it and name the file in it" if tarfile.is_tarfile(io.BytesIO(stored)) else None


def listed(names: list[str]) -> str:
    """The first few of some names, in one line."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def find_weights(content: Any, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state_dict in the content of a file, under plain names: `module.` and `_orig_mod.` in front of them are taken off.

    Args:
        key: where it is, such as `model_ema` or `state_dict.model`; only needed where there are several.
    Raises:
        UserError: saying what was found, when there is none, or several and no key.
    """
    start = content
    for part in key.split(".") if key else ():
        if not isinstance(start, dict) or part not in start:
            raise UserError(f"{path} has nothing under --checkpoint_key {key}; it holds {_describe(content)}")
        start = start[part]
    found = _state_dicts(start)
    if not found:
        raise UserError(f"{path} is not a checkpoint: expected weights, or a dict with them under "
                        f"{key or ', '.join(map(repr, WEIGHT_KEYS))}; found {_describe(start)}")
    if len(found) > 1:
        raise UserError(f"{path} holds several networks; choose one with --checkpoint_key: {', '.join(found)}")
    [weights] = found.values()
    plain = {_plain(name): tensor.detach() for name, tensor in weights.items()}
    if len(plain) < len(weights):
        raise UserError(f"{path} holds weights twice, with and without {' or '.join(PREFIXES)} in front of their names")
    return plain


def _plain(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _state_dicts(content: Any, depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """Every state_dict in the content of a file, by the keys that lead to it."""
    if not isinstance(content, dict) or depth > 2:
        return {}
    if content and all(map(_is_weight, content.items())):
        return {"": content}
    return {f"{key}.{inner}".rstrip("."): weights for key in WEIGHT_KEYS if key in content
            for inner, weights in _state_dicts(content[key], depth + 1).items()}


def _is_weight(entry: tuple[Any, Any]) -> bool:
    name, tensor = entry
    return (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
            and tensor.device.type == "cpu" and tensor.dtype in WEIGHT_TYPES)


def _describe(content: Any) -> str:
    """The keys of a content and what is under them, or its type."""
    if not isinstance(content, dict):
        return f"something else ({type(content).__name__})"
    entries = [f"{key!r:.40} ({_kind(value)})" for key, value in list(content.items())[:8]]
    more = f" and {len(content) - 8} more" if len(content) > 8 else ""
    return ", ".join(entries) + more if entries else "an empty dict"


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        odd = next((entry for entry in value.items() if not _is_weight(entry)), None)
        return "a dict" if odd is None else f"a dict, in which {odd[0]!r:.40} is {_kind_of_tensor(odd[1])}"
    return _kind_of_tensor(value)


def _kind_of_tensor(value: Any) -> str:
    return f"a tensor of type {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
