"""A codebook: for each vector the nearest of a number of codes."""

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import ConfigurableLayer

__all__ = ["Codebook"]


class Codebook(ConfigurableLayer, keras.layers.Layer):
    """The nearest code of each vector, with a gradient that passes straight through to the vector.

        index = argmin_k |x - code_k|^2,    y = x + stop_gradient(code_index - x)

    van den Oord et al., "Neural Discrete Representation Learning" (2017), equations 1 and 2. The codes get no gradient
    from `y`, only from `lookup`. Codes and distances are float32 whatever the precision.

    Args:
        codes: their number.
        kwargs: `name` and `dtype`.
    """

    def __init__(self, codes: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("Codebook", "codes", codes)
        self.codes = codes

    def build(self, x_shape):
        """Makes the `table`, (codes, channels), uniform in [-1 / codes, 1 / codes] at first."""
        if self.built:
            return
        initializer = keras.initializers.RandomUniform(-1.0 / self.codes, 1.0 / self.codes)
        self.table = self.add_weight(
            shape=(self.codes, x_shape[-1]), initializer=initializer, dtype="float32", name="table"
        )

    def lookup(self, indices):
        """The codes with these numbers, (..., channels)."""
        return ops.take(self.table, indices, axis=0)

    def call(self, x):
        """(batch, ..., channels) to (y, index): the same shape, and (batch, ...)."""
        x, table = ops.cast(x, "float32"), ops.convert_to_tensor(self.table)
        distance = ops.sum(ops.square(table), axis=-1) - 2.0 * ops.matmul(x, ops.transpose(table))  # less |x|^2
        index = ops.argmin(distance, axis=-1)
        return x + ops.stop_gradient(self.lookup(index) - x), index
