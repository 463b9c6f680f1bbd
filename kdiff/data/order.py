"""The order of the images: every pass over them has its own, which the seed and the number of the pass say.

So training that goes on in another process can go on with the order that comes next.
"""

import numpy as np

from kdiff.data._tensorflow import tf

__all__ = ["Order"]


class Order:
    """Shuffles each pass over a dataset anew.

    Args:
        count: the elements of the dataset.
        buffer: how many of them the shuffle holds.
        seed: names the orders; `None` draws one.

    Attributes:
        passes: how many were begun, and so the number of the next. It may be set.
    """

    def __init__(self, count: int, buffer: int, seed: int | None):
        self.count, self.buffer = count, buffer
        self.seed = np.random.SeedSequence().entropy if seed is None else seed
        self.passes = 0

    def shuffled(self, dataset: tf.data.Dataset, repeat: int | None) -> tf.data.Dataset:
        """So many passes over the dataset; `None` is endless."""

        def one_pass(_):
            tf.compat.v1.get_default_graph().seed = None  # TensorFlow's own seed says nothing here; 0 would be an error
            seed = tf.ensure_shape(tf.numpy_function(self._next, [], tf.int64), ())
            return dataset.shuffle(self.buffer, seed, reshuffle_each_iteration=False)

        passes = tf.data.Dataset.range(2**62 if repeat is None else repeat).flat_map(one_pass)
        count = tf.data.INFINITE_CARDINALITY if repeat is None else repeat * self.count  # which flat_map does not know
        return passes.apply(tf.data.experimental.assert_cardinality(count))

    def _next(self) -> np.int64:
        """The seed of the pass that begins. It is asked for when the first element is."""
        (seed,) = np.random.SeedSequence([self.seed, self.passes]).generate_state(1, "uint64")
        self.passes += 1
        return np.int64(seed >> 1)
