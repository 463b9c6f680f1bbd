"""The table of an encoder's tokens, which may get new rows, and of which some may learn while all others stay."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff.blocks.embeddings import LearnedEmbedding
from kdiff.blocks.initializers import Normal

__all__ = ["Vocabulary"]


class Vocabulary(LearnedEmbedding):
    """`table[token]`, but for `learned` tokens, whose vectors are a weight of their own while they learn:

        rows[token - first] if first <= token < first + count else table[token]

    So no optimizer sees the table, whose other rows would move by decay and by moments of theirs, and no average is of
    it.

    Args:
        size: the number of rows of the table.
        width: of a row.
        learned: (first, count) of the tokens that learn; None for none.
        kwargs: as of `LearnedEmbedding`.
    """

    def __init__(self, size: int, width: int, learned: Sequence[int] | None = None, **kwargs):
        super().__init__(size, width, **kwargs)
        self.learned = None if learned is None else tuple(learned)
        self.rows = None

    def build(self, x_shape, embed_shape=None):
        """Makes the table, (size, width), and the rows of `learned`, (count, width)."""
        super().build(x_shape, embed_shape)
        if self.learned is not None:
            self._make_rows()

    def _make_rows(self):
        options = {"shape": (self.learned[1], self.width), "initializer": Normal(self.stddev), "name": "rows"}
        self._tracker.unlock()
        self.rows = self.add_weight(**options)
        self._tracker.lock()
        self.rows.adapts = True

    def extend(self, rows: np.ndarray) -> None:
        """Puts rows, (count, width), after those of the table, which is another variable then."""
        whole = np.concatenate([ops.convert_to_numpy(self.table), np.asarray(rows, "float32")])
        before, self.size = self.table, len(whole)
        self._tracker.unlock()
        self._untrack_variable(before)
        self.table = self.add_weight(shape=whole.shape, initializer="zeros", name="table")
        self._tracker.lock()
        self.table.assign(whole)
        self.table.trainable, self.table.averaged = before.trainable, getattr(before, "averaged", True)

    def learn(self, first: int, count: int) -> None:
        """Lets `count` rows from `first` on learn, and no others."""
        self.learned = (first, count)
        self._make_rows()
        self.rows.assign(ops.convert_to_numpy(self.table)[first : first + count])

    def keep(self, rows: np.ndarray) -> None:
        """Ends this: the table has these rows, (count, width), in place of those that learned."""
        first, count = self.learned
        whole = ops.convert_to_numpy(self.table).copy()
        whole[first : first + count] = rows
        self.table.assign(whole)
        self._untrack_variable(self.rows)
        self.learned = self.rows = None

    def call(self, x, embed=None, context=None, training=None):
        """Whole numbers of any shape to (..., width)."""
        y = super().call(x)
        if self.learned is None:
            return y
        first, count = self.learned
        at = ops.cast(x, "int32") - first
        rows = ops.take(ops.cast(self.rows, y.dtype), ops.clip(at, 0, count - 1), axis=0)
        return ops.where(ops.expand_dims((at >= 0) & (at < count), -1), rows, y)
