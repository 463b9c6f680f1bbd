"""Conditions: what is known of an example, such as its class or a text, as a vector or as tokens.

A network has a layer for each condition, by its name. What the layer makes of it is added to `embed` if it is a vector,
(batch, dim), and is a part of `context` if it is tokens, (batch, tokens, dim):

    UNet.transformer(64, conditions={"label": LabelEmbedding(10, dropout=0.1), "text": TextEncoder()})

A `Condition` also says what stands for its absence: with probability `dropout` an example loses its condition in
training, so that the network learns the unconditional distribution too (Ho & Salimans, "Classifier-Free Diffusion
Guidance", 2022, algorithm 1), and guidance and `sample(text=None)` ask for it.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import check_integer, check_number
from kdiff.blocks.base import Block, apply_layer, build_layer, copy_layer, output_shape
from kdiff.blocks.initializers import Normal

DROPPING = 4  # the stream of random numbers, beside those of `kdiff.random`


class Condition(Block):
    """The base of the layers of conditions. A new one defines `encode`, and may define `null`, `prepare` and `check`.

    Which examples lose their condition in call number n of training depends on `seed` and n alone, so it is the same on
    every backend; conditions with one seed are lost together:

        dropped = uniform(fold((seed, n), 0, DROPPING), (batch,)) < dropout

    Args:
        dropout: the probability with which, in training, `null` takes the place of an example's condition.
        seed: of the dropping, less than 2^31.
        kwargs: `name` and `dtype`.
    """

    named = False

    def __init__(self, dropout: float = 0.0, seed: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_number(type(self).__name__, "dropout", dropout, 0, 1)
        check_integer(type(self).__name__, "seed", seed, 0)
        self.dropout = dropout
        self.seed = seed
        self._generator = keras.random.SeedGenerator(seed)

    @property
    def null(self) -> np.ndarray | None:
        """The input that stands for no condition, of the shape of one row; None if there is none."""
        return None

    def prepare(self, values: Any) -> np.ndarray:
        """On the host: from what people hold, such as strings, to the input of the layer, one row a value."""
        return np.asarray(values)

    def check(self, values: np.ndarray) -> None:
        """Raises a ValueError for prepared values, one row an example, that the layer does not take."""

    def encode(self, x, embed, training):
        """The input, some rows of which may be `null`, to a vector (batch, dim) or tokens (batch, tokens, dim)."""
        raise NotImplementedError

    def call(self, x, embed=None, context=None, training=None):
        """One row an example to (batch, dim) or (batch, tokens, dim)."""
        if training and self.dropout > 0:
            x = self._dropped(x)
        return self.encode(x, embed, training)

    def _dropped(self, x):
        null = self.null
        if null is None:
            raise ValueError(
                f"{type(self).__name__}: a `dropout` needs a `null`, which takes the place of what is lost"
            )
        key = random.fold(ops.cast(self._generator.next(), "int32"), 0, DROPPING)
        dropped = random.uniform(key, (ops.shape(x)[0],)) < self.dropout
        x = ops.cast(x, null.dtype)
        return ops.where(ops.reshape(dropped, (-1, *[1] * (len(x.shape) - 1))), ops.convert_to_tensor(null), x)


class OptionalCondition(Condition):
    """Numbers that may be absent: an embedding of an image, the tokens of a text that is encoded already, one number.

    A learned input stands for their absence, unless one is given. In data, a row of NaN is absent. A number becomes a
    vector by waves:

        OptionalCondition(MLPEmbedding(SinusoidalEmbedding(64), width=256))      # 256, the width of `embed`

    Args:
        layer: the layer, or its name, from a row of the input, or of what stands for it, to a vector or tokens; None
            for the input itself.
        absent: what stands for absence, an array of the shape of one row, such as the embedding of the empty text; None
            for a weight, which is learned.
        dropout, seed: as in `Condition`.

    Raises:
        ValueError: if a size of the input is not known, or `absent` has another shape.
    """

    def __init__(self, layer: Any = None, absent: Any = None, dropout: float = 0.1, seed: int = 0, **kwargs):
        super().__init__(dropout, seed, **kwargs)
        self.layer = None if layer is None else copy_layer(layer, name="layer", dtype=self.dtype_policy)
        self.absent = None if absent is None else np.asarray(absent, "float32")
        self._row: tuple | None = None

    def build(self, x_shape, embed_shape=None):
        """Makes the learned row, of the shape of one row of the input, and builds the layer."""
        row = tuple(x_shape[1:])
        if None in row or (self.absent is not None and self.absent.shape != row):
            wanted = "of known size" if self.absent is None else f"of the shape of `absent`, {self.absent.shape}"
            raise ValueError(f"{type(self).__name__}: a row of the input must be {wanted}; received: {row}")
        if self.absent is None:
            options = {"dtype": "float32", "autocast": False, "name": "absent"}
            self.learned = self.add_weight(shape=row, initializer=Normal(0.02), **options)
        if self.layer is not None:
            build_layer(self.layer, x_shape, embed_shape)
        self._row = row

    @property
    def null(self):
        """`absent`; NaN where it is learned, and None there before the shape of a row is known."""
        if self.absent is not None:
            return self.absent
        return None if self._row is None else np.full(self._row, np.nan, "float32")

    def check(self, values) -> None:
        """Raises a ValueError for a row that is not finite, unless it is all NaN and so absent."""
        rows = values.reshape(len(values), -1)
        known = np.isfinite(rows).all(axis=1)
        if self.absent is None:
            known |= np.isnan(rows).all(axis=1)
        if not known.all():
            absent = "" if self.absent is not None else ", or all NaN for a condition that is absent"
            raise ValueError(f"The rows of a condition must be finite{absent}; received: {values[~known][0]}")

    def encode(self, x, embed, training):
        """The layer's output; its input is the learned row where `x` is NaN."""
        x = ops.cast(x, "float32")
        if self.absent is None:
            axes = tuple(range(1, len(x.shape)))
            x = ops.where(ops.all(ops.isnan(x), axis=axes, keepdims=True), ops.convert_to_tensor(self.learned), x)
        if self.layer is None:
            return ops.cast(x, self.compute_dtype)
        return apply_layer(self.layer, x, embed, training=training)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """That of the layer's output."""
        return tuple(x_shape) if self.layer is None else output_shape(self.layer, x_shape, embed_shape)
