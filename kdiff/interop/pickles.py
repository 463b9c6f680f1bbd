"""Files of `torch.save`, read without PyTorch and without executing anything in them.

    archive/data.pkl        a pickle, in which each storage is a reference to
    archive/data/<key>      its values

A pickle calls the objects that it names. Here a name resolves to one of the few functions below, which build arrays;
any other name gives an `Unknown`, an inert object that stores its state. So a file with a configuration, an optimizer
or a whole module among its tensors can be read, whatever code it names.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdiff.interop.arrays import Opened, Stored

__all__ = ["DTYPES", "FUNCTIONS", "Function", "Storage", "Unknown", "module_state", "read_archive"]

DTYPES = {
    **dict.fromkeys(["double", "float64"], "float64"),
    **dict.fromkeys(["float", "float32"], "float32"),
    **dict.fromkeys(["half", "float16"], "float16"),
    **dict.fromkeys(["long", "int64"], "int64"),
    **dict.fromkeys(["int", "int32"], "int32"),
    **dict.fromkeys(["short", "int16"], "int16"),
    **dict.fromkeys(["char", "int8"], "int8"),
    **dict.fromkeys(["byte", "uint8", "untyped"], "uint8"),
    **dict.fromkeys(["complexfloat", "complex64"], "complex64"),
    **dict.fromkeys(["complexdouble", "complex128"], "complex128"),
    **{name: name for name in ("bfloat16", "bool", "uint16", "uint32", "uint64")},
    **{name: name for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")},
}

_NUMBERS = re.compile(r"torch\.(?:storage\.)?(\w+?)(?:Storage)?")


class Unknown:
    """A placeholder for an object of an unknown class: its name, and the state from the pickle."""

    name = ""
    state: Any = None

    def __init__(self, *arguments, **options):
        pass

    def __new__(cls, *arguments, **options):
        return object.__new__(cls)

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        """Ignores list items, as `add` ignores set items."""

    extend = add = append


class Storage(NamedTuple):
    """A contiguous range of values in an archive."""

    file: Opened
    start: int
    dtype: str
    size: int  # in bytes


class Function:
    """A function that a pickle may call. A pickle cannot set its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


def _tensor(storage: Storage, offset, shape, strides, *more) -> Stored:
    """`torch._utils._rebuild_tensor_v2`."""
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_of_type(storage: Storage, offset, shape, strides, gradient, hooks, dtype, *more) -> Stored:
    """`torch._utils._rebuild_tensor_v3`, for an untyped storage."""
    return _view(storage, dtype, offset, shape, strides)


def _parameter(data: Any, *more) -> Any:
    """`torch._utils._rebuild_parameter`."""
    return data


def _view(storage: Storage, dtype: str, offset: int, shape: tuple, strides: tuple) -> Stored:
    """The array in a storage, reading only from its first to its last value."""
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(one, int) and one >= 0 for one in numbers):
        raise ValueError(f"a tensor has the invalid shape {shape} and strides {strides}")
    size = np.dtype(dtype).itemsize
    span = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    span = 0 if 0 in shape else span
    if (offset + span) * size > storage.size:
        raise ValueError(f"a tensor with the shape {shape} and the strides {strides} is larger than its storage")

    def read():
        data = storage.file.read(storage.start + offset * size, span * size)
        return np.ndarray(shape, dtype, data, strides=[stride * size for stride in strides])

    return Stored(shape, dtype, read)


FUNCTIONS = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *more: {},
    "__builtin__.set": set,  # the name in Python 2, still used in pickles
    "builtins.set": set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Any, storages: Mapping[str, tuple[int, int]], file: Opened):
        super().__init__(data, encoding="utf-8", errors="replace")
        self._storages, self._file = storages, file
        self._unknown: dict[str, type] = {}  # per file, since its pickle may modify them

    def find_class(self, module: str, name: str) -> Any:
        """The object for a name in the pickle; nothing is imported."""
        path = f"{module}.{name}"
        if path in FUNCTIONS:
            return Function(FUNCTIONS[path])
        if path.startswith("torch._utils._rebuild"):
            raise ValueError(f"tensors must be plain, with values; one is built by `{name}`")
        numbers = _NUMBERS.fullmatch(path)
        if numbers and numbers[1].lower() in DTYPES:
            return DTYPES[numbers[1].lower()]
        return self._unknown.setdefault(path, type("Unknown", (Unknown,), {"name": path}))

    def persistent_load(self, reference: Any) -> Storage:
        """The storage with this key."""
        kind, dtype, key = reference[:3]
        if kind != "storage" or dtype not in DTYPES.values() or key not in self._storages:
            raise ValueError(f"the storage {key!r} is missing")
        return Storage(self._file, self._storages[key][0], dtype, self._storages[key][1])


def read_archive(path: Path) -> Any:
    """The saved object, with a `Stored` for each tensor and an `Unknown` for each object of an unknown class.

    Raises:
        ValueError: if the file is not from `torch.save`, or is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {tuple(entry.filename.split("/", 1)[1:]): entry for entry in archive.infolist()}
        names = {name[0]: entry for name, entry in entries.items() if name}
        if "data.pkl" not in names:
            raise ValueError("has no `data.pkl`, which `torch.save` writes")
        if "constants.pkl" in names:
            raise ValueError("is a program of TorchScript; save its `state_dict()` with `torch.save`")
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise ValueError("was written with another byte order")
        file = Opened(path)
        storages = {
            name.removeprefix("data/"): (_start(file, entry), entry.file_size)
            for name, entry in names.items()
            if name.startswith("data/") and entry.compress_type == zipfile.ZIP_STORED
        }
        with archive.open(names["data.pkl"]) as data:
            return _Unpickler(data, storages, file).load()


def _start(file: Opened, entry: zipfile.ZipInfo) -> int:
    """The offset of the data of an entry, after its local header."""
    name, more = file.read(entry.header_offset + 26, 4).view("<u2")
    return entry.header_offset + 30 + int(name) + int(more)


def module_state(module: Unknown, prefix: str = "") -> dict[str, Stored]:
    """The state dict of a pickled `torch.nn.Module`, from its parameters, buffers and submodules."""
    state = module.state if isinstance(module.state, Mapping) else {}
    here = {**(state.get("_parameters") or {}), **(state.get("_buffers") or {})}
    hidden = state.get("_non_persistent_buffers_set") or ()
    here = {name: array for name, array in here.items() if isinstance(array, Stored) and name not in hidden}
    arrays = {f"{prefix}{name}": array for name, array in here.items()}
    for name, part in (state.get("_modules") or {}).items():
        if isinstance(part, Unknown):
            arrays |= module_state(part, f"{prefix}{name}.")
    return arrays
