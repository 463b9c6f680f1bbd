"""Codecs of vectors, tables and series: numbers of any scale as numbers of mean 0 and variance 1."""

from typing import Any, Self

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.codecs.base import Codec, Shape

__all__ = ["Standard", "Transformed"]


class Standard(Codec):
    """Numbers to mean 0 and standard deviation 1, and back, as schedules and networks expect them:

        x = (examples - mean) / std,        examples = mean + std x.

    Args:
        mean: a number, or an array that broadcasts against an example, such as (channels,).
        std: the same, above 0.

    Raises:
        ValueError: if a number is not finite, or `std` not above 0.
    """

    def __init__(self, mean: Any = 0.0, std: Any = 1.0):
        super().__init__()
        self.mean, self.std = (np.asarray(ops.convert_to_numpy(value), "float32") for value in (mean, std))
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError(f"Standard: `mean` must be finite, and `std` above 0; received: {mean!r} and {std!r}")

    @classmethod
    def fitted(cls, examples: Any) -> Self:
        """With the mean and standard deviation of each channel of these examples, (count, ..., channels); NaN, for what
        is missing, does not count. A channel that is always the same is only shifted.
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
    """Numbers by a fitted transformer of scikit-learn, or anything with its `transform` and `inverse_transform`, which
    takes (rows, channels): the positions of a series are rows.

        Transformed(sklearn.preprocessing.QuantileTransformer(output_distribution="normal").fit(table))

    It runs in NumPy, within compiled training too. It is not saved with the model, for that would be a pickle: after
    loading, `model.codec = Transformed(transformer)`. Where the transformer is slow, encode the data once, and give
    `fit({"encoded": codec.encode(table)})`.

    Args:
        transformer: fitted.
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
        """The function of rows as one of arrays of any rank, float32."""
        return lambda x: np.asarray(function(x.reshape(-1, x.shape[-1])), "float32").reshape(*x.shape[:-1], -1)

    def get_config(self) -> dict[str, Any]:
        """What it was, in words: nothing is made of it."""
        return {"transformer": repr(self.transformer)}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.transformer is self.transformer

    __hash__ = Codec.__hash__

    def __reduce__(self):
        return type(self), (self.transformer,)
