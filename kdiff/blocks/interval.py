"""The length of the interval that a flow map crosses in one step, as a condition."""

import keras
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.blocks.base import ConfigurableLayer, kernel_initializer
from kdiff.blocks.conditions import Input
from kdiff.blocks.embeddings import SinusoidalEmbedding
from kdiff.blocks.layers import Dense

__all__ = ["Interval"]


class Interval(ConfigurableLayer, keras.layers.Layer):
    """The condition of networks that map any noise level to any lower one, a vector added to the time embedding:

        W2 silu(W1 waves(d) + b1) + b2,     d = u_now - u_then in [0, pi / 2],    tan(u) = sigma / alpha,

    where W2 and b2 are initialised to zero, so that a network initialised with the weights of one without this
    condition computes the same function.

        UNet.residual(64, conditions={"interval": Interval()})

    It must be named "interval". It is supplied by objectives and solvers (`objectives.Shortcut`, `objectives.MeanFlow`,
    `solvers.FlowMap`), not by `fit` or `sample`; if it is missing, d = 0, and the network predicts the mean of the data
    as usual. A network of two times is from Kim et al. 2024 (consistency trajectory models), arXiv:2310.02279; the
    parametrisation by time and distance from Geng et al. 2025 (MeanFlow), arXiv:2505.13447, table 1c; the distance as
    an angle is the same on every schedule.

    Args:
        waves: the number of sinusoidal features, even.
        scale: the highest frequency; the lowest is a hundredth of it. Objectives that take derivatives (`MeanFlow`)
            need low frequencies.
        kwargs: `name` and `dtype`.
    """

    def __init__(self, waves: int = 64, scale: float = 20.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_integer("Interval", "waves", waves, 2)
        check_number("Interval", "scale", scale, 1e-3)
        self.waves, self.scale = waves, scale
        self.embedding = SinusoidalEmbedding(waves, 100.0, scale, dtype=self.dtype_policy)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The distance, which is optional."""
        return {name: Input("interval", None, True)}

    def build(self, x_shape, embed_shape):
        """Creates both dense layers, as wide as `embed`."""
        options = {"dtype": self.dtype_policy}
        self.hidden = Dense(embed_shape[-1], "silu", kernel_initializer=kernel_initializer(), **options)
        self.output_layer = Dense(embed_shape[-1], kernel_initializer="zeros", **options)
        self.hidden.build((embed_shape[0], self.waves))
        self.output_layer.build(embed_shape)

    def call(self, x, embed, training=None):
        """Maps {"interval": (batch,)}, or {}, to (batch, dim)."""
        distance = x["interval"] if "interval" in x else ops.cast(0.0 * embed[:, 0], "float32")
        return self.output_layer(self.hidden(self.embedding(distance)))

    def compute_output_spec(self, x, embed, training=None):
        """The specification of `embed`."""
        return keras.KerasTensor(embed.shape, self.compute_dtype)
