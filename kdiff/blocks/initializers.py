"""Weight initialisers that draw with NumPy.

After `keras.utils.set_random_seed` their values are the same on every backend, unlike those of Keras' initialisers, and
JAX need not compile a generator for the shape of every weight.
"""

import math
import random

import keras
import numpy as np
from keras import ops

from kdiff.base import Configurable

__all__ = ["GlorotUniform", "Normal"]


class _Initializer(Configurable, keras.initializers.Initializer):
    """Draws with a seed; None derives one from `keras.utils.set_random_seed`."""

    def _keep_seed(self, seed):
        self.seed = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape, dtype=None):
        """A tensor of this shape, the same in each call."""
        return ops.convert_to_tensor(self._draw(np.random.default_rng(self.seed), tuple(shape)), dtype or "float32")


class GlorotUniform(_Initializer):
    """Uniform in [-a, a], a = sqrt(6 / (inputs + outputs)) (Glorot & Bengio, 2010, equation 16).

    Args:
        seed: for the values; None derives one from `keras.utils.set_random_seed`.
    """

    def __init__(self, seed: int | None = None):
        self._keep_seed(seed)

    def _draw(self, generator, shape):
        positions = math.prod(shape[:-2])
        limit = math.sqrt(6.0 / (positions * (shape[-2] + shape[-1])))
        return generator.uniform(-limit, limit, shape)


class Normal(_Initializer):
    """Normal with mean 0 and this standard deviation.

    Args:
        stddev: the standard deviation.
        seed: for the values; None derives one from `keras.utils.set_random_seed`.
    """

    def __init__(self, stddev: float = 0.02, seed: int | None = None):
        self.stddev = stddev
        self._keep_seed(seed)

    def _draw(self, generator, shape):
        return self.stddev * generator.standard_normal(shape)
