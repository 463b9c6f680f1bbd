"""Keras' dense layer and convolution, computed in each backend's fastest form."""

import keras
import numpy as np

from kdiff import backend
from kdiff.blocks.initializers import Normal

__all__ = ["Conv2D", "Dense", "Direct", "LowRank"]


class Direct:
    """A mixin for layers that PyTorch calls by the hundred: without Keras' preparations, where they change nothing."""

    def __call__(self, *args, **kwargs):
        """As of any Keras layer."""
        if backend.needs_no_preparation(self, args, kwargs):
            return self.call(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class LowRank:
    """A mixin for layers with Keras' `enable_lora`: `x kernel + scale (x A) B`, with scale = lora_alpha / lora_rank.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), equation 3. Keras adds the product to the
    kernel in the precision of computing, where a small change is lost, and merges it when the layer is saved; loaded
    again A and B are zeros, and so are their gradients. Here the change is computed beside, and A and B are saved.
    """

    def _changed(self, inputs, bias):
        """The layer's product with its kernel, plus `bias`, plus the change."""
        if not self.lora_enabled:
            return self._product(inputs, self.kernel, bias)
        change = backend.dense(self._product(inputs, self.lora_kernel_a, None), self.lora_kernel_b)
        return self._product(inputs, self._kernel, bias) + (self.lora_alpha / self.lora_rank) * change

    def enable_lora(self, rank, lora_alpha=None, a_initializer=None, b_initializer="zeros"):
        """Keras' own, with A from N(0, 1 / rank^2) by default; `lora_alpha` is that of a configuration, if there is."""
        lora_alpha = self.lora_alpha if lora_alpha is None else lora_alpha
        super().enable_lora(rank, lora_alpha, a_initializer or Normal(1.0 / rank), b_initializer)

    def disable_lora(self) -> None:
        """The layer as it was before `enable_lora`: A and B are forgotten, and the kernel stays as it is."""
        for variable in (self.lora_kernel_a, self.lora_kernel_b):
            self._untrack_variable(variable)
        self.lora_kernel_a = self.lora_kernel_b = None  # to delete a variable Keras collects garbage, for a second
        self.lora_enabled, self.lora_rank, self.lora_alpha = False, None, None

    def save_own_variables(self, store):
        """Kernel and bias as Keras saves them, and A, B and the scale beside them."""
        if not self.lora_enabled or self._is_quantized():
            super().save_own_variables(store)
            return
        kept = [self._kernel] if self.bias is None else [self._kernel, self.bias]
        for i, variable in enumerate(kept):
            store[str(i)] = variable
        store["lora_kernel_a"], store["lora_kernel_b"] = self.lora_kernel_a, self.lora_kernel_b
        store["lora_scale"] = np.float32(self.lora_alpha / self.lora_rank)

    def load_own_variables(self, store):
        """What was saved; a layer without LoRA takes A and B into its kernel, and one with it begins anew without."""
        if self._is_quantized() or not self.built or not (self.lora_enabled or "lora_scale" in set(store.keys())):
            super().load_own_variables(store)
            return
        values = {name: np.asarray(store[name]) for name in set(store.keys())}
        kernel = values["0"]
        if not self.lora_enabled:
            a, b = (values[f"lora_kernel_{one}"].astype("float32") for one in "ab")
            kernel = kernel + values["lora_scale"] * (a @ b)
        elif "lora_scale" in values:
            self.lora_kernel_a.assign(values["lora_kernel_a"])
            self.lora_kernel_b.assign(values["lora_kernel_b"])
            self.lora_alpha = float(values["lora_scale"]) * self.lora_rank
        else:
            self.lora_kernel_b.assign(np.zeros(self.lora_kernel_b.shape, "float32"))
        self._kernel.assign(kernel)
        if self.bias is not None:
            self.bias.assign(values["1"])

    def _is_quantized(self) -> bool:
        return getattr(self, "quantization_mode", None) is not None


@keras.saving.register_keras_serializable("kdiff.blocks")
class Dense(LowRank, Direct, keras.layers.Dense):
    """`activation(x kernel + bias)`: `keras.layers.Dense`, arguments and all."""

    def call(self, inputs):
        """(..., channels) to (..., units)."""
        y = self._changed(inputs, self.bias)
        return y if self.activation is None else self.activation(y)

    def _product(self, inputs, kernel, bias):
        return backend.dense(inputs, kernel, bias)


@keras.saving.register_keras_serializable("kdiff.blocks")
class Conv2D(LowRank, Direct, keras.layers.Conv2D):
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
        y = self._changed(inputs, self.bias)
        return y if self.activation is None else self.activation(y)

    def _product(self, inputs, kernel, bias):
        return backend.convolution(inputs, kernel, bias, self.strides, self.padding, self.dilation_rate)


def _shared(values):
    """The number that all axes share; the numbers if they differ."""
    return values[0] if len(set(values)) == 1 else values


def _for_each_axis(value, rank, shape):
    if not isinstance(value, int) or rank not in (1, 2, 3):
        raise ValueError(
            f"Conv2D: with the arguments {value} for its axes, it is made for other maps; received: {tuple(shape)}"
        )
    return (value,) * rank
