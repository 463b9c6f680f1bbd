"""Keras' dense layer and convolution, computed in each backend's fastest form."""

import keras

from kdiff import backend

__all__ = ["Conv2D", "Dense", "Direct"]


class Direct:
    """A mixin for layers that PyTorch calls by the hundred: without Keras' preparations, where they change nothing."""

    def __call__(self, *args, **kwargs):
        """As of any Keras layer."""
        if backend.needs_no_preparation(self, args, kwargs):
            return self.call(*args, **kwargs)
        return super().__call__(*args, **kwargs)


@keras.saving.register_keras_serializable("kdiff.blocks")
class Dense(Direct, keras.layers.Dense):
    """`activation(x kernel + bias)`: `keras.layers.Dense`, arguments and all."""

    def call(self, inputs):
        """(..., channels) to (..., units)."""
        y = backend.dense(inputs, self.kernel, self.bias)
        return y if self.activation is None else self.activation(y)


@keras.saving.register_keras_serializable("kdiff.blocks")
class Conv2D(Direct, keras.layers.Conv2D):
    """`activation(kernel * x + bias)` on maps: `keras.layers.Conv2D`, arguments and all, with channels last."""

    def __init__(self, filters: int, kernel_size, *args, **kwargs):
        super().__init__(filters, kernel_size, *args, **{"data_format": "channels_last", **kwargs})
        if self.data_format != "channels_last":
            raise ValueError(f"Conv2D: `data_format` must be 'channels_last'; received: {self.data_format!r}")

    def call(self, inputs):
        """(batch, height, width, channels) to (batch, height', width', filters)."""
        bias = self.bias if self.use_bias else None
        y = backend.convolution(inputs, self.kernel, bias, self.strides, self.padding, self.dilation_rate)
        return y if self.activation is None else self.activation(y)
