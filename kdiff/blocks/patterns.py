"""Attention patterns: which positions attend to which, as functions of queries, keys and values in heads.

    y = pattern(q, k, v, mask=None, bias=None)

with q, k, v and y of the shape (batch, height, width, heads, head_width), a map, or (batch, tokens, heads, head_width),
or with the sizes of any other map, where q and k come from the same positions. With `A(i)` the positions that position
i attends to,

    y_i = sum over j in A(i) of softmax_j(q_i k_j / sqrt(head_width)) v_j

restricted to those j for which `mask`, (batch, keys), is True; if none is left, y_i = 0. Only `Linear` has other
weights. Only `Global` and `Causal` accept a `bias`, (batch or 1, heads, queries, keys), which is added to the logits. A
new pattern defines `__call__`, and `check` and `keys` where they differ.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, check_integer

__all__ = ["Causal", "Global", "Linear", "Neighborhood", "Pattern", "Sizes", "Window"]

Sizes = tuple[int | None, ...]


class Pattern(Value):
    """Which positions attend to which: `pattern(q, k, v, mask) -> y` (see the module docstring)."""

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        """The attention output, of the shape of `q`."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raises a ValueError if (height, width) or (tokens,) is not possible; a size of None is unknown."""

    def keys(self, sizes: Sizes, head_width: int) -> int:
        """The number of keys per query, from which the cost of a call is computed."""
        return int(np.prod(sizes))


class Global(Pattern):
    """Every position attends to every position; the keys may also come from a context, (batch, tokens, ...).

    Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """

    def __call__(self, q, k, v, mask=None, bias=None):
        """The attention output, of the shape of `q`."""
        seen = None if mask is None else _in_line(mask)[:, None]
        return ops.reshape(backend.attention(*map(_flat, (q, k, v)), seen, bias), ops.shape(q))


class Causal(Pattern):
    """Every position attends to itself and to those before it, in raster order: A(i) = {j: j <= i}.

    Vaswani et al. (2017), section 3.1: the decoder; also CLIP's text encoder (Radford et al., "Learning Transferable
    Visual Models From Natural Language Supervision", 2021, section 2.4).
    """

    def __call__(self, q, k, v, mask=None, bias=None):
        """The attention output, of the shape of `q`."""
        at = ops.arange(math.prod(ops.shape(q)[1:-2]))
        seen = (at[:, None] >= at)[None]
        seen = seen if mask is None else seen & _in_line(mask)[:, None]
        y = backend.attention(*map(_flat, (q, k, v)), seen, bias)
        if mask is not None:
            y = ops.where(ops.any(seen, axis=-1)[..., None, None], y, 0)
        return ops.reshape(y, ops.shape(q))


class Linear(Pattern):
    """Every position attends to every position, at linear cost: `y = softmax(q) (softmax(k)^T v)`.

    The first softmax is over the channels of a head, the second over the positions. Shen et al., "Efficient Attention:
    Attention with Linear Complexities" (2021), section 3.
    """

    def __call__(self, q, k, v, mask=None):
        """The attention output, of the shape of `q`; computed in float32."""
        shape, dtype = ops.shape(q), q.dtype
        q, k, v = (ops.cast(_flat(x), "float32") for x in (q, k, v))
        if mask is not None:
            seen = _in_line(mask)[..., None, None]
            k, v = ops.where(seen, k, backend.HIDDEN), ops.where(seen, v, 0)
        summary = ops.einsum("bnhd,bnhe->bhde", ops.softmax(k, axis=1), v)
        y = ops.einsum("bnhd,bhde->bnhe", ops.softmax(q, axis=-1), summary)
        return ops.cast(ops.reshape(y, shape), dtype)

    def keys(self, sizes, head_width):
        """The channels per head."""
        return head_width


class _Axis(NamedTuple):
    """An axis of a map in tiles: indices of queries (tiles, n) and of keys (tiles, m), and the mask (tiles, n, m)."""

    queries: np.ndarray
    keys: np.ndarray
    seen: np.ndarray


class _Local(Pattern):
    """A pattern on maps that is a product over the axes: a rectangle of queries sees a part of one rectangle of keys.

    A tile is one dense attention with a mask, so that no keys are gathered per query.
    """

    def _axis(self, length: int) -> _Axis:
        raise NotImplementedError

    def __call__(self, q, k, v, mask=None):
        """The attention output, of the shape of `q`."""
        sizes = q.shape[1:-2]
        self.check(sizes)
        if None in sizes:
            raise ValueError(f"{type(self).__name__}: height and width must be known; received: {tuple(sizes)}")
        axes = [self._axis(size) for size in sizes]
        queries, keys = [axis.queries for axis in axes], [axis.keys for axis in axes]
        k, v = _tiled(k, keys), _tiled(v, keys)
        seen = _mask(axes, ops.shape(q)[0])
        if mask is not None:
            there = _tiled(ops.reshape(mask, (-1, *sizes, 1, 1)), keys)[:, None, :, 0, 0]
            seen = there if seen is None else there & seen
        y = backend.attention(_tiled(q, queries), k, v, seen)
        if mask is not None:
            y = ops.where(ops.any(seen, axis=-1)[..., None, None], y, 0)
        return _untiled(y, queries)

    def check(self, sizes):
        """Raises a ValueError unless `size` fits these sizes."""

    def keys(self, sizes, head_width):
        """`size` to the power of the number of axes."""
        return self.size ** len(sizes)


class Window(_Local):
    """Attention within windows of size x size, on a grid cyclically shifted down and right by `shift`. For tokens a
    window is `size` consecutive ones, for volumes size x size x size.

    Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021), section 3.2: blocks
    with shifts 0 and size / 2 alternate. A window that wraps around the border is masked into the parts that are
    contiguous on the map.

    Args:
        size: the side of a window, which must divide height and width.
        shift: the shift of the grid, from 0 to size - 1.
    """

    def __init__(self, size: int = 8, shift: int = 0):
        check_integer("Window", "size", size)
        check_integer("Window", "shift", shift, 0)
        if shift >= size:
            raise ValueError(f"Window: `shift` must be less than the size, {size}; received: {shift}")
        self.size = size
        self.shift = shift

    def check(self, sizes):
        """Raises a ValueError unless `size` divides height and width."""
        if any(length is not None and length % self.size for length in sizes):
            raise ValueError(f"Window: `size`, {self.size}, must divide height and width; received: {tuple(sizes)}")

    def _axis(self, length):
        at = ((np.arange(length) + self.shift) % length).reshape(-1, self.size)
        wrapped = at < self.shift
        return _Axis(at, at, wrapped[:, :, None] == wrapped[:, None, :])


class Neighborhood(_Local):
    """Each position attends to the size x size positions around it; at a border the square is moved inside. For tokens
    it is `size` consecutive ones, for volumes size x size x size.

    Hassani et al., "Neighborhood Attention Transformer" (2023), section 3.1.

    Args:
        size: the side of the square, an odd number, at most the height and the width.
    """

    def __init__(self, size: int = 7):
        check_integer("Neighborhood", "size", size)
        if size % 2 == 0:
            raise ValueError(f"Neighborhood: `size` must be odd; received: {size}")
        self.size = size

    def check(self, sizes):
        """Raises a ValueError unless `size` is at most the height and the width."""
        if any(length is not None and length < self.size for length in sizes):
            raise ValueError(
                f"Neighborhood: `size`, {self.size}, must be at most the height and width; received: {tuple(sizes)}"
            )

    def _axis(self, length):
        tile = min(_TILE, length)
        queries = np.minimum(np.arange(-(-length // tile) * tile), length - 1).reshape(-1, tile)
        first = np.clip(queries - self.size // 2, 0, length - self.size)  # first key of each query
        span = min(tile + self.size - 1, length)
        keys = np.minimum(first[:, :1], length - span) + np.arange(span)
        offset = keys[:, None, :] - first[:, :, None]
        return _Axis(queries, keys, (offset >= 0) & (offset < self.size))


# The side of a tile of `Neighborhood`: a query is multiplied by (_TILE + size - 1)^2 keys, of which size^2 count.
_TILE = 8


def _flat(x):
    """Flattens the positions of a map into one axis."""
    return ops.reshape(x, (ops.shape(x)[0], -1, *x.shape[-2:]))


def _in_line(mask):
    """The mask of a map or of tokens, as (batch, positions)."""
    return ops.reshape(mask, (ops.shape(mask)[0], -1))


def _tiled(x, indices):
    """Maps (batch, *sizes, heads, head_width) to (batch tiles, positions in a tile, heads, head_width).

    `indices` holds, for each axis, the positions of each tile, (tiles, length).
    """
    for axis, one in enumerate(indices, 1):
        x = _take(x, one.ravel(), axis)
    heads, split = x.shape[-2:], [length for one in indices for length in one.shape]
    n = len(indices)
    order = (0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1, 2 * n + 2)
    x = ops.transpose(ops.reshape(x, (-1, *split, *heads)), order)
    return ops.reshape(x, (-1, math.prod(split[1::2]), *heads))


def _untiled(y, indices):
    """The inverse of `_tiled`, for indices that contain each position once."""
    heads, tiles, lengths = y.shape[-2:], [len(one) for one in indices], [one.shape[1] for one in indices]
    n = len(indices)
    order = (0, *(axis for i in range(1, n + 1) for axis in (i, n + i)), 2 * n + 1, 2 * n + 2)
    y = ops.transpose(ops.reshape(y, (-1, *tiles, *lengths, *heads)), order)
    y = ops.reshape(y, (-1, *[one.size for one in indices], *heads))
    for axis, one in enumerate(indices, 1):
        y = _take(y, np.unique(one.ravel(), return_index=True)[1], axis)
    return y


def _take(x, indices, axis):
    """`ops.take`, without a copy if the indices are all positions in order."""
    if np.array_equal(indices, np.arange(x.shape[axis])):
        return x
    return ops.take(x, backend.tensor(indices, "int32"), axis=axis)


def _mask(axes, batch):
    """The mask, (batch tiles, queries, keys); None if it is all True."""
    seen = functools.reduce(np.kron, [axis.seen for axis in axes])  # the product of the masks of the axes
    if seen.all():
        return None
    tiles, queries, keys = seen.shape
    seen = backend.tensor(seen[None], "bool")
    return ops.reshape(ops.broadcast_to(seen, (batch, tiles, queries, keys)), (-1, queries, keys))
