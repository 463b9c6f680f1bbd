"""Keras' dense layer and convolutions, in the fastest form on each backend."""

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.blocks.initializers import Normal

__all__ = ["Conv2D", "Dense", "DepthwiseConv2D", "Direct", "LowRank"]


class Direct:
    """A mixin that skips the overhead of Keras' `__call__` on PyTorch where it has no effect."""

    def __call__(self, *args, **kwargs):
        """Calls the layer, as for any Keras layer."""
        if backend.needs_no_preparation(self, args, kwargs):
            if not self._call_has_training_arg:
                kwargs.pop("training", None)
            return self.call(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class LowRank:
    """A mixin for layers with Keras' `enable_lora`: `x kernel + scale (x A) B`, with scale = lora_alpha / lora_rank.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), equation 3. Keras adds the product to the
    kernel in the compute precision, in which a small change is lost, and merges it when the layer is saved; A and B of
    a loaded layer are zero, and so are their gradients. Here the change is computed separately, and A and B are saved.
    """

    def _changed(self, inputs, bias):
        """The product with the kernel, plus `bias`, plus the low-rank change."""
        if not self.lora_enabled:
            return self._product(inputs, self.kernel, bias)
        change = backend.dense(self._product(inputs, self.lora_kernel_a, None), self.lora_kernel_b)
        return self._product(inputs, self._kernel, bias) + (self.lora_alpha / self.lora_rank) * change

    def enable_lora(self, rank, lora_alpha=None, a_initializer=None, b_initializer="zeros"):
        """As in Keras, with A ~ N(0, 1 / rank^2) by default; `lora_alpha` comes from a configuration, if any."""
        lora_alpha = self.lora_alpha if lora_alpha is None else lora_alpha
        super().enable_lora(rank, lora_alpha, a_initializer or Normal(1.0 / rank), b_initializer)
        for variable in (self.lora_kernel_a, self.lora_kernel_b):
            variable.averaged = variable.adapts = True

    def disable_lora(self) -> None:
        """Undoes `enable_lora`: A and B are discarded, and the kernel is unchanged."""
        for variable in (self.lora_kernel_a, self.lora_kernel_b):
            self._untrack_variable(variable)
        self.lora_kernel_a = self.lora_kernel_b = None  # deleting a variable makes Keras collect garbage
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None

    def save_own_variables(self, store):
        """Saves the kernel, quantized or not, and the bias as Keras does, and also A, B and the scale."""
        if not self.lora_enabled:
            super().save_own_variables(store)
            return
        self.lora_enabled = False  # Keras would merge A and B, and round the sum anew if the kernel is quantized
        try:
            super().save_own_variables(store)
        finally:
            self.lora_enabled = True
        store["lora_kernel_a"], store["lora_kernel_b"] = self.lora_kernel_a, self.lora_kernel_b
        store["lora_scale"] = np.float32(self.lora_alpha / self.lora_rank)

    def load_own_variables(self, store):
        """Loads the weights: a layer without LoRA merges A and B into its kernel; one with LoRA resets absent ones.

        A quantized kernel takes no A and B, which would be rounded with it: Keras raises a ValueError.
        """
        mergeable = "lora_scale" in set(store.keys()) and self.quantization_mode is None
        if not self.built or not (self.lora_enabled or mergeable):
            super().load_own_variables(store)
            return
        values = {name: np.asarray(store[name]) for name in set(store.keys())}
        a, b, scale = (values.pop(f"lora_{name}", None) for name in ("kernel_a", "kernel_b", "scale"))
        if not self.lora_enabled:
            change = scale * (a.astype("float32") @ b.astype("float32"))
            super().load_own_variables({**values, "0": values["0"] + change})
            return
        initial = ops.convert_to_numpy(self.lora_kernel_a).copy()
        super().load_own_variables(values)  # which sets A and B to zero, and so their gradients
        self.lora_kernel_a.assign(initial if a is None else a)
        if b is not None:
            self.lora_kernel_b.assign(b)
            self.lora_alpha = float(scale) * self.lora_rank


@keras.saving.register_keras_serializable("kdiff.blocks")
class Dense(LowRank, Direct, keras.layers.Dense):
    """`activation(x kernel + bias)`: `keras.layers.Dense`, with its arguments."""

    def quantize(self, mode=None, type_check=True, config=None):
        """Keras' own, which refuses the classes that derive from its layer."""
        super().quantize(mode, type_check=False, config=config)

    def __delattr__(self, name: str) -> None:
        """As Keras, but without collecting garbage after a variable is deleted, a second per layer in `quantize`."""
        if isinstance(variable := getattr(self, name), keras.Variable):
            self._untrack_variable(variable)
            super(keras.layers.Layer, self).__delattr__(name)
        else:
            super().__delattr__(name)

    def call(self, inputs):
        """Maps (..., channels) to (..., units)."""
        y = self._changed(inputs, self.bias)
        return y if self.activation is None else self.activation(y)

    def _product(self, inputs, kernel, bias):
        return backend.dense(inputs, kernel, bias)


class _AnyRank(Direct):
    """A mixin for Keras' 2-D convolutions, channels last, whose rank is that of the shape for which they are built.

    With arguments that are single numbers they are also convolutions of series (batch, length, channels) and of volumes
    (batch, depth, height, width, channels).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"data_format": "channels_last", **kwargs})
        if self.data_format != "channels_last":
            raise ValueError(
                f"{type(self).__name__}: `data_format` must be 'channels_last'; received: {self.data_format!r}"
            )
        self.input_spec = None

    def build(self, input_shape):
        """Creates kernel and bias for this rank."""
        self._take_rank(input_shape)
        backend.check_layout(f"{self.path}/kernel", self.rank + 2)
        super().build(input_shape)

    def compute_output_shape(self, input_shape):
        """(batch, *sizes, channels)."""
        self._take_rank(input_shape)
        return super().compute_output_shape(input_shape)

    def get_config(self):
        """As in Keras; arguments that are equal for all axes become one number."""
        config = super().get_config()
        return {**config, **{name: _shared(config[name]) for name in ("kernel_size", "strides", "dilation_rate")}}

    def _take_rank(self, shape):
        rank = len(shape) - 2
        if rank == self.rank:
            return
        sizes = (_shared(value) for value in (self.kernel_size, self.strides, self.dilation_rate))
        self.kernel_size, self.strides, self.dilation_rate = (self._for_each_axis(one, rank, shape) for one in sizes)
        self.rank = rank

    def _for_each_axis(self, value, rank, shape):
        if not isinstance(value, int) or rank not in (1, 2, 3):
            raise ValueError(
                f"{type(self).__name__}: the arguments {value} fix another number of axes; received the shape: "
                f"{tuple(shape)}"
            )
        return (value,) * rank


def _shared(values):
    """One number if the values of all axes are equal; otherwise the values."""
    return values[0] if len(set(values)) == 1 else values


@keras.saving.register_keras_serializable("kdiff.blocks")
class Conv2D(LowRank, _AnyRank, keras.layers.Conv2D):
    """`activation(kernel * x + bias)` on maps: `keras.layers.Conv2D`, with its arguments, channels last.

    The rank is that of the shape for which it is built: with arguments that are single numbers it is also a convolution
    of series (batch, length, channels) and of volumes (batch, depth, height, width, channels).
    """

    def build(self, input_shape):
        """Creates kernel and bias for this rank."""
        super().build(input_shape)
        backend.as_kernel(self._kernel)

    def call(self, inputs):
        """Maps (batch, height, width, channels) to (batch, height', width', filters)."""
        y = self._changed(inputs, self.bias)
        return y if self.activation is None else self.activation(y)

    def _product(self, inputs, kernel, bias):
        return backend.convolution(inputs, kernel, bias, self.strides, self.padding, self.dilation_rate)


@keras.saving.register_keras_serializable("kdiff.blocks")
class DepthwiseConv2D(_AnyRank, keras.layers.DepthwiseConv2D):
    """A convolution of each channel with its own kernels: `keras.layers.DepthwiseConv2D`, with its arguments.

    Channels last; of any rank, as `Conv2D`. Keras' own takes 15 times as long on JAX on a CPU (7x7, 32x32x64), and 3
    times on PyTorch; with gradients 5 times, and as long.
    """

    def call(self, inputs):
        """Maps (batch, height, width, channels) to (batch, height', width', channels * depth_multiplier)."""
        options = (self.strides, self.padding, self.dilation_rate)
        y = backend.depthwise_convolution(inputs, self.kernel, self.bias, *options)
        return y if self.activation is None else self.activation(y)
