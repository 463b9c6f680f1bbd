"""Vector quantisation: each vector is replaced by the nearest code of a codebook."""

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import ConfigurableLayer

__all__ = ["Codebook"]


class Codebook(ConfigurableLayer, keras.layers.Layer):
    """The nearest code of each vector, with a straight-through gradient.

        index = argmin_k |x - code_k|^2,    y = x + stop_gradient(code_index - x)

    van den Oord et al., "Neural Discrete Representation Learning" (2017), equations 1 and 2. The codes receive a
    gradient only from `lookup`, not from `y`. Codes and distances are float32 at any precision.

    Args:
        codes: the number of codes.
        kwargs: `name` and `dtype`.
    """

    def __init__(self, codes: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("Codebook", "codes", codes)
        self.codes = codes

    def build(self, x_shape):
        """Creates the `table`, (codes, channels), initialised uniformly in [-1 / codes, 1 / codes]."""
        if self.built:
            return
        initializer = keras.initializers.RandomUniform(-1.0 / self.codes, 1.0 / self.codes)
        self.table = self.add_weight(
            shape=(self.codes, x_shape[-1]), initializer=initializer, dtype="float32", name="table"
        )

    def lookup(self, indices):
        """The codes with these indices, (..., channels)."""
        return ops.take(self.table, indices, axis=0)

    def call(self, x):
        """Maps (batch, ..., channels) to (y, index), of the same shape and (batch, ...)."""
        x, table = ops.cast(x, "float32"), ops.convert_to_tensor(self.table)
        distance = ops.sum(ops.square(table), axis=-1) - 2.0 * ops.matmul(
            x, ops.transpose(table)
        )  # without |x|^2, which is the same for all codes
        index = ops.argmin(distance, axis=-1)
        return x + ops.stop_gradient(self.lookup(index) - x), index
