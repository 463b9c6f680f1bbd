"""Autoencoders: from images to latents that are smaller by a factor along each axis, and back.

    mean, log_variance = autoencoder.encode(images)     # (batch, height, width, channels) in [-1, 1]
    images = autoencoder.decode(latents)                # (batch, height / factor, width / factor, latent_channels)

They are Keras models, with `autoencoder(images)` equal to `decode(mean)`, and are used by `codecs.Latent`, which
accepts any Keras model or layer with `encode`, `decode` and `latent_shape`.
| size | paper | latents | parameters (millions) |
|---|---|---|---|
| `AutoencoderKL.sd()`, `AutoencoderKL.sdxl()` | Rombach et al. (2022), Podell et al. (2023) | f = 8, 4 channels | 83.7 |
| `AutoencoderKL.sd3()` | Esser et al., "Scaling Rectified Flow Transformers" (2024), section 5.2.1 | f = 8, 16 channels | 83.8 |
| `AutoencoderKL.f4()`, `VQ.f4()` | Rombach et al. (2022), appendix E | f = 4, 3 channels | 55.3 |
| `AutoencoderTiny()` | TAESD (Bohan 2023) | f = 8, 4 channels | 2.4 |
"""  # noqa: E501

from collections.abc import Sequence
from typing import Any, Self

import keras
from keras import ops

from kdiff import deprecated
from kdiff.base import check_integer
from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.base import Chain, ConfigurableLayer, Shape, build_layer, kernel_initializer
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.normalization import GroupNorm, SpatialNorm
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.networks.base import AXES, check_size
from kdiff.networks.codebook import Codebook

__all__ = ["LOG_VARIANCES", "VQ", "Autoencoder", "AutoencoderKL", "Convolutional"]

LOG_VARIANCES = (-30.0, 20.0)  # the range to which the encoder's output is clipped


class Autoencoder(ConfigurableLayer, keras.Model):
    """The base of autoencoders. A subclass defines `_build_parts`, `_encode` and `_decode`.

    Args:
        channels: of the images.
        latent_channels: of the latents.
        factor: the number of pixels per latent along each axis.
        out_channels: of the decoded images; None for `channels`.
        kwargs: `name` and `dtype`. At lower precision the last layers of both halves stay in float32.

    Raises:
        ValueError: if the channels of the images differ, or `factor` does not divide their size.
    """

    ranks: tuple[int, ...] = (3, 4, 5)  # the possible ranks of the images

    def __init__(
        self, channels: int, latent_channels: int, factor: int, out_channels: int | None = None, **kwargs
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        check_integer(type(self).__name__, "channels", channels)
        check_integer(type(self).__name__, "latent_channels", latent_channels)
        if out_channels is not None:
            check_integer(type(self).__name__, "out_channels", out_channels)
        self.channels = channels
        self.latent_channels = latent_channels
        self.factor = factor
        self.out_channels = out_channels
        self._shape = None

    def _build_parts(self, image_shape: Shape, latent_shape: Shape) -> None:
        """Builds all layers."""
        raise NotImplementedError

    def _encode(self, images, training):
        """(mean, log_variance) or (latents, None) of images in the compute precision."""
        raise NotImplementedError

    def _decode(self, latents, training):
        """The images decoded from latents in the compute precision."""
        raise NotImplementedError

    def build(self, input_shape: Shape | None = None) -> None:
        """Builds both halves, for a batch of images of this shape; None for (batch, height, width, channels)."""
        if self.built:
            return
        shape = (None, None, None, self.channels) if input_shape is None else tuple(input_shape)
        latent = (None, *self.latent_shape(shape[1:]))
        self._shape = shape
        self._build_parts(shape, latent)

    def get_build_config(self) -> dict[str, Any] | None:
        """The shape for which it was built."""
        return None if self._shape is None else {"input_shape": self._shape}

    def build_from_config(self, config: dict[str, Any] | None) -> None:
        """Builds a loaded autoencoder."""
        if config:
            self.build(config["input_shape"])

    def latent_shape(self, shape: Shape) -> Shape:
        """The shape of the latents of one image of this shape, in which None is an unknown size.

        Raises:
            ValueError: if images cannot have this shape.
        """
        shape = tuple(shape)
        if len(shape) + 1 not in self.ranks or shape[-1] != self.channels:
            known = " or ".join(f"({', '.join(AXES[rank])}, {self.channels})" for rank in self.ranks)
            raise ValueError(f"{self.name}: images must have the shape {known}; received: {shape}")
        check_size(self, (None, *shape), self.factor, f"a reduction by {self.factor} needs")
        return (*(size and size // self.factor for size in shape[:-1]), self.latent_width)

    @property
    def latent_width(self) -> int:
        """The channels of the output of `encode`."""
        return self.latent_channels

    def encode(self, images, training: bool | None = None) -> tuple[Any, Any]:
        """The distribution of the latents of images.

        Args:
            images: (batch, height, width, channels), in [-1, 1].
            training: whether dropout is active.

        Returns:
            (mean, log_variance), float32 (batch, height / factor, width / factor, latent_channels); or (latents, None).
        """
        self.latent_shape(tuple(images.shape)[1:])
        self._prepare(images.shape)
        mean, log_variance = self._encode(ops.cast(images, self.compute_dtype), training)
        return ops.cast(mean, "float32"), None if log_variance is None else ops.cast(log_variance, "float32")

    def decode(self, latents, training: bool | None = None):
        """Decodes latents to images, float32, about in [-1, 1] but not clipped."""
        shape = tuple(latents.shape)
        if len(shape) not in self.ranks or shape[-1] != self.latent_width:
            raise ValueError(f"{self.name}: latents must have {self.latent_width} channels; received: {shape}")
        self._prepare((*shape[:1], *(size and size * self.factor for size in shape[1:-1]), self.channels))
        return ops.cast(self._decode(ops.cast(latents, self.compute_dtype), training), "float32")

    def _prepare(self, shape):
        if not self.built:
            self.build((None, *[None] * (len(shape) - 2), self.channels))

    def call(self, images, training=None):
        """The images decoded from the means of the latents."""
        return self.decode(self.encode(images, training)[0], training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the images, with `out_channels`."""
        return (*input_shape[:-1], self.out_channels or self.channels)


class Convolutional(Autoencoder):
    """An encoder of residual blocks at decreasing resolution, a middle with attention, and a decoder.

    Esser et al., "Taming Transformers" (2021), table 7; Rombach et al. (2022), appendix G.1. Downsampling convolutions
    are padded on the right and at the bottom. In the decoder each level has one more block.

    Args:
        widths: the channels of each level, from the finest; latents are 2^(levels - 1) times smaller.
        latent_channels: of the latents.
        depth: the number of blocks per level of the encoder.
        channels: of the images.
        out_channels: of the decoded images; None for `channels`.
        attention: whether the middle has single-head attention.
        attention_at: the indices of the levels where attention follows each block.
        groups: of the group norms; None as in `GroupNorm`, which is 32 for the published widths.
        kwargs: `name` and `dtype`.
    """

    named = False

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512),
        latent_channels: int = 4,
        depth: int = 2,
        channels: int = 3,
        out_channels: int | None = None,
        attention: bool = True,
        attention_at: Sequence[int] = (),
        groups: int | None = None,
        **kwargs,
    ):
        owner = type(self).__name__
        if not widths or isinstance(widths, int):
            raise ValueError(f"{owner}: `widths` must be the channels of at least one level; received: {widths!r}")
        for width in widths:
            check_integer(owner, "a width", width)
        check_integer(owner, "depth", depth)
        unknown = [level for level in attention_at if level not in range(len(widths))]
        if unknown:
            raise ValueError(f"{owner}: `attention_at` must be levels in 0..{len(widths) - 1}; received: {unknown}")
        super().__init__(channels, latent_channels, 2 ** (len(widths) - 1), out_channels, **kwargs)
        self.widths = list(widths)
        self.depth = depth
        self.attention = attention
        self.attention_at = list(attention_at)
        self.groups = groups

    def _convolution(self, width, size=3, **options):
        options = {"padding": "same", "kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy, **options}
        return Conv2D(width, size, **options)

    def _pixelwise(self, name, width, **options):
        return self._convolution(width, 1, name=name, **options)

    def _norm(self, spatial=False):
        norm = GroupNorm(self.groups, 1e-6, dtype=self.dtype_policy)
        return SpatialNorm(norm, dtype=self.dtype_policy) if spatial else norm

    def _unit(self, width, attention=False, spatial=False):
        norm, scale_shift = self._norm(spatial), None if spatial else False
        block = ResidualBlock(width, scale_shift, normalization=norm, dtype=self.dtype_policy)
        mixer = SelfAttention(1, normalization=norm, dtype=self.dtype_policy)
        return [block, mixer] if attention else [block]

    def _middle(self, spatial=False):
        width = self.widths[-1]
        return [*self._unit(width, self.attention, spatial), *self._unit(width, spatial=spatial)]

    def _level(self, level, depth, spatial=False):
        attention = level in self.attention_at
        return [layer for _ in range(depth) for layer in self._unit(self.widths[level], attention, spatial)]

    def _ends(self, outputs, spatial=False):
        activation = keras.layers.Activation("silu", dtype=self.dtype_policy)
        return [self._norm(spatial), activation, self._convolution(outputs, dtype="float32")]

    def _chain(self, layers, name):
        return Chain(layers, name=name, dtype=self.dtype_policy)

    def _encoder(self, outputs: int) -> Chain:
        layers = [self._convolution(self.widths[0])]
        for level in range(len(self.widths)):
            layers += [Downsample(dtype=self.dtype_policy)] if level else []
            layers += self._level(level, self.depth)
        return self._chain([*layers, *self._middle(), *self._ends(outputs)], "encoder")

    def _decoder(self, spatial: bool = False) -> Chain:
        """With `spatial`, all norms are conditioned on a map."""
        layers = [self._convolution(self.widths[-1]), *self._middle(spatial)]
        for level in reversed(range(len(self.widths))):
            layers += self._level(level, self.depth + 1, spatial)
            layers += [Upsample(dtype=self.dtype_policy)] if level else []
        return self._chain([*layers, *self._ends(self.out_channels or self.channels, spatial)], "decoder")


class AutoencoderKL(Convolutional):
    """The autoencoder of latent diffusion with Gaussian latents, regularised by a small KL term.

        encode(images) = (mean, log_variance),    latents = mean + exp(log_variance / 2) noise

    Kingma & Welling, "Auto-Encoding Variational Bayes" (2014); Rombach et al. (2022), section 3.1 and appendix G.1.

    Args:
        widths, latent_channels, depth, channels, out_channels, attention, attention_at, groups: as in `Convolutional`.
        quant: whether a 1x1 convolution follows the encoder; SD 3 and Flux have none.
        post_quant: whether a 1x1 convolution precedes the decoder.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512),
        latent_channels: int = 4,
        depth: int = 2,
        channels: int = 3,
        out_channels: int | None = None,
        attention: bool = True,
        attention_at: Sequence[int] = (),
        groups: int | None = None,
        quant: bool = True,
        post_quant: bool = True,
        **kwargs,
    ):
        shared = (widths, latent_channels, depth, channels, out_channels, attention, attention_at, groups)
        super().__init__(*shared, **kwargs)
        self.quant = quant
        self.post_quant = post_quant
        self.encoder = self._encoder(2 * latent_channels)
        self.decoder = self._decoder()
        self.to_moments = self._pixelwise("to_moments", 2 * latent_channels, dtype="float32") if quant else None
        self.from_latents = self._pixelwise("from_latents", latent_channels) if post_quant else None

    def _build_parts(self, image_shape, latent_shape):
        moments = build_layer(self.encoder, image_shape)
        if self.quant:
            build_layer(self.to_moments, moments)
        if self.post_quant:
            build_layer(self.from_latents, latent_shape)
        build_layer(self.decoder, latent_shape)

    def _encode(self, images, training):
        moments = self.encoder(images, training=training)
        moments = self.to_moments(moments) if self.quant else moments
        mean, log_variance = ops.split(moments, 2, axis=-1)
        return mean, ops.clip(log_variance, *LOG_VARIANCES)

    def _decode(self, latents, training):
        return self.decoder(self.from_latents(latents) if self.post_quant else latents, training=training)

    @classmethod
    def sd(cls, **options: Any) -> Self:
        """The autoencoder of Stable Diffusion 1 and 2: scale 0.18215. For `options` see the class."""
        return cls(**options)

    @classmethod
    def sdxl(cls, **options: Any) -> Self:
        """The autoencoder of Stable Diffusion XL, the same network: scale 0.13025. For `options` see the class."""
        return cls(**options)

    @classmethod
    def sd3(cls, **options: Any) -> Self:
        """For Stable Diffusion 3 (scale 1.5305, shift 0.0609) and Flux (0.3611, 0.1159); `options` as above."""
        return cls(**{"latent_channels": 16, "quant": False, "post_quant": False, **options})

    @classmethod
    def f4(cls, **options: Any) -> Self:
        """The "kl-f4" of latent diffusion. For `options` see the class."""
        return cls(**{"widths": (128, 256, 512), "latent_channels": 3, **options})


class VQ(Convolutional):
    """The vector-quantised autoencoder: the decoder receives the code nearest to each latent.

        encode(images) = (latents, None),    decode(latents) = decoder(argmin_code |latent - code|)

    van den Oord et al., "Neural Discrete Representation Learning" (2017); Esser et al. (2021), section 3.1. A diffusion
    model is trained on the latents before quantisation, as in Rombach et al. (2022, section 4).

    Args:
        widths, latent_channels, depth, channels, out_channels, attention, attention_at, groups: as in `Convolutional`.
        codes: the number of codes.
        code_width: the channels of a code and of the output of `encode`; None for `latent_channels`.
        spatial: whether the decoder's norms are `SpatialNorm`s conditioned on the latents (Zheng et al., "MoVQ", 2022).
        quantize_latents: whether `decode` quantises by default; Kandinsky's does not.
        kwargs: `name` and `dtype`.
    """

    @deprecated.arguments(quantize="quantize_latents")
    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512),
        latent_channels: int = 3,
        depth: int = 2,
        channels: int = 3,
        out_channels: int | None = None,
        attention: bool = True,
        attention_at: Sequence[int] = (),
        groups: int | None = None,
        codes: int = 8192,
        code_width: int | None = None,
        spatial: bool = False,
        quantize_latents: bool = True,
        **kwargs,
    ):
        shared = (widths, latent_channels, depth, channels, out_channels, attention, attention_at, groups)
        super().__init__(*shared, **kwargs)
        check_integer("VQ", "codes", codes)
        if code_width is not None:
            check_integer("VQ", "code_width", code_width)
        self.codes, self.code_width = codes, code_width
        self.spatial, self.quantize_latents = spatial, quantize_latents
        self.codebook = Codebook(codes, name="codebook", dtype=self.dtype_policy)
        self.encoder = self._encoder(latent_channels)
        self.decoder = self._decoder(spatial)
        self.to_latents = self._pixelwise("to_latents", code_width or latent_channels, dtype="float32")
        self.from_latents = self._pixelwise("from_latents", latent_channels)

    @property
    def latent_width(self):
        return self.code_width or self.latent_channels

    def _build_parts(self, image_shape, latent_shape):
        build_layer(self.to_latents, build_layer(self.encoder, image_shape))
        self.codebook.build(latent_shape)
        steering = latent_shape if self.spatial else None
        build_layer(self.decoder, build_layer(self.from_latents, latent_shape), steering)

    def _encode(self, images, training):
        return self.to_latents(self.encoder(images, training=training)), None

    def nearest(self, latents):
        """(codes, indices): the nearest code of each latent, float32, with straight-through gradient, and its index."""
        return self.codebook(latents)

    def decode(self, latents, training=None, quantize: bool | None = None):
        """Decodes latents to images, quantised if `quantize`; None for the constructor's value."""
        quantize = self.quantize_latents if quantize is None else quantize
        return super().decode(self.nearest(latents)[0] if quantize else latents, training)

    def _decode(self, latents, training):
        steering = latents if self.spatial else None
        return self.decoder(self.from_latents(latents), embed=steering, training=training)

    @classmethod
    def f4(cls, **options: Any) -> Self:
        """The "vq-f4" of latent diffusion: 8192 codes of 3 channels. For `options` see the class."""
        return cls(**options)
