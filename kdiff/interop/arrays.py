"""Arrays of foreign files that are read lazily, one by one, so that there is never a second copy of all weights.

A state dict maps names to NumPy arrays or to `Stored` ones, of which only the shape is known until `numpy.asarray`
reads the values. Floating-point values of any precision are read as float32.
"""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras  # noqa: F401  (brings bfloat16 and float8 to NumPy)
import numpy as np

__all__ = ["Array", "Opened", "State", "Stored", "array_of", "read_as"]


class Stored:
    """An array that is still in its file, or in memory in another form.

    Args:
        shape: the shape of the array.
        dtype: the NumPy type in the file.
        read: returns the values in that shape, in a form that NumPy converts.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], Any]):
        self.shape = tuple(shape)
        self.dtype = read_as(dtype)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self._read = read

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = _single(np.asarray(self._read()).reshape(self.shape))
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index):
        return np.asarray(self)[index]

    def __repr__(self) -> str:
        return f"Stored({self.shape}, {self.dtype})"


Array = np.ndarray | Stored
State = dict[str, Array]


class Opened:
    """An open file that is read in parts, and closed when the last array in it is deleted."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115
        self._lock = threading.Lock()

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, count: int) -> np.ndarray:
        """Reads `count` bytes."""
        data = np.empty(count, "uint8")
        with self._lock:
            self._file.seek(start)
            read = self._file.readinto(data)
        if read != count:
            raise ValueError(f"{self.path}: ends before its last array")
        return data

    def array(self, shape: tuple[int, ...], dtype: Any, start: int) -> Stored:
        """The contiguous array at this position."""
        dtype = np.dtype(dtype)
        count = math.prod(shape) * dtype.itemsize
        return Stored(shape, dtype, lambda: self.read(start, count).view(dtype))


def read_as(dtype: Any) -> np.dtype:
    """float32 for floating-point types, other types unchanged."""
    dtype = np.dtype(dtype)
    return np.dtype("float32") if dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")) else dtype


def _single(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # overflow gives infinity, which is checked later
        return array.astype(read_as(array.dtype), copy=False)


def array_of(value: Any, name: str, source: Any) -> Array:
    """An array or a PyTorch tensor as an entry of a state dict.

    Raises:
        ValueError: if it is not a plain tensor, but sparse, quantised, nested, or without values ("meta").
    """
    if isinstance(value, Stored):
        return value
    if not hasattr(value, "detach"):
        return _single(np.asarray(value))

    kinds = {"quantised": value.is_quantized, "nested": value.is_nested, "on no device": value.is_meta}
    kinds["sparse"] = not kinds["nested"] and str(value.layout) != "torch.strided"
    found = [kind for kind, so in kinds.items() if so]
    if found:
        raise ValueError(f"{source}: {name} must be a plain tensor; it is {found[0]}")

    def read():
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    floating = value.is_floating_point()
    return Stored(tuple(value.shape), "float32" if floating else str(value.dtype).removeprefix("torch."), read)
