"""Reading and writing foreign files. Nothing in a file is ever executed: from a pickle only tensors are read.

A state dict maps names to arrays, which for a `.safetensors` file are read lazily (see `kdiff.interop.arrays`). Any
defect of a file is a ValueError that names the file.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdiff import backend
from kdiff.interop.arrays import Array, Opened, State
from kdiff.interop.checkpoints import state_of, unwrapped
from kdiff.interop.configs import shown
from kdiff.interop.pickles import read_archive
from kdiff.interop.unsupported import about_file, check_is_itself
from kdiff.writing import replacing

__all__ = [
    "FOLDER_READERS",
    "READERS",
    "SAFETENSORS",
    "read_archived",
    "read_json",
    "read_metadata",
    "read_state",
    "write_json",
    "write_safetensors",
]

# The types of safetensors files and their NumPy equivalents.
SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


def read_json(path: Path) -> dict[str, Any]:
    """Reads the dictionary in a JSON file."""
    check_is_itself(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not text, not JSON, too many digits, nested too deeply
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object; received: {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a dictionary, with sorted keys."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_state(path: str | Path) -> State:
    """Reads the arrays of one file, by the suffix of its name (see `READERS`).

    Raises:
        ValueError: if the file is missing, damaged, or of an unknown kind.
    """
    path = Path(path)
    check_is_itself(path)
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: the suffix must be one of {list(READERS)}; received: {path.suffix!r}{about_file(path)}"
        )
    return unwrapped(READERS[path.suffix](path))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a `.safetensors` file."""
    with _safetensors().safe_open(path, "np") as file:
        return file.metadata() or {}


def write_safetensors(path: Path, state: Mapping[str, Array]) -> None:
    """Writes a state dict in the format of diffusers."""
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    with replacing(path) as new:
        _safetensors().numpy.save_file(arrays, new, metadata={"format": "pt"})


def _read_safetensors(path: Path) -> State:
    """The arrays of a file whose header the library has found valid and consistent with the length of the file.

    The library would map the file, so that all parts read count as memory, and cannot convert float8 to NumPy.
    """
    library = _safetensors()
    try:
        with library.safe_open(path, "np"):
            pass
        file = Opened(path)
        length = int(file.read(0, 8).view("<u8")[0])
        header = json.loads(file.read(8, length).tobytes())
    except (library.SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file: {_first_line(error)}") from error
    header.pop("__metadata__", None)
    unknown = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in SAFETENSORS}
    if unknown:
        raise ValueError(f"{path}: the types must be in {list(SAFETENSORS)}; received: {shown(unknown)}")
    return {
        name: file.array(entry["shape"], SAFETENSORS[entry["dtype"]], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _safetensors():
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("safetensors is not installed; `pip install kdiff[interop]`") from error
    return safetensors


def _read_pickle(path: Path) -> State:
    """The tensors of a PyTorch file. Other objects are skipped, and nothing is executed."""
    return _explained(path, lambda: state_of(_archived(path), path))


def read_archived(path: str | Path) -> Any:
    """The whole content of a PyTorch file, with a `Stored` for each tensor (see `kdiff.interop.pickles`).

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = Path(path)
    check_is_itself(path)
    return _explained(path, lambda: _archived(path))


def _archived(path: Path) -> Any:
    return read_archive(path) if zipfile.is_zipfile(path) else _read_old(path)


def _explained(path: Path, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the errors of pickle, zip and PyTorch have no common base
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not a file of tensors, or damaged: {_first_line(error)}") from error


def _read_old(path: Path) -> Any:
    """A file written by PyTorch before 1.6, read by PyTorch itself if it has only tensors in containers."""
    try:
        return backend.torch_file(path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: only PyTorch can read this file; install it, or convert the file to safetensors"
        ) from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f" with an object of {found[1]}" if found else ""
        raise ValueError(
            f"{path}: not a file of only tensors, but one{more}, from before PyTorch 1.6 or not from PyTorch; save the "
            "`state_dict()` with `torch.save`"
        ) from error


def _read_npz(path: Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return state_of({name: arrays[name] for name in arrays.files}, path)
    except Exception as error:  # the errors of zip and NumPy have no common base
        raise ValueError(f"{path}: not a complete .npz file of numbers: {_first_line(error)}") from error


def _read_shards(path: Path) -> State:
    """The arrays of all files listed in an index."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: must have a `weight_map` from names to files; received: {index!r}")
    for name in set(index.values()):
        if Path(name).name != name:
            raise ValueError(f"{path}: a shard must be in the folder of its index; received: {name!r}")
    index = unwrapped(index)
    state: State = {}
    for shard in sorted(set(index.values())):
        for name, array in read_state(path.parent / shard).items():
            if index.get(name, shard) != shard:
                raise ValueError(f"{path}: {shard} has {name}, which `weight_map` places in {index[name]}")
            state[name] = array
    missing = sorted(set(index) - set(state))
    if missing:
        raise ValueError(f"{path}: its shards do not hold {missing}")
    return state


def _first_line(error: Exception) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", (str(error).splitlines() or [type(error).__name__])[0])


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _read_pickle),
}
FOLDER_READERS = {
    ".safetensors": read_state,
    ".safetensors.index.json": _read_shards,
    ".bin": read_state,
    ".bin.index.json": _read_shards,
}
