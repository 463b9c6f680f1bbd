"""Reading and writing foreign files. Nothing in a file is ever executed: a pickle is read for its tensors alone.

A state dict is a dictionary of NumPy arrays by name. Whatever is wrong with a file is a ValueError that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdiff.writing import replacing

__all__ = [
    "FOLDER_READERS",
    "READERS",
    "State",
    "array_of",
    "read_folder",
    "read_json",
    "read_state",
    "write_json",
    "write_safetensors",
]

State = dict[str, np.ndarray]


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file."""
    _check_there(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not text, not JSON, a number of thousands of digits, lists in lists
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object; received: {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a dictionary, with sorted keys."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_state(path: str | Path) -> State:
    """The arrays of one file, by what its name ends in: see `READERS`.

    Raises:
        ValueError: if there is no such file, its kind is unknown, or it is damaged.
    """
    path = Path(path)
    _check_there(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: the name must end in one of {list(READERS)}; received: {path.suffix!r}")
    return READERS[path.suffix](path)


def read_folder(folder: Path, stem: str = "diffusion_pytorch_model") -> State:
    """The arrays of the one file, or the shards, that hold the weights of the model in a folder."""
    for ending, read in FOLDER_READERS.items():
        if (folder / f"{stem}{ending}").exists():
            return read(folder / f"{stem}{ending}")
    wanted = [f"{stem}{ending}" for ending in FOLDER_READERS]
    raise ValueError(f"{folder}: no weights; expected one of {wanted}; found: {_listing(folder)}")


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as diffusers does."""
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    with replacing(path) as new:
        _safetensors().numpy.save_file(arrays, new, metadata={"format": "pt"})


def _read_safetensors(path: Path) -> State:
    library = _safetensors()
    try:
        return {name: array_of(array, name, path) for name, array in library.numpy.load_file(path).items()}
    except (library.SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _safetensors():
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("safetensors is not installed; `pip install kdiff[interop]`") from error
    return safetensors


def _read_pickle(path: Path) -> State:
    """The tensors of a file that PyTorch has written. Anything but tensors in containers is refused, not run."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: only PyTorch reads this file; install it, or convert the file to safetensors"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and PyTorch's own errors have no common base
        raise ValueError(f"{path}: not a file of tensors alone, or a damaged one: {_first_line(error)}") from error
    tensors = {name: value for name, value in _inner(path, content).items() if torch.is_tensor(value)}
    return {str(name): array_of(value, str(name), path) for name, value in tensors.items()}


def _inner(path: Path, content: Any) -> Mapping:
    """The state dict of a checkpoint that may hold others: averaged weights before trained ones."""
    if isinstance(content, Mapping):
        for name in ("ema", "state_dict", "model"):
            if isinstance(content.get(name), Mapping):
                return content[name]
        return content
    raise ValueError(f"{path}: must hold a dictionary of tensors; received: {type(content).__name__}")


def _read_npz(path: Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: array_of(arrays[name], name, path) for name in arrays.files}
    except Exception as error:  # zip's and NumPy's own errors have no common base
        raise ValueError(f"{path}: not a whole .npz file of numbers: {_first_line(error)}") from error


def _read_shards(path: Path) -> State:
    """The arrays of all files that an index names."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: must have a `weight_map` from names to files; received: {index!r}")
    for name in set(index.values()):
        if Path(name).name != name:
            raise ValueError(f"{path}: a shard must lie beside its index; received: {name!r}")
    state: State = {}
    for shard in sorted(set(index.values())):
        for name, array in read_state(path.parent / shard).items():
            if index.get(name, shard) != shard:
                raise ValueError(f"{path}: {shard} has {name}, which `weight_map` has in {index[name]}")
            state[name] = array
    missing = sorted(set(index) - set(state))
    if missing:
        raise ValueError(f"{path}: its shards do not hold {missing}")
    return state


def array_of(value: Any, name: str, source: Any) -> np.ndarray:
    """A NumPy array of an array or a tensor of PyTorch: float32 of floating-point numbers, others as they are.

    Raises:
        ValueError: if it is no plain tensor with numbers, but sparse, quantised or nested, or without any ("meta").
    """
    if hasattr(value, "detach"):
        import torch

        kinds = {"quantised": value.is_quantized, "nested": value.is_nested, "on no device": value.is_meta}
        kinds["sparse"] = not kinds["nested"] and value.layout != torch.strided
        found = [kind for kind, so in kinds.items() if so]
        if found:
            raise ValueError(f"{source}: {name} must be a plain tensor; it is {found[0]}")
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.to(torch.float32) if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    floating = array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat16", "float8"))
    with np.errstate(over="ignore"):  # what is too large is found to be infinite
        return array.astype("float32") if floating else array


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; its folder holds: {_listing(path.parent)}")


def _listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".bin": _read_pickle,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
}
FOLDER_READERS = {
    ".safetensors": _read_safetensors,
    ".safetensors.index.json": _read_shards,
    ".bin": _read_pickle,
    ".bin.index.json": _read_shards,
}
