"""A workaround for Keras convolutions to one channel, which have no gradient with PyTorch on a CPU.

There Keras views a kernel (height, width, channels, 1) as (1, channels, height, width). With a first axis of 1 its
memory layout equals that of PyTorch's channels-last kernels, so it is not copied; but where oneDNN is not used, as for
a batch of one small map or in 16 bits on some CPUs, the gradient of such a kernel fails: "slow_conv2d: grad_weight must
be contiguous".
"""

from functools import partial
from typing import Any

import keras
from keras import ops

from kdiff.backend.running import BACKEND

__all__ = ["mend_convolutions"]


def mend_convolutions(network: keras.layers.Layer) -> None:
    """On PyTorch, adds a zero output channel inside Keras convolutions of a built network that have only one."""
    if BACKEND != "torch":
        return
    plain = keras.layers.Conv2D.convolution_op
    for layer in network._flatten_layers():
        if getattr(type(layer), "convolution_op", None) is plain and _is_refused(layer):
            layer.convolution_op = partial(_first_of_two, partial(plain, layer))


def _is_refused(layer: Any) -> bool:
    return layer.rank == 2 and layer.filters == 1 and layer.data_format == "channels_last"


def _first_of_two(convolve: Any, inputs: Any, kernel: Any) -> Any:
    return convolve(inputs, ops.pad(kernel, [(0, 0)] * 3 + [(0, 1)]))[..., :1]
