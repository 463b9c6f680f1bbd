"""Encoded conditions, computed once per sampling run instead of once per step.

The layer of a condition returns the same in every step of a run if it depends neither on the time nor on x_t. Before
the first step it is called with `Changing` objects in place of these, which have a shape but no numbers: what it
returns is kept, and if it needs the numbers it raises, and is called in every step instead. If it raises with numbers
too, so does the run.

In a step, a result is found by the identity of the tensors from which it was computed. Tensors that a guidance has
changed are therefore never mistaken for those that were encoded. `Denoiser` joins the results where it joins conditions
in one batch.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from keras import ops

__all__ = ["Changing", "Encodings", "current", "kept_in", "used_by"]

_run: ContextVar = ContextVar("encodings", default=None)
_used: ContextVar = ContextVar("encodings in use", default=None)


class Changing:
    """Stands for a tensor that differs from step to step. No operation accepts it.

    Args:
        shape: its shape.
        dtype: its type.
    """

    def __init__(self, shape: tuple, dtype: str = "float32"):
        self.shape, self.dtype, self.ndim = tuple(shape), dtype, len(shape)

    def __bool__(self):
        """Raises a TypeError."""
        raise TypeError("a value that changes from step to step is not known here")


class Encodings:
    """What the layers of conditions returned for some tensors.

    Args:
        owner: whose they are; `used_by` of any other owner hides them.
        network: the network with these layers.
        inputs: the names of the inputs of each layer, by the name of its condition.

    Attributes:
        given: the conditions of the samples.
        nulls: the results for `given` with each condition that has a null row replaced by it; one row each, or all.
        nullable: the names of these.
    """

    def __init__(self, owner: Any, network: Any, inputs: Mapping[str, Sequence[str]]):
        self.owner, self.network, self.inputs = owner, network, inputs
        self.given: Mapping[str, Any] = {}
        self.nulls: Mapping[str, Any] = {}
        self.nullable: Collection[str] = ()
        self._found: dict[tuple, tuple] = {}

    def add(self, conditions: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Keeps results, each a dictionary of tensors by the name of the condition, for these inputs."""
        for name, value in made.items():
            tensors = self._tensors(name, conditions)
            self._found[name, *map(id, tensors)] = (value, tensors)  # the tensors, so that no other gets their identity

    def find(self, name: str, conditions: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The result for these inputs; None if it is not known."""
        return self._found.get((name, *map(id, self._tensors(name, conditions))), (None,))[0]

    def join(self, sets: Sequence[Mapping[str, Any]], joined: Mapping[str, Any]) -> None:
        """Keeps the results for several sets of inputs that are joined to one batch."""
        for name in self.inputs:
            values = [self.find(name, conditions) for conditions in sets]
            if all(value is not None for value in values):
                self.add(joined, {name: {key: ops.concatenate([one[key] for one in values]) for key in values[0]}})

    def drop(self, names: Sequence[str], conditions: Mapping[str, Any]) -> None:
        """Keeps the results for conditions of which those of these names have just been replaced by their null rows.

        They are known, `nulls`, for those in `given` of which all that have a null row are replaced.
        """
        for name, value in self.nulls.items():
            tensors = self._tensors(name, conditions)
            others = [one for one in self.inputs[name] if one in conditions and one not in names]
            same = all(one not in self.nullable and conditions[one] is self.given.get(one) for one in others)
            if tensors and same:
                count = ops.shape(tensors[0])[0]
                rows = {key: ops.broadcast_to(one, (count, *one.shape[1:])) for key, one in value.items()}
                self.add(conditions, {name: rows})

    def _tensors(self, name, conditions) -> tuple:
        return tuple(conditions[one] for one in self.inputs[name] if one in conditions)


@contextlib.contextmanager
def kept_in(encodings: Encodings | None) -> Iterator[None]:
    """The context of a step with these results."""
    token = _run.set(encodings)
    try:
        yield
    finally:
        _run.reset(token)


@contextlib.contextmanager
def used_by(owner: Any) -> Iterator[None]:
    """A context in which the network may use the results, if they are those of this owner."""
    found = _run.get()
    token = _used.set(found if found is not None and found.owner == owner else None)
    try:
        yield
    finally:
        _used.reset(token)


def current(network: Any = None) -> Encodings | None:
    """The results of this step; for a network, those that it may use."""
    if network is None:
        return _run.get()
    found = _used.get()
    return found if found is not None and found.network is network else None
