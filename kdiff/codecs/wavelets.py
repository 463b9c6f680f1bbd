"""Wavelets: an invertible transform to fewer positions with more channels."""

from typing import Any

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer
from kdiff.codecs.base import Codec, Shape, to_unit

__all__ = ["Haar", "haar"]


class Haar(Codec):
    """Images as the coefficients of an orthonormal Haar transform (Haar 1910; Mallat 1989):

        c = W b,   W W^T = I,        b a square of 2^depth x 2^depth pixels of one channel

    so that (height, width, channels) becomes (height / 2^depth, width / 2^depth, 4^depth channels), |c| = |b|, white
    noise stays white noise, and the likelihood is that of the pixels. The network sees 4^depth times fewer positions.
    The first coefficient of a square is its mean times 2^depth; the others are differences between halves, from the
    whole square down to neighbouring pixels. The coefficients of a channel are adjacent.

    Args:
        depth: the number of times that the size is halved; 0 is `Pixels`.

    Raises:
        ValueError: if 2^depth does not divide height and width.
    """

    limit = 1.0

    def __init__(self, depth: int = 1):
        super().__init__()
        check_integer("Haar", "depth", depth, 0)
        self.depth = depth
        self._matrix = haar(depth)

    def encode(self, examples, key: Any = None):
        x, side = to_unit(examples), 2**self.depth
        batch, height, width, channels = ops.shape(x)
        x = ops.reshape(x, (batch, height // side, side, width // side, side, channels))
        x = ops.reshape(ops.transpose(x, (0, 1, 3, 5, 2, 4)), (batch, height // side, width // side, channels, -1))
        x = ops.einsum("bhwcp,qp->bhwcq", x, backend.tensor(self._matrix, "float32"))
        return ops.reshape(x, (batch, height // side, width // side, channels * side**2))

    def decode(self, x):
        return ops.clip(self.images(x), -1.0, 1.0)

    def images(self, x):
        """The inverse transform."""
        side = 2**self.depth
        batch, height, width, channels = ops.shape(x)
        x = ops.reshape(x, (batch, height, width, channels // side**2, side**2))
        x = ops.einsum("bhwcq,qp->bhwcp", x, backend.tensor(self._matrix, "float32"))
        x = ops.transpose(ops.reshape(x, (batch, height, width, -1, side, side)), (0, 1, 4, 2, 5, 3))
        return ops.reshape(x, (batch, height * side, width * side, channels // side**2))

    def data_shape(self, shape: Shape) -> Shape:
        side = 2**self.depth
        if len(shape) != 3 or any(size is not None and size % side for size in shape[:2]):
            raise ValueError(
                f"{self!r}: images must have the shape (height, width, channels), with sizes divisible by "
                f"{side}; received: {tuple(shape)}"
            )
        height, width, channels = shape
        return (*(None if size is None else size // side for size in (height, width)), channels * side**2)


def haar(depth: int) -> np.ndarray:
    """W of `Haar`, float64, (4^depth, 4^depth), of the pixels of a square row by row.

    One level maps 2 x 2 pixels to their sum and three differences, each halved; the next applies to the sums.
    """
    if depth == 0:
        return np.ones((1, 1))
    half, side = 2 ** (depth - 1), 2**depth
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
    rows, columns = np.divmod(np.arange(4 ** (depth - 1)), half)
    bands = np.zeros((4, half**2, side**2))
    for place in range(4):
        pixels = (2 * rows + place // 2) * side + 2 * columns + place % 2
        bands[:, np.arange(half**2), pixels] = signs[:, place, None]
    return np.concatenate([haar(depth - 1) @ bands[0], *bands[1:]])
