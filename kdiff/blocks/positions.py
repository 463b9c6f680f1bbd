"""Position encodings: sinusoidal features added to a map, or rotary. `LearnedEmbedding()` has learned ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, check_integer, check_number
from kdiff.blocks.base import Block, check_map

__all__ = ["PositionTable", "RelativePositions", "Rotary", "SinCos2D"]


class SinCos2D(Block):
    """Sinusoidal position encoding of column and row: `x + [sin(f u), cos(f u), sin(f v), cos(f v)]`.

    With u the column and v the row, each part has a quarter of the channels, and `f_i = max_period^(-i / quarter)`, i =
    0 ... quarter - 1: the order of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022), and of Peebles
    & Xie, "Scalable Diffusion Models with Transformers" (2022), in which columns come first. With a `base_size` the map
    spans 0 ... base_size in either direction, whatever its size: `u = column * base_size / width /
    interpolation_scale`. A series or a volume has one part per axis, the last axis first.

    Args:
        max_period: the period, divided by 2 pi, of the lowest frequency.
        base_size: the size to which positions are rescaled; None for positions 0, 1, 2, ...
        interpolation_scale: divides the positions.

    Raises:
        ValueError: if the channels are not a multiple of 4(series: 2; volumes: 6).
    """

    def __init__(
        self,
        max_period: float = 10000.0,
        base_size: float | None = None,
        interpolation_scale: float = 1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_number("SinCos2D", "max_period", max_period, 1)
        for name, value in {"base_size": base_size, "interpolation_scale": interpolation_scale}.items():
            if value is not None:
                check_number("SinCos2D", name, value, 1e-6)
        self.max_period = max_period
        self.base_size = base_size
        self.interpolation_scale = interpolation_scale

    def build(self, x_shape):
        """Checks the channels."""
        check_map(self, x_shape)
        parts = 2 * (len(x_shape) - 2)
        if x_shape[-1] % parts:
            raise ValueError(f"SinCos2D: the channels of `x` must be a multiple of {parts}; received: {x_shape[-1]}")

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to the same shape."""
        _, *sizes, channels = ops.shape(x)
        axes, own, waves = len(sizes), channels // len(sizes), 0.0
        for axis, size in enumerate(sizes):
            others = [own * (axes - 1 - axis), own * axis]  # the axes that follow it come before it
            one = ops.pad(self._waves(size, own), [[0, 0], others])
            waves = waves + ops.reshape(one, (size, *[1] * (axes - 1 - axis), channels))
        return x + ops.cast(waves, x.dtype)

    def _waves(self, length, channels):
        """[sin, cos] for the positions along one axis, (length, channels)."""
        frequencies = float(self.max_period) ** (-np.arange(channels // 2) / (channels // 2)) / self.interpolation_scale
        at = ops.arange(length, dtype="float32")
        at = at if self.base_size is None else at * (self.base_size / ops.cast(length, "float32"))
        angles = at[:, None] * backend.tensor(frequencies, "float32")
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)


class PositionTable(Block):
    """The encoding of `SinCos2D` in a table of size x size positions, of which a map uses the central part:

        x_ij + table[(size - height) // 2 + i, (size - width) // 2 + j]

    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), section 5.3.2, so
    that one network supports any aspect ratio. The table is stored with the weights, in float32, as in the files of
    Stable Diffusion 3; it is not trained.

    Args:
        size: the side of the table, the maximum height and width of a map.
        base_size: positions span 0 ... base_size over the table; None for `size`.
        max_period: as in `SinCos2D`.

    Raises:
        ValueError: if `x` is larger than the table or not a map, or its channels are not a multiple of 4.
    """

    def __init__(self, size: int = 192, base_size: float | None = None, max_period: float = 10000.0, **kwargs):
        super().__init__(**kwargs)
        check_integer("PositionTable", "size", size)
        check_number("PositionTable", "max_period", max_period, 1)
        if base_size is not None:
            check_number("PositionTable", "base_size", base_size, 1e-6)
        self.size = size
        self.base_size = base_size
        self.max_period = max_period

    def build(self, x_shape):
        """Creates the table, (size, size, channels)."""
        if len(x_shape) != 4 or x_shape[-1] is None or x_shape[-1] % 4:
            raise ValueError(
                "PositionTable: `x` must be a map (batch, height, width, channels), with channels that are a multiple "
                f"of 4; received the shape: {tuple(x_shape)}"
            )
        self._check_size(x_shape)
        options = {"trainable": False, "dtype": "float32", "autocast": False, "name": "table"}
        self.table = self.add_weight(shape=(self.size, self.size, x_shape[-1]), initializer=self._waves, **options)
        self.table.averaged = False

    def _check_size(self, shape):
        if any(size is not None and size > self.size for size in shape[1:3]):
            raise ValueError(
                f"PositionTable: the map must be at most {self.size} x {self.size}, the size of the table; received "
                f"the shape: {tuple(shape)}"
            )

    def _waves(self, shape, dtype=None):
        quarter, base = shape[-1] // 4, self.base_size or self.size
        angles = np.outer(np.arange(self.size) * (base / self.size), self.max_period ** (-np.arange(quarter) / quarter))
        one = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        shape = (self.size, self.size, 2 * quarter)
        columns, rows = np.broadcast_to(one[None], shape), np.broadcast_to(one[:, None], shape)
        return ops.convert_to_tensor(np.concatenate([columns, rows], axis=-1), dtype or "float32")

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to the same shape."""
        self._check_size(x.shape)
        height, width = ops.shape(x)[1:3]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        return x + ops.cast(self.table[top : top + height, left : left + width], x.dtype)


class RelativePositions(Value):
    """A transformation of queries and keys that makes their product depend on positions: `positions(x) -> x`."""

    def __call__(self, x: Any) -> Any:
        """Maps (batch, height, width, heads, head_width) or (batch, tokens, heads, head_width) to the same shape."""
        raise NotImplementedError

    def check(self, axes: int, head_width: int) -> None:
        """Raises a ValueError if it does not support this head width on maps (2 axes) or tokens (1 axis)."""


class Rotary(RelativePositions):
    """Pairs of channels rotated by the position, so that q k depends only on the difference of two positions.

        (a, b) -> (a cos(f u) - b sin(f u), a sin(f u) + b cos(f u))

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2; on maps, axis by
    axis, Heo et al., "Rotary Position Embedding for Vision Transformer" (2024), section 3, and Crowson et al.,
    "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers" (2024).
    With n frequencies, of the channels of a head

    - on maps the first 2n rotate with the row, u = 0 ... height - 1, and the next 2n with the column;
    - on tokens the first 2n rotate with the index;
    - in each group of 2n, channels i and n + i are the pair (a, b) of frequency f_i;
    - the remaining channels are unchanged.

    Args:
        max_period: the period, divided by 2 pi, of the lowest frequency: `f_i = max_period^(-i / n)`, with n such that
            all channels rotate. RoFormer uses 10000 for tokens, Heo et al. 100 for maps.
        frequencies: the angles per unit of position, in place of those.

    Raises:
        ValueError: if the channels of a head are not a multiple of 4 (maps) or 2 (tokens), or fewer than `frequencies`
            needs.
    """

    def __init__(self, max_period: float = 100.0, frequencies: Sequence[float] | None = None):
        check_number("Rotary", "max_period", max_period, 1)
        self.max_period = max_period
        self.frequencies = None if frequencies is None else [float(f) for f in frequencies]

    def check(self, axes, head_width):
        """Raises a ValueError if the pairs do not fit in a head."""
        if self.frequencies is None and head_width % (2 * axes):
            raise ValueError(f"Rotary: the channels of a head must be a multiple of {2 * axes}; received: {head_width}")
        if self.frequencies is not None and 2 * axes * len(self.frequencies) > head_width:
            raise ValueError(
                f"Rotary: {len(self.frequencies)} `frequencies` need {2 * axes * len(self.frequencies)} channels of a "
                f"head; received heads of {head_width}"
            )

    def __call__(self, x):
        """Rotates a map or tokens in heads; computed in float32."""
        axes, width = len(x.shape) - 3, x.shape[-1]
        self.check(axes, width)
        frequencies = self._frequencies(width // (2 * axes))
        n = frequencies.shape[0]
        *pairs, rest = ops.split(ops.cast(x, "float32"), [2 * n * (axis + 1) for axis in range(axes)], axis=-1)
        turned = [_rotate(part, self._angles(x, axis, frequencies)) for axis, part in enumerate(pairs)]
        return ops.cast(ops.concatenate([*turned, rest], axis=-1), x.dtype)

    def _frequencies(self, n):
        waves = float(self.max_period) ** (-np.arange(n) / n) if self.frequencies is None else self.frequencies
        return backend.tensor(waves, "float32")

    def _angles(self, x, axis, frequencies):
        """The angles along one axis, shaped to broadcast over the following axes and the heads."""
        at = ops.arange(ops.shape(x)[1 + axis], dtype="float32")
        following = len(x.shape) - 3 - axis
        return ops.reshape(at, (-1, *[1] * following, 1)) * frequencies


def _rotate(x, angles):
    a, b = ops.split(x, 2, axis=-1)
    cos, sin = ops.cos(angles), ops.sin(angles)
    return ops.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
