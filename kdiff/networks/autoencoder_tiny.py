"""TAESD: a small convolutional autoencoder, for previews of the latents of a larger one."""

from collections.abc import Sequence

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import Chain, ConfigurableLayer, build_layer, kernel_initializer
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.resampling import Upsample
from kdiff.networks.autoencoder import Autoencoder

__all__ = ["AutoencoderTiny", "TinyBlock"]


class TinyBlock(ConfigurableLayer, keras.layers.Layer):
    """Three 3x3 convolutions with a residual connection: `relu(conv(relu(conv(relu(conv(x))))) + x)`."""

    def build(self, x_shape):
        """Builds the three convolutions."""
        self.convolutions = [_convolution(self, x_shape[-1]) for _ in range(3)]
        for layer in self.convolutions:
            layer.build(x_shape)

    def call(self, x):
        """Maps (batch, height, width, channels) to the same shape."""
        first, second, third = self.convolutions
        return ops.relu(third(ops.relu(second(ops.relu(first(x))))) + x)


class AutoencoderTiny(Autoencoder):
    """TAESD (Bohan 2023, "Tiny AutoEncoder for Stable Diffusion"): distilled from the autoencoder of a larger model.

        encode(images) = (encoder((images + 1) / 2), None),    decode(latents) = 2 decoder(3 tanh(latents / 3)) - 1

    Its latents are already scaled and shifted as the diffusion model needs them: use `codecs.Latent(AutoencoderTiny())`
    as a codec, or as the `preview` of another codec.

    Args:
        width: the channels of all layers.
        latent_channels: of the latents.
        depths: the number of blocks of each level of the encoder, from the finest; latents are 2^(levels - 1) times
            smaller than images.
        up_depths: the same for the decoder, from the coarsest.
        channels: of the images.
        out_channels: of the decoded images; None for `channels`.
        kwargs: `name` and `dtype`.
    """

    formerly = ("kdiff.networks>Tiny",)

    ranks = (4,)

    def __init__(
        self,
        width: int = 64,
        latent_channels: int = 4,
        depths: Sequence[int] = (1, 3, 3, 3),
        up_depths: Sequence[int] = (3, 3, 3, 1),
        channels: int = 3,
        out_channels: int | None = None,
        **kwargs,
    ):
        check_integer("AutoencoderTiny", "width", width)
        for depth in (*depths, *up_depths):
            check_integer("AutoencoderTiny", "a depth", depth, 0)
        if len(depths) != len(up_depths) or not depths:
            raise ValueError(
                f"AutoencoderTiny: encoder and decoder must have the same number of levels; received: {depths!r} and "
                f"{up_depths!r}"
            )
        super().__init__(channels, latent_channels, 2 ** (len(depths) - 1), out_channels, **kwargs)
        self.width = width
        self.depths = list(depths)
        self.up_depths = list(up_depths)
        self.encoder = Chain(self._down(), name="encoder", dtype=self.dtype_policy)
        self.decoder = Chain(self._up(), name="decoder", dtype=self.dtype_policy)

    def _blocks(self, count):
        return [TinyBlock(dtype=self.dtype_policy) for _ in range(count)]

    def _down(self):
        layers = [_convolution(self, self.width), *self._blocks(self.depths[0])]
        for depth in self.depths[1:]:
            padding = keras.layers.ZeroPadding2D(((1, 0), (1, 0)), "channels_last", dtype=self.dtype_policy)
            half = _convolution(self, self.width, strides=2, padding="valid", use_bias=False)
            layers += [padding, half, *self._blocks(depth)]
        return [*layers, _convolution(self, self.latent_channels, dtype="float32")]

    def _up(self):
        layers = [_convolution(self, self.width), keras.layers.ReLU(dtype=self.dtype_policy)]
        for depth in self.up_depths[:-1]:
            twice = Upsample(convolution=False, dtype=self.dtype_policy)
            layers += [*self._blocks(depth), twice, _convolution(self, self.width, use_bias=False)]
        outputs = self.out_channels or self.channels
        return [*layers, *self._blocks(self.up_depths[-1]), _convolution(self, outputs, dtype="float32")]

    def _build_parts(self, image_shape, latent_shape):
        build_layer(self.encoder, image_shape)
        build_layer(self.decoder, latent_shape)

    def _encode(self, images, training):
        return self.encoder((images + 1.0) / 2.0, training=training), None

    def _decode(self, latents, training):
        return 2.0 * self.decoder(3.0 * ops.tanh(latents / 3.0), training=training) - 1.0


def _convolution(layer, width, **options):
    options = {"padding": "same", "kernel_initializer": kernel_initializer(), "dtype": layer.dtype_policy, **options}
    return Conv2D(width, 3, **options)
