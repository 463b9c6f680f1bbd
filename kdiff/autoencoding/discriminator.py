"""A patch discriminator: whether each part of a picture is real or reconstructed."""

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import Chain, ConfigurableLayer, build_layer
from kdiff.blocks.initializers import Normal
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.normalization import GroupNorm

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(ConfigurableLayer, keras.Model):
    """4x4 convolutions, with an output for each patch of the picture (70 pixels wide at depth 3).

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017), section 3.2.2, as in Esser
    et al., "Taming Transformers" (2021), but with group norms, which are stateless, instead of batch norms.

    Args:
        width: the channels of the first layer, doubled in each following layer up to a factor of eight.
        depth: the number of convolutions with stride 2.
        kwargs: `name` and `dtype`.
    """

    def __init__(self, width: int = 64, depth: int = 3, **kwargs):
        super().__init__(autocast=False, **{"name": "discriminator", **kwargs})
        check_integer("PatchDiscriminator", "width", width)
        check_integer("PatchDiscriminator", "depth", depth)
        self.width = width
        self.depth = depth
        made = [self._convolution(width, 2), self._activation()]
        for i in range(1, depth + 1):
            wide = self._convolution(width * min(2**i, 8), 1 if i == depth else 2, use_bias=False)
            made += [wide, GroupNorm(dtype=self.dtype_policy), self._activation()]
        self.chain = Chain([*made, self._convolution(1, 1, dtype="float32")], dtype=self.dtype_policy)

    def _convolution(self, width, stride, **options):
        options = {"kernel_initializer": Normal(0.02), "dtype": self.dtype_policy, **options}
        return Conv2D(width, 4, strides=stride, padding="same", **options)

    def _activation(self):
        return keras.layers.LeakyReLU(0.2, dtype=self.dtype_policy)

    def build(self, input_shape):
        """Builds the convolutions, for images with these channels."""
        build_layer(self.chain, tuple(input_shape))

    def call(self, images, training=None):
        """Maps (batch, height, width, channels) to logits (batch, height', width', 1), high for real images."""
        return self.chain(ops.cast(images, self.compute_dtype), training=training)

    def compute_output_shape(self, input_shape):
        return self.chain.compute_output_shape(tuple(input_shape))
