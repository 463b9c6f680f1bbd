"""Perceptual loss terms: the distance between features of an image and of its reconstruction in a trained network.

    Features(network)                                        any Keras model of images, by its outputs or named layers
    LPIPS(vgg16("vgg16.pth"), "lpips_vgg.pth")               with the calibrated heads of the LPIPS package

Nothing is downloaded: the user provides the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff.autoencoding.terms import Term
from kdiff.interop.files import State, read_state
from kdiff.interop.weights import Slot, assign

__all__ = ["LPIPS", "SCALE", "SHIFT", "VGG16", "Features", "vgg16"]

# The normalisation of images in [-1, 1] by ImageNet's mean and std (Zhang et al. 2018, their code).
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Features(Term):
    """The distance of normalised features, summed over layers and averaged over positions:

        sum_l mean_hw | f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)| |^2

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), equation 1, with
    equal weights. The network is not trained.

    Args:
        network: a built functional Keras model of images (batch, height, width, channels) in [-1, 1]; a first layer
            `Rescaling` can convert the range.
        layers: the names of the layers that are compared; None for all outputs.
        weight: the weight of the term.
    """

    def __init__(self, network: keras.Model, layers: Sequence[str] | None = None, weight: float = 1.0):
        super().__init__(weight)
        if not isinstance(network, keras.Model) or not network.built:
            raise TypeError(f"{type(self).__name__}: a built Keras model is expected; received: {network!r}")
        self.network = network
        self.layers = None if layers is None else list(layers)
        self._inner = network
        if layers is not None:
            self._inner = keras.Model(network.input, [network.get_layer(name).output for name in layers])
        network.trainable = self._inner.trainable = False

    def maps(self, images) -> list[Any]:
        """The features of images, float32."""
        return [ops.cast(one, "float32") for one in keras.tree.flatten(self._inner(images, training=False))]

    def call(self, x, y):
        return sum(self._distance(i, *pair) for i, pair in enumerate(zip(self.maps(x), self.maps(y), strict=True)))

    def _distance(self, index, a, b):
        return self._over_positions(ops.sum(ops.square(_unit(a) - _unit(b)), axis=-1))

    @staticmethod
    def _over_positions(x):
        axes = tuple(range(1, len(x.shape)))
        return ops.mean(x, axis=axes) if axes else x


def _unit(x):
    return x / (ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-20) + 1e-10)


class LPIPS(Features):
    """The learned perceptual distance: as `Features`, each channel weighted by a calibrated head.

        sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

    Zhang et al. (2018), equation 1. Images in [-1, 1] are normalised for the trunk, so the network must accept the same
    input as `vgg16`.

    Args:
        network: the trunk, with one output per head.
        heads: a file with the arrays "lin0.model.1.weight", ..., such as `weights/v0.1/vgg.pth` of the LPIPS package,
            or a mapping of these, or a list of arrays of channel weights.
        weight: the weight of the term.
    """

    def __init__(self, network: keras.Model, heads: Any, weight: float = 1.0):
        super().__init__(network, None, weight)
        self.heads = _heads(heads)
        widths = [output.shape[-1] for output in keras.tree.flatten(network.outputs)]
        if widths != [len(head) for head in self.heads]:
            received = [len(head) for head in self.heads]
            raise ValueError(f"LPIPS: the trunk returns maps of {widths} channels, but the heads are for {received}")

    def maps(self, images):
        shift, scale = ops.convert_to_tensor(SHIFT, "float32"), ops.convert_to_tensor(SCALE, "float32")
        return super().maps((images - shift) / scale)

    def _distance(self, index, a, b):
        head = ops.convert_to_tensor(self.heads[index], "float32")
        return self._over_positions(ops.sum(head * ops.square(_unit(a) - _unit(b)), axis=-1))


def _heads(heads: Any) -> list[list[float]]:
    if isinstance(heads, (str, Path)):
        heads = read_state(heads)
    if isinstance(heads, dict):
        names = [f"lin{i}.model.1.weight" for i in range(len(heads))]
        if missing := [name for name in names if name not in heads]:
            raise ValueError(f"LPIPS: `heads` must have {names}; missing: {missing}")
        heads = [heads[name] for name in names]
    return [np.asarray(ops.convert_to_numpy(head), "float64").reshape(-1).tolist() for head in heads]


# The widths of the convolutions of each stage (Simonyan & Zisserman 2015, column D).
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(source: str | Path | State | None = None, stages: Sequence[Sequence[int]] = VGG16) -> keras.Model:
    """The convolutions of VGG16, with an output after the last one of each stage: relu1_2, relu2_2, relu3_3, ...

    Args:
        source: a file of weights of torchvision, or its state dict: "features.0.weight", "features.0.bias",
            "features.2.weight", ... ; None for random weights.
        stages: the widths of the convolutions of each stage.

    Raises:
        ValueError: if the weights do not match.
    """
    x = inputs = keras.Input((None, None, 3))
    outputs, slots, place = [], [], 0
    options = {"data_format": "channels_last", "dtype": "float32"}
    for i, widths in enumerate(stages):
        if i:
            x, place = keras.layers.MaxPooling2D(data_format="channels_last")(x), place + 1
        for width in widths:
            layer = keras.layers.Conv2D(width, 3, padding="same", activation="relu", **options)
            x = layer(x)
            slots += [
                Slot(f"features.{place}.weight", layer.kernel, "convolution"),
                Slot(f"features.{place}.bias", layer.bias),
            ]
            place += 2  # the convolution and its ReLU
        outputs.append(x)
    network = keras.Model(inputs, outputs, name="vgg16")
    if source is not None:
        state = read_state(source) if isinstance(source, (str, Path)) else source
        assign(slots, {k: v for k, v in state.items() if k.startswith("features.")}, "VGG16")
    return network
