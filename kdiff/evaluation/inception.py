"""The Inception network of 2015 that defines the FID, from a file of its weights in the layout of PyTorch.

It differs from the Inception of torchvision and of `keras.applications`: Szegedy et al., "Rethinking the Inception
Architecture for Computer Vision" (2016), figures 5 to 7, as first published for TensorFlow, with 1008 logits, average
pools that exclude the padding, and a max pool instead of an average pool in the last block.
"""

import os
from collections.abc import Mapping
from typing import Any

import keras
from keras import layers

from kdiff.base import check_choice
from kdiff.evaluation.extractors import Extractor, Images
from kdiff.interop.files import read_state
from kdiff.interop.weights import Slot, assign

__all__ = ["BLOCKS", "InceptionFID", "inception", "norm_slots"]


def _a(pool):
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        ("average", ("branch_pool", pool, 1)),
    )


def _c(width):
    across, down = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, down), ("branch7x7dbl_3", width, across)]
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, across), ("branch7x7_3", 192, down)),
        (*double, ("branch7x7dbl_4", width, down), ("branch7x7dbl_5", 192, across)),
        ("average", ("branch_pool", 192, 1)),
    )


def _e(pool):
    across, down = (1, 3), (3, 1)
    single = [("branch3x3_2a", 384, across), ("branch3x3_2b", 384, down)]
    double = [("branch3x3dbl_3a", 384, across), ("branch3x3dbl_3b", 384, down)]
    return (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), single),
        (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), double),
        (pool, ("branch_pool", 192, 1)),
    )


# The blocks: branches whose outputs are concatenated. A branch is a sequence of convolutions and pools, last a list of
# parallel convolutions; a name that ends in "/2" has stride 2 and no padding.
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (("branch3x3/2", 384, 3),),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3/2", 96, 3)),
        ("smaller",),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, 1), ("branch3x3_2/2", 320, 3)),
        (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4/2", 192, 3),
        ),
        ("smaller",),
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}
_OPTIONS = {"data_format": "channels_last", "dtype": "float32"}
_POOLS = {
    "average": lambda: layers.AveragePooling2D(3, 1, "same", **_OPTIONS),
    "maximum": lambda: layers.MaxPooling2D(3, 1, "same", **_OPTIONS),
    "smaller": lambda: layers.MaxPooling2D(3, 2, "valid", **_OPTIONS),
}


def norm_slots(name: str, norm: layers.BatchNormalization) -> list[Slot]:
    """The weights of PyTorch's BatchNorm2d."""
    weights = (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    names = ("weight", "bias", "running_mean", "running_var")
    return [Slot(f"{name}.{end}", weight) for end, weight in zip(names, weights, strict=True)]


class _Builder:
    """Applies convolutions with normalisation and ReLU, and records the names of their weights in the file."""

    def __init__(self):
        self.slots: list[Slot] = []

    def unit(self, x, name, channels, kernel, padding="same"):
        stride = 2 if name.endswith("/2") else 1
        name, padding = name.removesuffix("/2"), "valid" if stride == 2 else padding
        convolution = layers.Conv2D(channels, kernel, stride, padding, use_bias=False, **_OPTIONS)
        norm = layers.BatchNormalization(epsilon=1e-3, dtype="float32")
        x = layers.ReLU(dtype="float32")(norm(convolution(x)))
        self.slots += [
            Slot(f"{name}.conv.weight", convolution.kernel, "convolution"),
            *norm_slots(f"{name}.bn", norm),
        ]
        return x

    def block(self, x, name, branches):
        ends = []
        for branch in branches:
            y = x
            for part in branch:
                if isinstance(part, str):
                    y = _POOLS[part]()(y)
                elif isinstance(part, list):
                    ends += [self.unit(y, f"{name}.{end}", *rest) for end, *rest in part]
                    y = None
                else:
                    y = self.unit(y, f"{name}.{part[0]}", *part[1:])
            ends += [] if y is None else [y]
        return layers.Concatenate(dtype="float32")(ends)


def inception(source: str | os.PathLike | Mapping[str, Any] | None = None) -> keras.Model:
    """The network: images (batch, height, width, 3), in [-1, 1], to "pool", (batch, 2048), and "logits", (batch, 1008).

    The logits have no bias, as in the definition of the inception score.

    Args:
        source: a file such as `pt_inception-2015-12-05-6726825d.pth`, as used by pytorch-fid, or its state dict; None
            for random weights.

    Raises:
        ValueError: if the weights do not match.
    """
    build = _Builder()
    inputs = keras.Input((None, None, 3), dtype="float32")
    x = build.unit(inputs, "Conv2d_1a_3x3/2", 32, 3)
    x = build.unit(x, "Conv2d_2a_3x3", 32, 3, "valid")
    x = build.unit(x, "Conv2d_2b_3x3", 64, 3)
    x = _POOLS["smaller"]()(x)
    x = build.unit(x, "Conv2d_3b_1x1", 80, 1)
    x = build.unit(x, "Conv2d_4a_3x3", 192, 3, "valid")
    x = _POOLS["smaller"]()(x)
    for name, branches in BLOCKS.items():
        x = build.block(x, name, branches)
    pool = layers.GlobalAveragePooling2D(**_OPTIONS)(x)
    last = layers.Dense(1008, use_bias=False, dtype="float32")
    network = keras.Model(inputs, {"pool": pool, "logits": last(pool)}, name="inception")
    if source is not None:
        state = dict(source) if isinstance(source, Mapping) else read_state(source)
        slots = [*build.slots, Slot("fc.weight", last.kernel, "dense")]
        beside = ("fc.bias", *(f"{slot.name[:-6]}num_batches_tracked" for slot in slots if "bn.weight" in slot.name))
        assign(slots, {name: array for name, array in state.items() if name not in beside}, "inception")
    network.trainable = False
    return network


class InceptionFID(Extractor):
    """The features of the FID: images resized to 299 pixels as in clean-fid, (x - 128) / 128, then pool3 (2048).

    Heusel et al. (2017). Only these features define the FID. Nothing is downloaded.

    Args:
        source: the file of weights, or its state dict, as in `inception`.
        output: "pool", the features; or "logits", for `InceptionScore(..., from_logits=True)`.
        batch_size: the number of images per call of the network.

    Raises:
        ValueError: if the weights do not match, or for another `output`.
    """

    def __init__(self, source: str | os.PathLike | Mapping[str, Any], output: str = "pool", batch_size: int = 32):
        check_choice("InceptionFID", "output", output, ("pool", "logits"))
        network = inception(source)
        chosen = keras.Model(network.input, network.output[output], name=f"inception.{output}")
        super().__init__(chosen, Images(299, 128 / 255, 128 / 255), batch_size=batch_size)
