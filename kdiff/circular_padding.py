"""A switch by which maps close: at an edge the convolutions of kdiff see the opposite edge in place of zeros.

with circular_padding.switched_on():
    output = network(inputs)

Every layer that looks past an edge asks here what is there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from keras import ops

__all__ = ["around", "is_on", "padded", "switched_on"]

_closed: ContextVar = ContextVar("circular_padding", default=None)


@contextlib.contextmanager
def switched_on(axes: Sequence[int] | None = None) -> Iterator[None]:
    """Inside, maps (batch, *sizes, channels) are closed along these axes, 0 being the first of the sizes; None: all.

    Raises:
        ValueError: at the end, if no layer looked past an edge.
    """
    used: list[bool] = []
    outer = _closed.get()
    token = _closed.set((axes, used))
    try:
        yield
    finally:
        _closed.reset(token)
    if used and outer is not None:
        outer[1].append(True)
    if not used:
        raise ValueError("No layer of the network looked past an edge: only kdiff's own convolutions can be closed")


def is_on() -> bool:
    """Whether maps are closed along any axis."""
    return _closed.get() is not None


def padded(x: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    """A map (batch, *sizes, channels) with so many positions more at both ends of each axis: zeros, or, along an axis
    that is closed, those of the other end."""
    zeros = [[0, 0]]
    for axis, (first, last) in enumerate(zip(before, after, strict=True)):
        closed = _is_closed(axis)
        zeros.append([0, 0] if closed else [first, last])
        if closed and (first or last):
            size = ops.shape(x)[axis + 1]
            x = ops.take(x, ops.arange(-first, size + last, dtype="int32") % size, axis=axis + 1)
    return ops.pad(x, [*zeros, [0, 0]]) if any(map(any, zeros)) else x


def around(layer: Callable, x: Any, margin: int, scale: int = 1) -> Any:
    """`layer(x)`, which makes of each position `scale` of them and sees `margin` further, on a closed map too."""
    if not is_on():
        return layer(x)
    margins = [margin if _is_closed(axis) else 0 for axis in range(len(x.shape) - 2)]
    y = layer(padded(x, margins, margins))
    inside = [slice(scale * one, -scale * one if one else None) for one in margins]
    return y[(slice(None), *inside)]


def _is_closed(axis: int) -> bool:
    if _closed.get() is None:
        return False
    axes, used = _closed.get()
    used.append(True)
    return axes is None or axis in axes
