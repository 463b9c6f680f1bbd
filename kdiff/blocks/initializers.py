"""Initial weights, drawn by NumPy.

After `keras.utils.set_random_seed` they are the same on every backend, which Keras' own are not; and JAX does not have
to compile a generator for the shape of every weight.
"""

import math
import random

import keras
import numpy as np
from keras import ops

from kdiff.base import Configurable

__all__ = ["GlorotUniform", "Normal"]


class _Initializer(Configurable, keras.initializers.Initializer):
    """Draws with a seed; None takes one that `keras.utils.set_random_seed` determines."""

    def _keep_seed(self, seed):
        self.seed = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape, dtype=None):
        """A tensor of this shape, the same at each call."""
        return ops.convert_to_tensor(self._draw(np.random.default_rng(self.seed), tuple(shape)), dtype or "float32")


class GlorotUniform(_Initializer):
    """Uniform in [-a, a], a = sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010, eq. 16).

    Args:
        seed: of the numbers; None takes one that `keras.utils.set_random_seed` determines.
    """

    def __init__(self, seed: int | None = None):
        self._keep_seed(seed)

    def _draw(self, generator, shape):
        positions = math.prod(shape[:-2])
        limit = math.sqrt(6.0 / (positions * (shape[-2] + shape[-1])))
        return generator.uniform(-limit, limit, shape)


class Normal(_Initializer):
    """Normal with this standard deviation.

    Args:
        stddev: the standard deviation.
        seed: of the numbers; None takes one that `keras.utils.set_random_seed` determines.
    """

    def __init__(self, stddev: float = 0.02, seed: int | None = None):
        self.stddev = stddev
        self._keep_seed(seed)

    def _draw(self, generator, shape):
        return self.stddev * generator.standard_normal(shape)
