"""Numbers, positions and labels as vectors.

Time embeddings read their input in float32 under any precision: in bfloat16 a time of 999 would be 1000.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_choice, check_integer, check_number
from kdiff.blocks.base import Block, build_layer, check_given, copy_layer, kernel_initializer
from kdiff.blocks.conditions import Condition, Input
from kdiff.blocks.initializers import Normal
from kdiff.blocks.layers import Dense

__all__ = [
    "FourierEmbedding",
    "GuidanceEmbedding",
    "LabelEmbedding",
    "LearnedEmbedding",
    "MLPEmbedding",
    "SinusoidalEmbedding",
    "SizeWaves",
]


class SinusoidalEmbedding(Block):
    """A number as cosines and sines of falling frequency: `[cos(scale t f_i), sin(scale t f_i)]`.

    `f_i = max_period^(-i / (half - shift))` for i = 0 ... half - 1, with `half = width // 2`; an odd width ends in a
    zero. The two conventions of the literature:

    - `shift=0`, cosines first: Dhariwal & Nichol's ADM, Stable Diffusion, DiT. The default.
    - `shift=1, sine_first=True`: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), after Vaswani et al.,
      "Attention Is All You Need" (2017), section 3.5.

    Args:
        width: the size of the embedding, at least 2.
        max_period: the period, over 2 pi, of the slowest wave.
        scale: multiplies the input, which should span some hundreds: 1000 for a time in [0, 1].
        sine_first: whether the sines come before the cosines.
        shift: taken from the denominator of the exponent.
        offset: added to the scaled input: `[cos((scale t + offset) f_i), ...]`. With the scale T and -1 the number of a
            step, T t - 1, is seen.
    """

    def __init__(
        self,
        width: int,
        max_period: float = 10000.0,
        scale: float = 1.0,
        sine_first: bool = False,
        shift: float = 0.0,
        offset: float = 0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        check_integer("SinusoidalEmbedding", "width", width, 2)
        check_number("SinusoidalEmbedding", "max_period", max_period, 1)
        if not width // 2 > shift:
            raise ValueError(
                f"SinusoidalEmbedding: `shift` must be less than half the width, {width // 2}; received: {shift!r}"
            )
        self.width = width
        self.max_period = max_period
        self.scale = scale
        self.sine_first = sine_first
        self.shift = shift
        self.offset = offset
        half = width // 2
        self._frequencies = scale * float(max_period) ** (-np.arange(half) / (half - shift))

    def call(self, x, embed=None, context=None, training=None):
        """Numbers of any shape, (batch,) as a rule, to (..., width)."""
        x = x if self.offset == 0 else ops.cast(x, "float32") + self.offset / self.scale
        waves = _waves(x, self._frequencies.astype("float32"), self.sine_first)
        odd = [[0, 0]] * len(x.shape) + [[0, self.width % 2]]
        return ops.cast(ops.pad(waves, odd) if self.width % 2 else waves, self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        return (*x_shape, self.width)


class SizeWaves(SinusoidalEmbedding):
    """Waves of the numbers by which Stable Diffusion XL knows sizes (Podell et al., "SDXL", 2023, section 2.2):

        6 numbers    height and width of the original, top and left of the crop, height and width of the target
        5 numbers    height and width of the original, top and left of the crop, an aesthetic score: the refiner's

    Where none are given to `sample`, they are those of the samples, in pixels, with no crop, and a score of 6.

    Args:
        width: of the embedding of each number.
        numbers: 6 or 5.
        max_period, scale, sine_first, shift: as of `SinusoidalEmbedding`.
    """

    def __init__(
        self,
        width: int,
        numbers: int = 6,
        max_period: float = 10000.0,
        scale: float = 1.0,
        sine_first: bool = False,
        shift: float = 0.0,
        **kwargs,
    ):
        super().__init__(width, max_period, scale, sine_first, shift, **kwargs)
        check_choice("SizeWaves", "numbers", numbers, (5, 6))
        self.numbers = numbers

    def default(self, sizes: tuple[int, ...]) -> np.ndarray:
        """The numbers of a sample of this height and width."""
        end = [*sizes] if self.numbers == 6 else [6.0]
        return np.array([*sizes, 0.0, 0.0, *end], "float32")


class FourierEmbedding(Block):
    """A number as waves of random, fixed frequency: `[cos(2 pi f_i t), sin(2 pi f_i t)]`, `f_i ~ N(0, scale^2)`.

    Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020), equation 5; as Karras et al.
    (EDM, 2022) use it for log-sigma, and, with scale 16 and the sines first, Song et al. (NCSN++, 2021). The
    frequencies are a weight that is not trained, so they are saved with the model. They are the same on every backend.

    Args:
        width: the size of the embedding, an even number.
        scale: the standard deviation of the frequencies.
        sine_first: whether the sines come before the cosines.
        seed: of the frequencies.
    """

    def __init__(self, width: int, scale: float = 1.0, sine_first: bool = False, seed: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("FourierEmbedding", "width", width, 2)
        check_integer("FourierEmbedding", "seed", seed, 0)
        if width % 2:
            raise ValueError(f"FourierEmbedding: `width` must be even; received: {width!r}")
        self.width = width
        self.scale = scale
        self.sine_first = sine_first
        self.seed = seed

    def build(self, x_shape):
        """Draws the frequencies, (width / 2,)."""
        drawn = self.scale * np.random.default_rng(self.seed).standard_normal(self.width // 2)
        self.frequencies = self.add_weight(
            shape=drawn.shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(drawn, dtype=dtype),
            dtype="float32",
            autocast=False,
            trainable=False,
            name="frequencies",
        )

    def call(self, x, embed=None, context=None, training=None):
        """Numbers of any shape, (batch,) as a rule, to (..., width)."""
        waves = _waves(x, 2 * np.pi * ops.convert_to_tensor(self.frequencies), self.sine_first)
        return ops.cast(waves, self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        return (*x_shape, self.width)


def _waves(x, frequencies, sine_first: bool):
    angles = ops.expand_dims(ops.cast(x, "float32"), -1) * backend.tensor(frequencies, "float32")
    pair = [ops.cos(angles), ops.sin(angles)]
    return ops.concatenate(pair[::-1] if sine_first else pair, axis=-1)


class MLPEmbedding(Block):
    """An embedding with two dense layers after it: `W2 activation(W1 embedding(t) + b1) + b2`.

    Ho et al. (2020), appendix B, and every U-Net since. No activation follows: each block applies its own.

    Args:
        embedding: the layer that makes a vector of the number, such as `SinusoidalEmbedding(64)`.
        width: of both dense layers; None for four times that of the embedding.
        activation: between the two.
    """

    def __init__(self, embedding: keras.layers.Layer, width: int | None = None, activation: Any = "silu", **kwargs):
        super().__init__(autocast=False, **kwargs)
        if width is not None:
            check_integer("MLPEmbedding", "width", width)
        self.embedding = copy_layer(embedding, name="embedding", dtype=self.dtype_policy)
        self.width = width
        self.activation = activation

    def build(self, x_shape):
        """Builds the embedding and the dense layers."""
        shape = build_layer(self.embedding, x_shape)
        width = self.width or 4 * shape[-1]
        options = {"dtype": self.dtype_policy}
        self.hidden = Dense(width, self.activation, kernel_initializer=kernel_initializer(), **options)
        self.output_layer = Dense(width, kernel_initializer=kernel_initializer(), **options)
        build_layer(self.output_layer, build_layer(self.hidden, shape))

    def call(self, x, embed=None, context=None, training=None):
        """What the embedding takes, (batch,) as a rule, to (..., width)."""
        return self.output_layer(self.hidden(self.embedding(x)))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        *shape, width = self.embedding.compute_output_shape(x_shape)
        return (*shape, self.width or 4 * width)


class GuidanceEmbedding(MLPEmbedding):
    """An `MLPEmbedding` to which a vector is added: `W2 activation(W1 (embedding(t) + C c) + b1) + b2`.

    As of latent consistency models (Luo et al., "Latent Consistency Models", 2023, section 4.3; Meng et al., "On
    Distillation of Guided Diffusion Models", 2023), whose networks know the scale of guidance w by its waves:

        UNet(..., embedding=GuidanceEmbedding(SinusoidalEmbedding(320), "timestep_cond", 256))
        network({"image": x, "time": t, "timestep_cond": w})                # or the vectors:
        waves = SinusoidalEmbedding(256, scale=1000, sine_first=True, shift=1)
        network({"image": x, "time": t, "timestep_cond": waves(w - 1)})

    Args:
        embedding, width, activation: as of `MLPEmbedding`.
        name_of_input: what `c`, (batch, size), or the scale w, (batch,), of which 1 is no guidance, is called among the
            inputs of the network. It may be missing: then nothing is added.
        size: of `c`.
    """

    formerly = ("kdiff.blocks>SteeredEmbedding",)

    def __init__(
        self,
        embedding: keras.layers.Layer,
        name_of_input: str,
        size: int,
        width: int | None = None,
        activation: Any = "silu",
        **kwargs,
    ):
        super().__init__(embedding, width, activation, **kwargs)
        check_integer("GuidanceEmbedding", "size", size)
        self.name_of_input = name_of_input
        self.size = size

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The time and the vector, which may be missing."""
        return {name: Input("time", None), self.name_of_input: Input("vector", None, True)}

    def build(self, x_shape):
        """Builds the embedding, the matrix `C` and the dense layers."""
        shape = x_shape["time"] if isinstance(x_shape, dict) else x_shape
        super().build(shape)
        width = self.embedding.compute_output_shape(shape)[-1]
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.steering = Dense(width, use_bias=False, **options)
        self.steering.build((shape[0], self.size))

    def call(self, x, embed=None, context=None, training=None):
        """The time, (batch,), or it and the vector in a dictionary, to (batch, width)."""
        given = x if isinstance(x, dict) else {"time": x}
        y = self.embedding(given["time"])
        if given.get("vector") is not None:
            y = y + ops.cast(self.steering(self._waves(given["vector"])), y.dtype)
        return self.output_layer(self.hidden(y))

    def _waves(self, given):
        """Vectors as they are, and the waves of numbers."""
        if len(given.shape) > 1:
            return given
        return SinusoidalEmbedding(self.size, scale=1000.0, sine_first=True, shift=1)(ops.cast(given, "float32") - 1.0)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """(batch, width)."""
        time = x["time"] if isinstance(x, dict) else x
        return keras.KerasTensor(self.compute_output_shape(tuple(time.shape)), self.compute_dtype)


class LearnedEmbedding(Block):
    """Learned vectors: for positions, `x + p`, or, given a `size`, for indices, `table[x]`.

    Positions fix the shape of the input but for the batch. An index outside 0 ... size - 1 raises a ValueError where
    its value is known (outside compiled code and off the accelerator) and otherwise gives NaN, never some other row.

    Args:
        size: the number of rows of the table; None for positions.
        width: of a row of the table; None for that of `embed`. Positions have the width of the input.
        stddev: the standard deviation of the normal initialiser.
    """

    def __init__(self, size: int | None = None, width: int | None = None, stddev: float = 0.02, **kwargs):
        super().__init__(autocast=size is None, **kwargs)
        for name, value in {"size": size, "width": width}.items():
            if value is not None:
                check_integer("LearnedEmbedding", name, value)
        if size is None and width is not None:
            raise ValueError(
                f"LearnedEmbedding: `width` is that of the input unless `size` is given; received: {width}"
            )
        check_number("LearnedEmbedding", "stddev", stddev, 0)
        self.size = size
        self.width = width
        self.stddev = stddev

    def build(self, x_shape, embed_shape=None):
        """Makes the table, (size, width), or the positions, the shape of `x` but for the batch."""
        shape = tuple(x_shape[1:]) if self.size is None else (self.size, _width(self, embed_shape))
        if len(shape) < 2 or None in shape:
            raise ValueError(
                "LearnedEmbedding: `x` must be a map or tokens of known size, unless `size` is given; "
                f"received the shape: {tuple(x_shape)}"
            )
        self.table = self.add_weight(shape=shape, initializer=Normal(self.stddev), name="table")

    def call(self, x, embed=None, context=None, training=None):
        """Maps or tokens to the same, or whole numbers of any shape to (..., width)."""
        if self.size is not None:
            return _rows(self, x, self.size)
        if tuple(x.shape[1:]) != tuple(self.table.shape):
            raise ValueError(
                f"LearnedEmbedding: positions are learned for the shape {tuple(self.table.shape)}; "
                f"received: {tuple(x.shape[1:])}"
            )
        return x + ops.cast(self.table, x.dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """The shape of `x`, or (..., width) for indices."""
        return tuple(x_shape) if self.size is None else (*x_shape, _width(self, embed_shape))


class LabelEmbedding(Condition):
    """A vector for each class, and one for no class: `table[label]`.

    In training a label is dropped, that is, replaced by the null class `num_classes`, with probability `dropout`: a
    network so trained also knows the unconditional distribution, as Ho & Salimans, "Classifier-Free Diffusion
    Guidance" (2022), algorithm 1, need. The null class exists if `dropout` is above 0. A label out of range raises a
    ValueError where its value is known (outside compiled code and off the accelerator) and otherwise gives NaN.

    Args:
        num_classes: labels are 0 ... num_classes - 1.
        width: the size of a vector; None for that of `embed`, to which a network adds it.
        dropout: the probability of dropping a label in training.
        seed: of the dropping.
    """

    def __init__(self, num_classes: int, width: int | None = None, dropout: float = 0.0, seed: int = 0, **kwargs):
        super().__init__(dropout, seed, **kwargs)
        check_integer("LabelEmbedding", "num_classes", num_classes)
        if width is not None:
            check_integer("LabelEmbedding", "width", width)
        self.num_classes = num_classes
        self.width = width

    def build(self, x_shape, embed_shape=None):
        """Makes the table, (num_classes, width), with one more row for the null class."""
        self.table = self.add_weight(
            shape=(self.num_classes + (self.dropout > 0), _width(self, embed_shape)),
            initializer=Normal(0.02),
            name="table",
        )

    def encode(self, x, embed, training):
        """Labels (batch,) to (batch, width)."""
        self._check_shape(x.shape)
        return _rows(self, x, self.table.shape[0])

    @property
    def null(self):
        """The null class, `num_classes`; None if there is none."""
        return np.int32(self.num_classes) if self.dropout > 0 else None

    @staticmethod
    def _check_shape(shape) -> None:
        if len(shape) != 1:
            raise ValueError(
                f"LabelEmbedding: labels must have the shape (batch,), or (batch, 1); received: {tuple(shape)}. Of "
                "one-hot vectors take `labels.argmax(-1)`"
            )

    def rows(self, labels):
        """Labels with one row an example: those of shape (batch, 1), as `keras.datasets` gives them, are (batch,)."""
        return labels[:, 0] if len(labels.shape) == 2 and labels.shape[1] == 1 else labels

    def check(self, labels) -> None:
        """Raises a ValueError for an array of labels that holds one that the table does not have."""
        known = self.num_classes + (self.dropout > 0)
        if labels.size and not (labels.min() >= 0 and labels.max() < known):
            raise ValueError(f"Labels must be in 0..{known - 1}; received {labels.min()} to {labels.max()}")
        if np.any(labels != np.floor(labels)):
            raise ValueError(f"Labels must be whole numbers; received {labels[labels != np.floor(labels)][0]}")

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, width)."""
        self._check_shape(x_shape)
        return (*x_shape, _width(self, embed_shape))


def _width(layer: Block, embed_shape) -> int:
    if layer.width is None:
        check_given(layer, "width", embed_shape, "or an `embed` to take it from")
    return layer.width or embed_shape[-1]


def _rows(layer: Block, indices, size: int):
    """The rows of the layer's table at `indices`; NaN, not a neighbour, for an index that has none."""
    known = backend.concrete(indices)
    if known is not None and not np.all((known >= 0) & (known < size) & (known == np.floor(known))):
        raise ValueError(
            f"{type(layer).__name__}: `x` must be whole numbers in 0 ... {size - 1}; received: {np.unique(known)}"
        )
    indices = ops.cast(indices, "int32")
    rows = ops.take(ops.cast(layer.table, layer.compute_dtype), ops.clip(indices, 0, size - 1), axis=0)
    inside = ops.expand_dims((indices >= 0) & (indices < size), -1)
    return ops.where(inside, rows, ops.cast(float("nan"), rows.dtype))
