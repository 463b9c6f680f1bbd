"""A token table to which rows can be added, and of which single rows can be trained while all others are frozen."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff.blocks.initializers import Normal
from kdiff.blocks.lookup import LearnedEmbedding

__all__ = ["Vocabulary"]


class Vocabulary(LearnedEmbedding):
    """`table[token]`, except for `learned` tokens, whose vectors are a separate weight during training:

        rows[token - first] if first <= token < first + count else table[token]

    So optimizers do not see the table, whose other rows weight decay and momentum would change, and it is not averaged.

    Args:
        size: the number of rows of the table.
        width: the width of a row.
        learned: (first, count) of the trained tokens; None for none.
        kwargs: as in `LearnedEmbedding`.
    """

    def __init__(self, size: int, width: int, learned: Sequence[int] | None = None, **kwargs):
        super().__init__(size, width, **kwargs)
        self.learned = None if learned is None else tuple(learned)
        self.rows = None

    def build(self, x_shape, embed_shape=None):
        """Creates the table, (size, width), and the rows of `learned`, (count, width)."""
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
        """Appends rows, (count, width), to the table, which becomes a new variable."""
        whole = np.concatenate([ops.convert_to_numpy(self.table), np.asarray(rows, "float32")])
        before, self.size = self.table, len(whole)
        self._tracker.unlock()
        self._untrack_variable(before)
        self.table = self.add_weight(shape=whole.shape, initializer="zeros", name="table")
        self._tracker.lock()
        self.table.assign(whole)
        self.table.trainable, self.table.averaged = before.trainable, getattr(before, "averaged", True)

    def learn(self, first: int, count: int) -> None:
        """Makes `count` rows from `first` on trainable, and no others."""
        self.learned = (first, count)
        self._make_rows()
        self.rows.assign(ops.convert_to_numpy(self.table)[first : first + count])

    def keep(self, rows: np.ndarray) -> None:
        """Ends the training and stores these rows, (count, width), in the table."""
        first, count = self.learned
        whole = ops.convert_to_numpy(self.table).copy()
        whole[first : first + count] = rows
        self.table.assign(whole)
        self._untrack_variable(self.rows)
        self.learned = self.rows = None

    def call(self, x, embed=None, context=None, training=None):
        """Maps integers of any shape to (..., width)."""
        y = super().call(x)
        if self.learned is None:
            return y
        first, count = self.learned
        at = ops.cast(x, "int32") - first
        rows = ops.take(ops.cast(self.rows, y.dtype), ops.clip(at, 0, count - 1), axis=0)
        return ops.where(ops.expand_dims((at >= 0) & (at < count), -1), rows, y)
