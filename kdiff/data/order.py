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
        repeat: the passes in an epoch; `None` is endless.
    """

    def __init__(self, count: int, buffer: int, seed: int | None, repeat: int | None):
        self.count, self.buffer, self.repeat = count, buffer, repeat
        self.seed = np.random.SeedSequence().entropy if seed is None else seed
        self.passes = 0  # that were begun

    def advance(self, epochs: int) -> None:
        """Goes on to the pass that would come after so many epochs; an endless dataset has none."""
        self.passes += epochs * (self.repeat or 0)

    def shuffled(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The dataset, shuffled and repeated."""

        def one_pass(_):
            seed = tf.ensure_shape(tf.numpy_function(self._next, [], tf.int64), ())
            return dataset.shuffle(self.buffer, seed, reshuffle_each_iteration=False)

        endless = self.repeat is None
        passes = tf.data.Dataset.range(2**62 if endless else self.repeat).flat_map(one_pass)
        count = tf.data.INFINITE_CARDINALITY if endless else self.repeat * self.count  # which flat_map does not know
        return passes.apply(tf.data.experimental.assert_cardinality(count))

    def _next(self) -> np.int64:
        """The seed of the pass that begins. It is asked for when the first element is."""
        (seed,) = np.random.SeedSequence([self.seed, self.passes]).generate_state(1, "uint64")
        self.passes += 1
        return np.int64(seed >> 1)
