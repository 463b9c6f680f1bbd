"""Resizing of images: one matrix for each axis, the same on every backend.

    y_i = sum over j of w((j - c_i) / s) x_j, divided by the sum of the weights,    c_i = (i + 1/2) n / m - 1/2

from n pixels to m, with a kernel w, and s = max(1, n / m) with `antialias`, else 1: the convention of Pillow, and of
PyTorch with `antialias=True`.
"""

import functools
from typing import Any

import numpy as np
from keras import ops

from kdiff import backend

__all__ = ["FORMS", "resized"]


def resized(x: Any, sizes: tuple[int, ...], form: str = "bilinear", antialias: bool = True) -> Any:
    """Resizes (batch, *other sizes, channels) to (batch, *sizes, channels), in float32.

    Args:
        x: of any rank; its sizes must be known.
        sizes: the sizes of the result.
        form: one of `FORMS`.
        antialias: whether an image that is made smaller is low-pass filtered, in "bilinear" and "bicubic".
    """
    x = ops.cast(x, "float32")
    for axis, size in enumerate(sizes, 1):
        if x.shape[axis] != size:
            matrix = FORMS[form](x.shape[axis], size, antialias).astype("float32")
            x = ops.moveaxis(ops.matmul(ops.moveaxis(x, axis, -1), backend.tensor(matrix.T, "float32")), -1, axis)
    return x


def _interpolated(kernel, n, m, antialias):
    stretch = max(1.0, n / m) if antialias else 1.0
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    weights = kernel((np.arange(n) - centres[:, None]) / stretch)
    return weights / weights.sum(1, keepdims=True)


def _triangle(x):
    return np.maximum(0, 1 - np.abs(x))


def _cubic(x, a=-0.5):
    """Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981), equation 15."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _nearest(n, m, antialias):
    return np.eye(n)[np.floor((np.arange(m) + 0.5) * n / m).astype(int)]


def _area(n, m, antialias):
    """Each pixel is the mean of the area that it covers."""
    first, pixel = np.arange(m)[:, None] * n / m, np.arange(n)
    covered = np.minimum(first + n / m, pixel + 1) - np.maximum(first, pixel)
    return np.maximum(0, covered) * m / n


def _aligned(n, m, antialias):
    """Bilinear; the corner pixels keep their values (PyTorch's `align_corners`)."""
    return _triangle(np.arange(m)[:, None] * (n - 1) / max(1, m - 1) - np.arange(n))


# The resizing matrices: functions of (n, m, antialias) to an array (m, n).
FORMS = {
    "nearest": _nearest,
    "bilinear": functools.partial(_interpolated, _triangle),
    "bicubic": functools.partial(_interpolated, _cubic),
    "area": _area,
    "aligned": _aligned,
}
