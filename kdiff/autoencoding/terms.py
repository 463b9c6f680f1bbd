"""Reconstruction losses beyond the pixels that need no trained network.

    distance = term(x, y)      two batches of images in [-1, 1] -> (batch,)

Pixelwise losses alone give blurred pictures. These compare edges, frequency bands and local statistics.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Configurable, check_integer, check_number

__all__ = ["MSSSIM", "SCALES", "Gradients", "Laplacian", "Term"]


class Term(Configurable, keras.layers.Layer):
    """The base of loss terms. A subclass defines `call(x, y)`, which returns (batch,) and is 0 if x = y.

    Args:
        weight: the weight of the term in the loss of an autoencoder.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__(dtype="float32", autocast=False)
        check_number(type(self).__name__, "weight", weight, 0.0)
        self.weight = weight

    def call(self, x, y):
        """The distance of each image to its reconstruction."""
        raise NotImplementedError


class Gradients(Term):
    """The absolute error of the differences between neighbouring pixels, along height and width.

        mean |d_h x - d_h y| + mean |d_w x - d_w y|

    Mathieu et al., "Deep Multi-Scale Video Prediction Beyond Mean Square Error" (2016), equation 6, with signed
    differences.

    Args:
        weight: the weight of the term.
    """

    def call(self, x, y):
        error = x - y
        down = error[:, 1:] - error[:, :-1]
        right = error[:, :, 1:] - error[:, :, :-1]
        return _mean(ops.abs(down)) + _mean(ops.abs(right))


class Laplacian(Term):
    """The absolute error of each band of a Laplacian pyramid, and of the remaining low-resolution image.

        sum_j mean |L_j(x) - L_j(y)|,    L_j = G_j - up(G_(j+1)),    G_(j+1) = the average of each 2 x 2 pixels of G_j

    Burt & Adelson, "The Laplacian Pyramid as a Compact Image Code" (1983); as a loss Bojanowski et al., "Optimizing the
    Latent Space of Generative Networks" (2018), section 3.2.

    Args:
        levels: the number of bands; 2^levels must divide height and width.
        weight: the weight of the term.
    """

    def __init__(self, levels: int = 3, weight: float = 1.0):
        super().__init__(weight)
        check_integer("Laplacian", "levels", levels)
        self.levels = levels

    def call(self, x, y):
        if any(size is not None and size % 2**self.levels for size in x.shape[1:3]):
            raise ValueError(f"{self!r}: {2**self.levels} must divide height and width; received: {tuple(x.shape)}")
        rest, total = x - y, 0.0
        for _ in range(self.levels):
            half = backend.average_pool(rest)
            total = total + _mean(ops.abs(rest - backend.upsample_bilinear(half)))
            rest = half
        return total + _mean(ops.abs(rest))


# Exponents of the scales, from the finest (Wang et al. 2003).
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class MSSSIM(Term):
    """1 - MS-SSIM: means, variances and covariance in a Gaussian window, at several scales.

        1 - prod_j c_j^w_j l_J^w_J,    l = (2 m_x m_y + C1) / (m_x^2 + m_y^2 + C1),
                                       c = (2 s_xy + C2) / (s_x^2 + s_y^2 + C2)

    each averaged over the image, and clipped at 0. Wang et al., "Multiscale Structural Similarity for Image Quality
    Assessment" (2003), equation 7, with K1 = 0.01, K2 = 0.03 of a range of 2.

    Args:
        levels: the number of scales, up to five, whose exponents are normalised to sum to 1.
        window: the side of the window, at most the size of the coarsest image.
        sigma: its standard deviation.
        weight: the weight of the term.
    """

    def __init__(self, levels: int = 3, window: int = 7, sigma: float = 1.5, weight: float = 1.0):
        super().__init__(weight)
        check_integer("MSSSIM", "levels", levels)
        check_integer("MSSSIM", "window", window)
        check_number("MSSSIM", "sigma", sigma, 1e-6)
        if levels > len(SCALES):
            raise ValueError(f"MSSSIM: `levels` must be at most {len(SCALES)}; received: {levels}")
        self.levels, self.window, self.sigma = levels, window, sigma

    def call(self, x, y):
        factor = 2 ** (self.levels - 1)
        if any(size is not None and (size % factor or size // factor < self.window) for size in x.shape[1:3]):
            raise ValueError(
                f"{self!r}: height and width must be multiples of {factor} and at least {factor * self.window}; "
                f"received: {tuple(x.shape)}"
            )
        weights = np.array(SCALES[: self.levels]) / sum(SCALES[: self.levels])
        product = 1.0
        for level, weight in enumerate(weights):
            luminance, contrast = self._similarity(x, y)
            last = level == self.levels - 1
            value = _mean_of_map(luminance * contrast if last else contrast)
            product = product * ops.power(ops.maximum(value, 1e-6), float(weight))
            x, y = (x, y) if last else (backend.average_pool(x), backend.average_pool(y))
        return 1.0 - ops.mean(product, axis=-1)

    def _similarity(self, x, y):
        mean_x, mean_y = self._blurred(x), self._blurred(y)
        covariance = self._blurred(x * y) - mean_x * mean_y
        variances = self._blurred(x * x + y * y) - mean_x**2 - mean_y**2
        first, second = (0.01 * 2.0) ** 2, (0.03 * 2.0) ** 2
        luminance = (2.0 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
        return luminance, (2.0 * covariance + second) / (variances + second)

    def _blurred(self, x):
        """Window means, where the window is inside the image."""
        taps = np.exp(-0.5 * ((np.arange(self.window) - (self.window - 1) / 2) / self.sigma) ** 2)
        taps = (taps / taps.sum()).tolist()
        height, width = (size - self.window + 1 for size in ops.shape(x)[1:3])
        x = sum(tap * x[:, k : k + height] for k, tap in enumerate(taps))
        return sum(tap * x[:, :, k : k + width] for k, tap in enumerate(taps))


def _mean(x) -> Any:
    """The mean over all axes but the first."""
    return ops.mean(x, axis=tuple(range(1, len(x.shape))))


def _mean_of_map(x) -> Any:
    """The mean over positions, (batch, channels)."""
    return ops.mean(x, axis=(1, 2))
