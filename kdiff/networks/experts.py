"""An ensemble of two networks, one for high and one for low noise levels."""

from typing import Any

import keras
from keras import ops

from kdiff import deprecated
from kdiff.base import check_number
from kdiff.blocks.base import ConfigurableLayer

__all__ = ["ExpertDenoisers"]


class ExpertDenoisers(ConfigurableLayer, keras.Model):
    """Expert denoisers: one network above a time, another below, used as one network:

        output = clean(inputs) if time <= bound else noisy(inputs)

    Balaji et al., "eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers" (2022), section 3.1;
    Karlo's upsampler has a separate network for the last step. In a sampling step, where all examples have the same
    time, only one of the two is called; in training both are, and each is trained on its own times.

    Args:
        noisy, clean: networks with the same inputs, used directly, not copied.
        bound: the largest "time", as the networks receive it, for which `clean` is used.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if their inputs differ.
    """

    formerly = ("kdiff.networks>Experts",)

    def __init__(self, noisy: keras.layers.Layer, clean: keras.layers.Layer, bound: float = 0.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_number("ExpertDenoisers", "bound", bound, -1e9)
        self.noisy, self.clean, self.bound = noisy, clean, bound
        inputs = [sorted(getattr(network, "condition_inputs", {})) for network in (noisy, clean)]
        if inputs[0] != inputs[1]:
            raise ValueError(f"ExpertDenoisers: both networks must take the same conditions; received: {inputs}")
        if noisy.out_channels != clean.out_channels:
            raise ValueError(
                "ExpertDenoisers: both networks must have the same `out_channels`; received: "
                f"{[noisy.out_channels, clean.out_channels]}"
            )

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of `noisy`, which define the null inputs."""
        return self.noisy.conditions

    @property
    def condition_inputs(self) -> dict[str, Any]:
        """The inputs of `noisy`."""
        return self.noisy.condition_inputs

    @property
    def out_channels(self) -> int | None:
        """The output channels of both."""
        return self.noisy.out_channels

    def build(self, input_shape):
        """Builds both networks."""
        for network in (self.noisy, self.clean):
            if not network.built:
                network.build(input_shape)

    def call(self, inputs, training=None):
        """Maps the dictionary of inputs to the output of the network that applies to each example."""
        low = ops.less_equal(ops.cast(inputs["time"], "float32"), self.bound)

        def noisy():
            return self.noisy(inputs, training=training)

        def clean():
            return self.clean(inputs, training=training)

        def both():
            first, last = noisy(), clean()
            return ops.where(ops.reshape(low, (-1, *[1] * (len(first.shape) - 1))), last, first)

        if training:
            return both()
        return ops.cond(ops.all(low), clean, lambda: ops.cond(ops.any(low), both, noisy))

    def compute_output_spec(self, inputs, training=None):
        """The output specification of the networks."""
        return self.noisy.compute_output_spec(inputs, training)


__getattr__ = deprecated.names(__name__, Experts="ExpertDenoisers")
