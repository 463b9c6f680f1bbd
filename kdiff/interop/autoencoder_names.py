"""The names of the weights of autoencoders in diffusers and in the code of latent diffusion.

The layers of an encoder or a decoder are enumerated once; one table per code base gives their names.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import keras

from kdiff.blocks.attention import MultiHeadAttention, SelfAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.normalization import SpatialNorm
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.interop.unet_names import NAMES
from kdiff.interop.weights import Part, Slot, slots
from kdiff.networks.autoencoder import VQ, Convolutional
from kdiff.networks.autoencoder_tiny import AutoencoderTiny, TinyBlock

__all__ = [
    "DIFFUSERS_NAMES",
    "ORIGINAL_LAYERS",
    "ORIGINAL_NAMES",
    "SPATIAL",
    "diffusers_slots",
    "original_slots",
    "tiny_slots",
]

DIFFUSERS_NAMES = {
    "stem": "{half}.conv_in",
    "block": "{half}.{way}_blocks.{index}.resnets.{number}",
    "attention": "{half}.{way}_blocks.{index}.attentions.{number}",
    "resample": "{half}.{way}_blocks.{index}.{way}samplers.0",
    "middle": "{half}.mid_block.resnets.{number}",
    "middle_attention": "{half}.mid_block.attentions.0",
    "norm": "{half}.conv_norm_out",
    "head": "{half}.conv_out",
}
SPATIAL = {"norm_layer": "normalization", "conv_y": Part("scale", "pixel"), "conv_b": Part("shift", "pixel")}
ORIGINAL_NAMES = {
    "stem": "{half}.conv_in",
    "block": "{half}.{way}.{level}.block.{number}",
    "attention": "{half}.{way}.{level}.attn.{number}",
    "resample": "{half}.{way}.{level}.{way}sample",
    "middle": "{half}.mid.block_{one}",
    "middle_attention": "{half}.mid.attn_1",
    "norm": "{half}.norm_out",
    "head": "{half}.conv_out",
}
ORIGINAL_LAYERS = {
    ResidualBlock: {
        "norm1": "normalization",
        "conv1": "first",
        "norm2": "second_normalization",
        "conv2": "second",
        "nin_shortcut": "shortcut",
    },
    SelfAttention: {"norm": "normalization", "": "attention"},
    MultiHeadAttention: {
        "q": Part("query", "pixel"),
        "k": Part("key", "pixel"),
        "v": Part("value", "pixel"),
        "proj_out": Part("output_layer", "pixel"),
    },
    Downsample: {"conv": "convolution"},
    Upsample: {"conv": "last"},
}


def _places(network: Convolutional) -> Iterator[tuple[str, dict[str, Any], keras.layers.Layer]]:
    """(kind, position, layer) of all layers with weights in both halves; level 0 is the finest."""
    last = len(network.widths) - 1
    for half, way, layers in (("encoder", "down", network.encoder.layers), ("decoder", "up", network.decoder.layers)):
        here = {"half": half, "way": way}
        stem, *inner, norm, _, head = layers
        yield from (("stem", here, stem), ("norm", here, norm), ("head", here, head))
        count = 3 if network.attention else 2
        middle, levels = (inner[-count:], inner[:-count]) if way == "down" else (inner[:count], inner[count:])
        blocks = [layer for layer in middle if isinstance(layer, ResidualBlock)]
        yield from (("middle", {**here, "number": j, "one": j + 1}, layer) for j, layer in enumerate(blocks))
        yield from (("middle_attention", here, layer) for layer in middle if isinstance(layer, SelfAttention))
        index, number = 0, -1
        for layer in levels:
            number += isinstance(layer, ResidualBlock)
            where = {**here, "index": index, "level": index if way == "down" else last - index, "number": number}
            kinds = {ResidualBlock: "block", SelfAttention: "attention"}
            yield kinds.get(type(layer), "resample"), where, layer
            if type(layer) not in kinds:
                index, number = index + 1, -1


def _slots(network: Convolutional, formats: Mapping[str, str], names: Mapping) -> Iterator[Slot]:
    for what, where, layer in _places(network):
        if isinstance(layer, SelfAttention) and isinstance(layer.normalization, SpatialNorm):
            called = {**names, SelfAttention: {"spatial_norm": "normalization", "": "attention"}}
        else:
            called = names
        yield from slots(layer, formats[what].format(**where), called)
    before = network.to_latents if isinstance(network, VQ) else network.to_moments
    for name, layer in {"quant_conv": before, "post_quant_conv": network.from_latents}.items():
        yield from slots(layer, name, names)
    if isinstance(network, VQ):
        yield Slot("quantize.embedding.weight", network.codebook.table)


def original_slots(network: Convolutional) -> Iterator[Slot]:
    """The names of the weights in the original code of latent diffusion."""
    return _slots(network, ORIGINAL_NAMES, ORIGINAL_LAYERS)


def diffusers_slots(network: Convolutional) -> Iterator[Slot]:
    """The names of the weights of an `AutoencoderKL` or a `VQModel` of diffusers."""
    return _slots(network, DIFFUSERS_NAMES, {**NAMES, SpatialNorm: SPATIAL})


def tiny_slots(network: AutoencoderTiny) -> Iterator[Slot]:
    """The names of the weights of an `AutoencoderTiny` of diffusers."""
    for half in ("encoder", "decoder"):
        layers = getattr(network, half).layers
        counted = (layer for layer in layers if not isinstance(layer, keras.layers.ZeroPadding2D))
        for i, layer in enumerate(counted):
            parts = {f".conv.{2 * j}": one for j, one in enumerate(getattr(layer, "convolutions", ()))}
            for name, part in (parts if isinstance(layer, TinyBlock) else {"": layer}).items():
                yield from slots(part, f"{half}.layers.{i}{name}", {})
