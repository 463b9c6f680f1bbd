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
    """`activation(kernel * x + bias)` on maps: `keras.layers.Conv2D`, arguments and all, with channels last.

    Its rank is that of what it is built for: with numbers for all axes it is as well a convolution of series (batch,
    length, channels) and of volumes (batch, depth, height, width, channels).
    """

    def __init__(self, filters: int, kernel_size, *args, **kwargs):
        super().__init__(filters, kernel_size, *args, **{"data_format": "channels_last", **kwargs})
        if self.data_format != "channels_last":
            raise ValueError(f"Conv2D: `data_format` must be 'channels_last'; received: {self.data_format!r}")
        self.input_spec = None

    def build(self, input_shape):
        """Makes kernel and bias, for this rank."""
        self._take_rank(input_shape)
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        """(batch, *sizes, filters)."""
        self._take_rank(input_shape)
        return super().compute_output_shape(input_shape)

    def get_config(self):
        """Keras' own; numbers that all axes share are one number."""
        config = super().get_config()
        return {**config, **{name: _shared(config[name]) for name in ("kernel_size", "strides", "dilation_rate")}}

    def _take_rank(self, shape):
        rank = len(shape) - 2
        if rank == self.rank:
            return
        sizes = (_shared(value) for value in (self.kernel_size, self.strides, self.dilation_rate))
        self.kernel_size, self.strides, self.dilation_rate = (_for_each_axis(value, rank, shape) for value in sizes)
        self.rank = rank

    def call(self, inputs):
        """(batch, height, width, channels) to (batch, height', width', filters)."""
        bias = self.bias if self.use_bias else None
        y = backend.convolution(inputs, self.kernel, bias, self.strides, self.padding, self.dilation_rate)
        return y if self.activation is None else self.activation(y)


def _shared(values):
    """The number that all axes share; the numbers if they differ."""
    return values[0] if len(set(values)) == 1 else values


def _for_each_axis(value, rank, shape):
    if not isinstance(value, int) or rank not in (1, 2, 3):
        raise ValueError(
            f"Conv2D: with the arguments {value} for its axes, it is made for other maps; received: {tuple(shape)}"
        )
    return (value,) * rank
