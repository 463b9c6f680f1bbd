"""Embeddings of numbers, such as the time, as vectors.

Time embeddings read their input in float32 at any precision: in bfloat16 a time of 999 would become 1000.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_choice, check_integer, check_number
from kdiff.blocks.base import Block, build_layer, copy_layer, kernel_initializer
from kdiff.blocks.conditions import Input
from kdiff.blocks.layers import Dense

__all__ = [
    "FourierEmbedding",
    "GuidanceEmbedding",
    "MLPEmbedding",
    "SinusoidalEmbedding",
    "SizeEmbedding",
]


class SinusoidalEmbedding(Block):
    """A number as cosines and sines of decreasing frequencies: `[cos(scale t f_i), sin(scale t f_i)]`.

    `f_i = max_period^(-i / (half - shift))` for i = 0 ... half - 1, with `half = width // 2`; an odd width is padded
    with a zero. The two conventions in the literature are:

    - `shift=0`, cosines first: Dhariwal & Nichol's ADM, Stable Diffusion, DiT. The default.
    - `shift=1, sine_first=True`: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), after Vaswani et al.,
      "Attention Is All You Need" (2017), section 3.5.

    Args:
        width: the size of the embedding, at least 2.
        max_period: the period, divided by 2 pi, of the lowest frequency.
        scale: multiplies the input, which should then span some hundreds: 1000 for a time in [0, 1].
        sine_first: whether the sines come before the cosines.
        shift: subtracted from the denominator of the exponent.
        offset: added to the scaled input: `[cos((scale t + offset) f_i), ...]`. With scale T and offset -1 the input is
            the index of the step, T t - 1.
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
        """Maps numbers of any shape, usually (batch,), to (..., width)."""
        x = x if self.offset == 0 else ops.cast(x, "float32") + self.offset / self.scale
        waves = _waves(x, self._frequencies.astype("float32"), self.sine_first)
        odd = [[0, 0]] * len(x.shape) + [[0, self.width % 2]]
        return ops.cast(ops.pad(waves, odd) if self.width % 2 else waves, self.compute_dtype)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        return (*x_shape, self.width)


class SizeEmbedding(SinusoidalEmbedding):
    """Sinusoidal features of the size conditions of Stable Diffusion XL (Podell et al., "SDXL", 2023, section 2.2):

        6 numbers    height and width of the original, top and left of the crop, height and width of the target
        5 numbers    height and width of the original, top and left of the crop, an aesthetic score (the refiner)

    The defaults in `sample` are the size of the samples in pixels, no crop, and a score of 6.

    Args:
        width: the size of the embedding of each number.
        numbers: 6 or 5.
        max_period, scale, sine_first, shift: as in `SinusoidalEmbedding`.
    """

    formerly = ("kdiff.blocks>SizeWaves",)

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
        check_choice("SizeEmbedding", "numbers", numbers, (5, 6))
        self.numbers = numbers

    def default(self, sizes: tuple[int, ...]) -> np.ndarray:
        """The numbers for a sample of this height and width."""
        end = [*sizes] if self.numbers == 6 else [6.0]
        return np.array([*sizes, 0.0, 0.0, *end], "float32")


class FourierEmbedding(Block):
    """Random Fourier features of a number: `[cos(2 pi f_i t), sin(2 pi f_i t)]`, `f_i ~ N(0, scale^2)`.

    Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020), equation 5; as Karras et al.
    (EDM, 2022) use it for log-sigma, and, with scale 16 and the sines first, Song et al. (NCSN++, 2021). The
    frequencies are a non-trainable weight, saved with the model and the same on every backend.

    Args:
        width: the size of the embedding, an even number.
        scale: the standard deviation of the frequencies.
        sine_first: whether the sines come before the cosines.
        seed: for the frequencies.
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
        """Maps numbers of any shape, usually (batch,), to (..., width)."""
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
    """An embedding followed by two dense layers: `W2 activation(W1 embedding(t) + b1) + b2`.

    Ho et al. (2020), appendix B, and most later U-Nets. No activation follows, as each block applies its own.

    Args:
        embedding: the layer from a number to a vector, such as `SinusoidalEmbedding(64)`.
        width: of both dense layers; None for four times the width of the embedding.
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
        """Maps the input of the embedding, usually (batch,), to (..., width)."""
        return self.output_layer(self.hidden(self.embedding(x)))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(..., width)."""
        *shape, width = self.embedding.compute_output_shape(x_shape)
        return (*shape, self.width or 4 * width)


class GuidanceEmbedding(MLPEmbedding):
    """An `MLPEmbedding` to which a conditioning vector is added: `W2 activation(W1 (embedding(t) + C c) + b1) + b2`.

    As in latent consistency models (Luo et al., "Latent Consistency Models", 2023, section 4.3; Meng et al., "On
    Distillation of Guided Diffusion Models", 2023), whose networks receive the guidance scale w by its embedding:

        UNet(..., embedding=GuidanceEmbedding(SinusoidalEmbedding(320), "timestep_cond", 256))
        network({"image": x, "time": t, "timestep_cond": w})                # or the vectors:
        waves = SinusoidalEmbedding(256, scale=1000, sine_first=True, shift=1)
        network({"image": x, "time": t, "timestep_cond": waves(w - 1)})

    Args:
        embedding, width, activation: as in `MLPEmbedding`.
        name_of_input: the name of the input of the network that holds `c`, (batch, size), or the scale w, (batch,),
            where 1 is no guidance. If it is missing, nothing is added.
        size: the size of `c`.
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
        """The time, and the optional vector."""
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
        """Maps the time, (batch,), or a dictionary of the time and the vector, to (batch, width)."""
        given = x if isinstance(x, dict) else {"time": x}
        y = self.embedding(given["time"])
        if given.get("vector") is not None:
            y = y + ops.cast(self.steering(self._waves(given["vector"])), y.dtype)
        return self.output_layer(self.hidden(y))

    def _waves(self, given):
        """Vectors unchanged, and sinusoidal features of numbers."""
        if len(given.shape) > 1:
            return given
        return SinusoidalEmbedding(self.size, scale=1000.0, sine_first=True, shift=1)(ops.cast(given, "float32") - 1.0)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """(batch, width)."""
        time = x["time"] if isinstance(x, dict) else x
        return keras.KerasTensor(self.compute_output_shape(tuple(time.shape)), self.compute_dtype)
