"""Codecs of vectors, tables and series: data of any scale normalised to mean 0 and variance 1."""

from typing import Any, Self

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.codecs.base import Codec, Shape

__all__ = ["Standard", "Transformed"]


class Standard(Codec):
    """Data normalised to mean 0 and standard deviation 1, as schedules and networks expect:

        x = (examples - mean) / std,        examples = mean + std x.

    Args:
        mean: a number, or an array that broadcasts against an example, such as (channels,).
        std: the same, positive.

    Raises:
        ValueError: if a number is not finite, or `std` not positive.
    """

    def __init__(self, mean: Any = 0.0, std: Any = 1.0):
        super().__init__()
        self.mean, self.std = (np.asarray(ops.convert_to_numpy(value), "float32") for value in (mean, std))
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError(f"Standard: `mean` must be finite and `std` positive; received: {mean!r} and {std!r}")

    @classmethod
    def fitted(cls, examples: Any) -> Self:
        """A codec with the mean and standard deviation of each channel of these examples, (count, ..., channels),
        without missing values (NaN). A constant channel is only shifted.
        """
        examples = np.asarray(examples, "float64")
        axes = tuple(range(examples.ndim - 1))
        std = np.nanstd(examples, axis=axes)
        return cls(np.nanmean(examples, axis=axes), np.where(std > 0, std, 1.0))

    def encode(self, examples, key: Any = None):
        mean, std = backend.tensor(self.mean, "float32"), backend.tensor(self.std, "float32")
        return (ops.cast(examples, "float32") - mean) / std

    def decode(self, x):
        return backend.tensor(self.mean, "float32") + backend.tensor(self.std, "float32") * x


class Transformed(Codec):
    """Data transformed by a fitted transformer of scikit-learn, or an object with the same `transform` and
    `inverse_transform` of (rows, channels); the positions of a series are rows.

        Transformed(sklearn.preprocessing.QuantileTransformer(output_distribution="normal").fit(table))

    It runs in NumPy, also within compiled training. It is not saved with the model, as that would need a pickle: after
    loading, set `model.codec = Transformed(transformer)`. If the transformer is slow, encode the data once, and use
    `fit({"encoded": codec.encode(table)})`.

    Args:
        transformer: a fitted transformer.
    """

    saved = False

    def __init__(self, transformer: Any):
        super().__init__()
        if not (hasattr(transformer, "transform") and hasattr(transformer, "inverse_transform")):
            raise TypeError(f"Transformed: a fitted transformer with an inverse is expected; received: {transformer!r}")
        self.transformer = transformer

    def encode(self, examples, key: Any = None):
        examples = ops.cast(examples, "float32")
        return backend.by_numpy(self._by(self.transformer.transform), examples, self.data_shape(examples.shape[1:]))

    def decode(self, x):
        shape = self._by(self.transformer.inverse_transform)(np.zeros((1, *x.shape[1:]), "float32")).shape[1:]
        return backend.by_numpy(self._by(self.transformer.inverse_transform), x, shape)

    def data_shape(self, shape: Shape) -> Shape:
        one = self._by(self.transformer.transform)(np.zeros((1, shape[-1]), "float32"))
        return (*shape[:-1], one.shape[-1])

    @staticmethod
    def _by(function):
        """A function of rows as a function of arrays of any rank, float32."""
        return lambda x: np.asarray(function(x.reshape(-1, x.shape[-1])), "float32").reshape(*x.shape[:-1], -1)

    def get_config(self) -> dict[str, Any]:
        """A description of the transformer, from which it cannot be rebuilt."""
        return {"transformer": repr(self.transformer)}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.transformer is self.transformer

    __hash__ = Codec.__hash__

    def __reduce__(self):
        return type(self), (self.transformer,)
