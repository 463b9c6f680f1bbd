"""The order of the images: each pass has its own, a function of the seed and the number of the pass.

So training that is resumed in another process continues with the next order.
"""

from collections.abc import Callable

import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["Order"]


class Order:
    """Shuffles a dataset, in a new order for each pass.

    Args:
        count: the number of elements of the dataset.
        buffer: the size of the shuffle buffer.
        seed: for the orders; `None` draws one.

    Attributes:
        passes: the number of passes begun, and so the index of the next. It may be set.
    """

    def __init__(self, count: int, buffer: int, seed: int | None):
        self.count, self.buffer = count, buffer
        self.seed = np.random.SeedSequence().entropy if seed is None else seed
        self.passes = 0

    def shuffled(self, dataset: Callable[[tf.Tensor], tf.data.Dataset], repeat: int | None) -> tf.data.Dataset:
        """`repeat` passes over the dataset, a function of the seed of each pass; `None` is endless."""

        def one_pass(_):
            tf.compat.v1.get_default_graph().seed = None  # ignores TensorFlow's global seed; 0 would be an error
            seed = tf.ensure_shape(tf.numpy_function(self._next, [], tf.int64), ())
            return dataset(seed).shuffle(self.buffer, seed, reshuffle_each_iteration=False)

        passes = tf.data.Dataset.range(2**62 if repeat is None else repeat).flat_map(one_pass)
        count = (
            tf.data.INFINITE_CARDINALITY if repeat is None else repeat * self.count
        )  # which `flat_map` does not know
        return passes.apply(tf.data.experimental.assert_cardinality(count))

    def _next(self) -> np.int64:
        """The seed of the pass that begins, evaluated when its first element is read."""
        (seed,) = np.random.SeedSequence([self.seed, self.passes]).generate_state(1, "uint64")
        self.passes += 1
        return np.int64(seed >> 1)
