"""Learned vectors, looked up by position, index or class label."""

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.blocks.base import Block, check_given
from kdiff.blocks.conditions import Condition
from kdiff.blocks.initializers import Normal

__all__ = ["LabelEmbedding", "LearnedEmbedding"]


class LearnedEmbedding(Block):
    """Learned vectors: for positions, `x + p`, or, with a `size`, for indices, `table[x]`.

    Positions fix the shape of the input except the batch size. An index outside 0 ... size - 1 raises a ValueError if
    its value is known (outside compiled code and on the CPU) and otherwise gives NaN, never another row.

    Args:
        size: the number of rows of the table; None for positions.
        width: of a row of the table; None for the width of `embed`. Positions have the width of the input.
        stddev: the standard deviation of the normal initialiser.
    """

    def __init__(self, size: int | None = None, width: int | None = None, stddev: float = 0.02, **kwargs):
        super().__init__(autocast=size is None, **kwargs)
        for name, value in {"size": size, "width": width}.items():
            if value is not None:
                check_integer("LearnedEmbedding", name, value)
        if size is None and width is not None:
            raise ValueError(f"LearnedEmbedding: `width` can only be given together with `size`; received: {width}")
        check_number("LearnedEmbedding", "stddev", stddev, 0)
        self.size = size
        self.width = width
        self.stddev = stddev

    def build(self, x_shape, embed_shape=None):
        """Creates the table, (size, width), or the positions, of the shape of `x` without the batch."""
        shape = tuple(x_shape[1:]) if self.size is None else (self.size, _width(self, embed_shape))
        if len(shape) < 2 or None in shape:
            raise ValueError(
                "LearnedEmbedding: `x` must be a map or tokens of known size unless `size` is given; "
                f"received the shape: {tuple(x_shape)}"
            )
        self.table = self.add_weight(shape=shape, initializer=Normal(self.stddev), name="table")

    def call(self, x, embed=None, context=None, training=None):
        """Maps a map or tokens to the same shape, or integers of any shape to (..., width)."""
        if self.size is not None:
            return _rows(self, x, self.size)
        if tuple(x.shape[1:]) != tuple(self.table.shape):
            raise ValueError(
                f"LearnedEmbedding: the positions have the shape {tuple(self.table.shape)}; "
                f"received: {tuple(x.shape[1:])}"
            )
        return x + ops.cast(self.table, x.dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """The shape of `x`, or (..., width) for indices."""
        return tuple(x_shape) if self.size is None else (*x_shape, _width(self, embed_shape))


class LabelEmbedding(Condition):
    """A vector for each class, and one for no class: `table[label]`.

    In training a label is dropped, that is, replaced by the null class `num_classes`, with probability `dropout`, so
    that the network also learns the unconditional distribution (Ho & Salimans, "Classifier-Free Diffusion Guidance",
    2022, algorithm 1). The null class exists if `dropout` is positive. A label out of range raises a ValueError if its
    value is known (outside compiled code and on the CPU) and otherwise gives NaN.

    Args:
        num_classes: labels are 0 ... num_classes - 1.
        width: the size of a vector; None for the width of `embed`, to which a network adds it.
        dropout: the probability of dropping a label in training.
        seed: for the dropout.
    """

    def __init__(self, num_classes: int, width: int | None = None, dropout: float = 0.0, seed: int = 0, **kwargs):
        super().__init__(dropout, seed, **kwargs)
        check_integer("LabelEmbedding", "num_classes", num_classes)
        if width is not None:
            check_integer("LabelEmbedding", "width", width)
        self.num_classes = num_classes
        self.width = width

    def build(self, x_shape, embed_shape=None):
        """Creates the table, (num_classes, width), with one more row for the null class."""
        self.table = self.add_weight(
            shape=(self.num_classes + (self.dropout > 0), _width(self, embed_shape)),
            initializer=Normal(0.02),
            name="table",
        )

    def encode(self, x, embed, training):
        """Maps labels (batch,) to (batch, width)."""
        self._check_shape(x.shape)
        return _rows(self, x, self.table.shape[0])

    @property
    def null(self):
        """The null class, `num_classes`; None without dropout."""
        return np.int32(self.num_classes) if self.dropout > 0 else None

    @staticmethod
    def _check_shape(shape) -> None:
        if len(shape) != 1:
            raise ValueError(
                f"LabelEmbedding: labels must have the shape (batch,), or (batch, 1); received: {tuple(shape)}. For "
                "one-hot vectors pass `labels.argmax(-1)`"
            )

    def rows(self, labels):
        """Labels with one row per example: shape (batch, 1), as in `keras.datasets`, becomes (batch,)."""
        return labels[:, 0] if len(labels.shape) == 2 and labels.shape[1] == 1 else labels

    def check(self, labels) -> None:
        """Raises a ValueError if a label is not a class of the table."""
        known = self.num_classes + (self.dropout > 0)
        if labels.size and not (labels.min() >= 0 and labels.max() < known):
            raise ValueError(f"Labels must be in 0..{known - 1}; received {labels.min()} to {labels.max()}")
        if np.any(labels != np.floor(labels)):
            raise ValueError(f"Labels must be integers; received {labels[labels != np.floor(labels)][0]}")

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, width)."""
        self._check_shape(x_shape)
        return (*x_shape, _width(self, embed_shape))


def _width(layer: Block, embed_shape) -> int:
    if layer.width is None:
        check_given(layer, "width", embed_shape, "or an `embed` from which it is inferred")
    return layer.width or embed_shape[-1]


def _rows(layer: Block, indices, size: int):
    """The rows of the table at `indices`; NaN for an index out of range."""
    known = backend.concrete(indices)
    if known is not None and not np.all((known >= 0) & (known < size) & (known == np.floor(known))):
        raise ValueError(
            f"{type(layer).__name__}: `x` must be integers in 0 ... {size - 1}; received: {np.unique(known)}"
        )
    indices = ops.cast(indices, "int32")
    rows = ops.take(ops.cast(layer.table, layer.compute_dtype), ops.clip(indices, 0, size - 1), axis=0)
    inside = ops.expand_dims((indices >= 0) & (indices < size), -1)
    return ops.where(inside, rows, ops.cast(float("nan"), rows.dtype))
