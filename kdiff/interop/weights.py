"""Weights by foreign names: tables give the foreign name of each layer, and one traversal does the rest.

A `Slot` pairs one array of a state dict, or some of its rows, with one variable. `assign` reads all slots, `export`
writes them. PyTorch stores kernels with the outputs first, (out, in, height, width) and (out, in); Keras last.
"""

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import keras
import numpy as np

from kdiff import backend
from kdiff.blocks.embeddings import FourierEmbedding
from kdiff.blocks.lookup import LabelEmbedding, LearnedEmbedding
from kdiff.blocks.normalization import GroupNorm, LayerNorm, RMSNorm
from kdiff.interop.arrays import Array, State
from kdiff.interop.configs import explained
from kdiff.interop.unsupported import about_names

__all__ = [
    "LAYOUTS",
    "LEAVES",
    "LISTED",
    "Layout",
    "Names",
    "Part",
    "Rows",
    "Slot",
    "assign",
    "export",
    "export_layout",
    "fill",
    "read_slot",
    "slots",
]


class Rows(NamedTuple):
    """Rows of an array whose first axis has `groups` groups of `of` chunks: the `chunks` of each group, in order."""

    chunks: tuple[int, ...]
    of: int
    groups: int = 1

    def take(self, array: np.ndarray) -> np.ndarray:
        """The rows."""
        parts = array.reshape(self.groups, self.of, -1, *array.shape[1:])[:, list(self.chunks)]
        return parts.reshape(-1, *array.shape[1:])

    def put(self, rows: np.ndarray, array: np.ndarray | None) -> np.ndarray:
        """`array`, or a new one, with these rows."""
        width = len(rows) // (self.groups * len(self.chunks))
        shape = (self.groups, self.of, width, *rows.shape[1:])
        whole = np.zeros(shape, rows.dtype) if array is None else array.reshape(shape)
        whole[:, list(self.chunks)] = rows.reshape(self.groups, len(self.chunks), width, *rows.shape[1:])
        return whole.reshape(-1, *rows.shape[1:])


class Slot(NamedTuple):
    """The location of a variable in a state dict.

    Attributes:
        name: of the array.
        variable: the Keras variable.
        layout: its layout there, a `Layout` or a key of `LAYOUTS`.
        rows: the rows that it occupies; None for all.
        layer: its layer, if it was found by `LEAVES`.
    """

    name: str
    variable: Any
    layout: Any = "same"
    rows: Rows | None = None
    layer: Any = None


class Layout(NamedTuple):
    """A conversion to the layout of kdiff, and its inverse."""

    ours: Any
    theirs: Any


def _matrix(array: np.ndarray) -> np.ndarray:
    """A dense kernel, or an equivalent 1x1 convolution."""
    return array.reshape(array.shape[:2]).T if array.ndim > 1 and set(array.shape[2:]) <= {1} else array


LAYOUTS = {
    "same": Layout(lambda array: array, lambda array: array),
    "dense": Layout(_matrix, lambda array: array.T),
    "pixel": Layout(_matrix, lambda array: array.T[:, :, None, None]),
    "line": Layout(_matrix, lambda array: array.T[:, :, None]),
    "convolution": Layout(lambda array: _moved(array, (2, 3, 1, 0)), lambda array: array.transpose(3, 2, 0, 1)),
}

# The variables of layers: their foreign names, their names in kdiff, and their layouts.
LEAVES = {
    keras.layers.Dense: (("weight", "kernel", "dense"), ("bias", "bias", "same")),
    keras.layers.Conv2D: (("weight", "kernel", "convolution"), ("bias", "bias", "same")),
    GroupNorm: (("weight", "gamma", "same"), ("bias", "beta", "same")),
    LayerNorm: (("weight", "gamma", "same"), ("bias", "beta", "same")),
    RMSNorm: (("weight", "gamma", "same"),),
    LabelEmbedding: (("weight", "table", "same"),),
    LearnedEmbedding: (("weight", "table", "same"),),
    FourierEmbedding: (("weight", "frequencies", "same"),),
}


LISTED = 10  # lines of one kind in an error


def _moved(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return array.transpose(axes) if array.ndim == len(axes) else array


class Part(NamedTuple):
    """A layer inside another, as the value of its foreign name.

    Attributes:
        path: of attributes, from the outer layer; if it does not exist, the part is skipped.
        layout: of its kernel, instead of the default of the layer.
        rows: the rows of the foreign arrays that it occupies; None for all.

    Both may be functions of the outer layer.
    """

    path: str
    layout: Any = None
    rows: Any = None

    def of(self, layer: Any) -> Self:
        """The part with functions evaluated for a layer."""
        return Part(self.path, *(value(layer) if callable(value) else value for value in self[1:]))


Names = Mapping[type, Mapping[str, Any]]


def slots(layer: Any, name: str, names: Names, part: Part | None = None) -> Iterator[Slot]:
    """The slots of a layer and of all its inner layers.

    Args:
        layer: a built layer; None has no slots.
        name: the foreign name of the layer.
        names: for each class of layer, the names of its parts: a path, a `Part`, or a list of them. In the name of a
            list of layers, "*" is the index of each.
        part: the layer's role in the layer around it.
    """
    kind = next((kind for kind in type(layer).__mro__ if kind in names or kind in LEAVES), None)
    if kind in names:
        for inner, choices in names[kind].items():
            for one in choices if isinstance(choices, list) else [choices]:
                one = one if isinstance(one, Part) else Part(one)
                for found, called in _numbered(_follow(layer, one.path), _join(name, inner)):
                    yield from slots(found, called, names, one.of(layer))
    elif kind is not None:
        yield from _leaf(layer, name, LEAVES[kind], part or Part(""))


def _numbered(layer: Any, name: str) -> Iterator[tuple[Any, str]]:
    if "*" in name:
        yield from ((one, name.replace("*", str(i))) for i, one in enumerate(layer))
    else:
        yield layer, name


def _leaf(layer, name, entries, part):
    for theirs, ours, layout in entries:
        # In a layer with LoRA, `kernel` is a sum, not a variable.
        variable = layer._kernel if ours == "kernel" and hasattr(layer, "lora_enabled") else getattr(layer, ours, None)
        if variable is not None:
            changed = part.layout if part.layout and theirs == "weight" else layout
            yield Slot(_join(name, theirs), variable, changed, part.rows, layer)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _follow(layer: Any, path: str) -> Any:
    for attribute in filter(None, path.split(".")):
        layer = getattr(layer, attribute, None)
    return layer


def assign(wanted: Iterable[Slot], state: State, source: Any, strict: bool = True) -> None:
    """Assigns every variable, array by array, with only one array in memory besides the variables.

    Args:
        wanted: the slots. If a variable has several, their arrays must be equal.
        state: the arrays by name.
        source: the file or folder, for the error.
        strict: whether mismatches are an error; otherwise a warning, and the rest is assigned.

    Raises:
        ValueError: with a list of all arrays that are missing, unexpected or of another shape, in which case no
            variable is changed; or of all that are not finite, or differ from a copy.
    """
    wanted = list(wanted)
    wrong = _mismatches(wanted, state)
    wrong += _given(wanted, state, change=not (wrong and strict))
    _report(wrong, state, wanted, source, strict)


def fill(
    network: keras.Model,
    shapes: Mapping[str, tuple],
    slots_of: Callable[[Any], Iterable[Slot]],
    state: State,
    source: Any,
    strict: bool = True,
) -> None:
    """Builds a network of kdiff with given weights.

    Mismatches are found before memory is allocated, and weights in the file are not initialised randomly.

    Args:
        network: unbuilt.
        shapes: of its inputs, by name.
        slots_of: returns the slots of the built network.
        state, source, strict: as in `assign`, whose errors are raised.
    """
    with backend.unallocated(), explained(source):
        network.build(shapes)
    assign(slots_of(network), state, source, strict)
    backend.allocate(network)


def _mismatches(wanted: list[Slot], state: State) -> list[str]:
    """A list of arrays that are missing, unexpected, or of another shape or type."""
    wrong = [f"missing: {slot.name}" for slot in wanted if slot.name not in state]
    wrong += [f"not expected: {name} {state[name].shape}" for name in sorted(set(state) - {s.name for s in wanted})]
    for slot in (slot for slot in wanted if slot.name in state):
        array = state[slot.name]
        if array.dtype != np.float32:
            wrong.append(f"type: {slot.name} is {array.dtype}, and must be floating-point")
        elif not _fits(slot, array):
            wrong.append(f"shape: {slot.name} is {array.shape}, which does not make {tuple(slot.variable.shape)}")
    return wrong


def _fits(slot: Slot, array: Array) -> bool:
    """Whether the array of a slot has the shape of its variable, without reading it."""
    ours = read_slot(slot, np.broadcast_to(np.zeros((), "int8"), array.shape)) if array.dtype == np.float32 else None
    return ours is not None and ours.shape == tuple(slot.variable.shape)


def _given(wanted: list[Slot], state: State, change: bool) -> list[str]:
    """Assigns to each variable its first slot, if it fits and is finite; returns a list of errors in the values.

    Without `change` the values are only checked.
    """
    copies = collections.Counter(id(slot.variable) for slot in wanted)
    first: dict[int, tuple[str, np.ndarray]] = {}  # the values of variables with copies, which are small
    groups: dict[str, list[Slot]] = {}  # the slots of each array, which is read once
    for slot in wanted:
        if slot.name in state and _fits(slot, state[slot.name]):
            groups.setdefault(slot.name, []).append(slot)

    def given(name):
        array = np.asarray(state[name])
        for slot in groups[name]:
            ours, key = read_slot(slot, array), id(slot.variable)
            if not _finite(ours):
                yield f"not finite: {name}"
                continue
            if change and key not in first:
                backend.give(slot.variable, ours)
            if copies[key] > 1:
                other, before = first.setdefault(key, (name, ours.copy()))
                if not np.array_equal(before, ours):
                    yield f"differs: {name} from {other}, whose copy it should be"

    return [line for name in groups for line in given(name)]


def _finite(array: np.ndarray) -> bool:
    """Whether all values are finite; a finite sum shows it in one pass without a second array."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(array)) or np.all(np.isfinite(array)))


def read_slot(slot: Slot, array: np.ndarray) -> np.ndarray | None:
    """The values of a slot in an array, in the layout of kdiff; None if the number of axes is wrong."""
    if slot.rows is not None:
        if array.ndim == 0 or array.shape[0] % (slot.rows.groups * slot.rows.of):
            return None
        array = slot.rows.take(array)
    try:
        return _layout(slot).ours(array)
    except ValueError:  # wrong number of axes
        return None


def export_layout(slot: Slot, array: np.ndarray) -> np.ndarray:
    """An array of kdiff in the layout of the slot."""
    return _layout(slot).theirs(array)


def _layout(slot: Slot) -> Layout:
    return LAYOUTS[slot.layout] if isinstance(slot.layout, str) else slot.layout


def _report(wrong: list[str], state: State, wanted: list[Slot], source: Any, strict: bool) -> None:
    if not wrong:
        return
    kinds: dict[str, list[str]] = {}
    for line in wrong:
        kinds.setdefault(line.split(":")[0], []).append(line)
    lines = [line for kind, all_of in kinds.items() for line in _cut(kind, all_of)]
    listed = "\n  ".join(lines)
    message = f"{source}: {len(wrong)} arrays do not match the network{_hint(state, wanted)}:\n  {listed}"
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def _cut(kind: str, lines: list[str]) -> list[str]:
    return lines if len(lines) <= LISTED else [*lines[:LISTED], f"{kind}: {len(lines) - LISTED} more"]


def _hint(state: State, wanted: list[Slot]) -> str:
    """A reason why no name matches: a common prefix, or another network."""
    names = {slot.name for slot in wanted}
    if names & set(state):
        return ""
    for name in state:
        for prefix in (name.removesuffix(one) for one in names if name.endswith("." + one)):
            if all(prefix + one in state for one in names):
                return f", whose names have the prefix {prefix!r} in the file: pass a mapping without it"
    return about_names(state)


def export(wanted: Iterable[Slot], values: Mapping[int, Any] | None = None) -> State:
    """The arrays of all slots by name, float32. A kernel with LoRA is exported with its change, scale A B.

    Args:
        wanted: the slots.
        values: values that replace those of variables, by the `id` of the variable.
    """
    state: State = {}
    for slot in wanted:
        array = export_layout(slot, _exported(slot, values or {}))
        state[slot.name] = array if slot.rows is None else slot.rows.put(array, state.get(slot.name))
    return state


def _exported(slot: Slot, values: Mapping[int, Any]) -> np.ndarray:
    def numbers(variable):
        return np.asarray(keras.ops.convert_to_numpy(values.get(id(variable), variable)), "float32")

    layer = slot.layer
    if getattr(layer, "quantization_mode", None) is not None:
        raise ValueError(f"{slot.name}: the network is quantized, to {layer.quantization_mode}; save it as `.keras`")
    if not getattr(layer, "lora_enabled", False) or slot.variable is not layer._kernel:
        return numbers(slot.variable)
    change = numbers(layer.lora_kernel_a) @ numbers(layer.lora_kernel_b)
    return numbers(slot.variable) + np.float32(layer.lora_alpha / layer.lora_rank) * change
