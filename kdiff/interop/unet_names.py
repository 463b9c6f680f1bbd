"""The names of the weights of diffusers' U-Nets."""

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from kdiff.blocks.attention import MultiHeadAttention, SelfAttention
from kdiff.blocks.base import Chain
from kdiff.blocks.concat import Concat
from kdiff.blocks.conditions import OptionalCondition, VectorAndTokens
from kdiff.blocks.context_attention import AttentionPool, ContextAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embedded import NoisedEmbedding
from kdiff.blocks.embeddings import FourierEmbedding, GuidanceEmbedding, MLPEmbedding
from kdiff.blocks.normalization import AdaptiveNorm
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.blocks.transformer import FeedForward, SpatialTransformer, TransformerBlock
from kdiff.encoders.picture_prompt import PicturePrompt
from kdiff.encoders.prompt import Prompt
from kdiff.interop.weights import Slot, slots
from kdiff.networks.ncsnpp import NCSNpp
from kdiff.networks.unet import UNet, UNetEncoder

__all__ = ["MIXERS", "NAMES", "OLD_NAMES", "named_slots", "renamed", "unet_slots", "way_down_slots"]

NAMES = {
    MLPEmbedding: {"linear_1": "hidden", "linear_2": "output_layer"},
    GuidanceEmbedding: {"linear_1": "hidden", "linear_2": "output_layer", "cond_proj": "steering"},
    ContextAttention: {
        "group_norm": "normalization",
        "norm_cross": "context_normalization",
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "add_k_proj": "context_key",
        "add_v_proj": "context_value",
        "to_out.0": "output_layer",
    },
    AttentionPool: {"q_proj": "query", "k_proj": "key", "v_proj": "value"},
    ResidualBlock: {
        "norm1": "normalization",
        "conv1": "first",
        "time_emb_proj": ["projection", "second_normalization.projection"],
        "norm2": "second_normalization",
        "conv2": "second",
        "conv_shortcut": "shortcut",
    },
    AdaptiveNorm: {"": "normalization"},
    SelfAttention: {"group_norm": "normalization", "": "attention"},
    SpatialTransformer: {
        "norm": "normalization",
        "proj_in": "projection_in",
        "transformer_blocks.*": "blocks",
        "proj_out": "projection_out",
    },
    TransformerBlock: {
        "norm1": "self_attention.normalization",
        "attn1": "self_attention.attention",
        "norm2": "cross_attention.normalization",
        "attn2": "cross_attention.attention",
        "norm3": "feed_forward.normalization",
        "ff": "feed_forward",
    },
    FeedForward: {"net.0.proj": "hidden", "net.2": "output_layer"},
    MultiHeadAttention: {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "output_layer"},
    Downsample: {"conv": "convolution"},
    Upsample: {"conv": "last"},
}
MIXERS = (SelfAttention, SpatialTransformer, ContextAttention)
# Names of the attention of DDPM in older files.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_slots(network: UNet) -> Iterator[Slot]:
    """The names of the weights of a U-Net."""
    yield from named_slots(_named_layers(network))


def way_down_slots(network: UNetEncoder) -> Iterator[Slot]:
    """The names of the weights that it shares with a U-Net."""
    yield from named_slots(_named_way_down(network))


def named_slots(layers: Iterable[tuple[str, keras.layers.Layer]]) -> Iterator[Slot]:
    """The slots of layers of a U-Net, from the names of the layers."""
    for name, layer in layers:
        yield from slots(layer, name, NAMES)
        if isinstance(layer, AttentionPool):
            yield Slot(f"{name}.positional_embedding", layer.position.table)


def _named_way_down(network: UNetEncoder) -> Iterator[tuple[str, keras.layers.Layer]]:
    yield from {"conv_in": network.stem, "time_embedding": network.embedding}.items()
    for name, layer in network.conditions.items():
        yield from _condition(network, name, layer)
    if isinstance(network.embedding.embedding, FourierEmbedding):
        yield "time_proj", network.embedding.embedding
    down, last = iter(network.down), len(network.levels) - 1
    for i, level in enumerate(network.levels):
        for j in range(level.depth):
            yield from _unit(f"down_blocks.{i}", j, j, next(down).layers, "")
        if i < last:
            resampler = "resnet_down" if isinstance(network, NCSNpp) else "downsamplers.0"
            yield f"down_blocks.{i}.{resampler}", next(down).layers[0]
    yield from _bridge(network)


def _named_layers(network: UNet) -> Iterator[tuple[str, keras.layers.Layer]]:
    yield from _named_way_down(network)
    up, last = iter(network.up), len(network.levels) - 1
    for i, level in reversed(list(enumerate(network.levels))):
        plain = 0 if level.up_mixers is None else level.depth + 1 - level.up_mixers
        for j in range(level.depth + 1):
            yield from _unit(f"up_blocks.{last - i}", j, j - plain, next(up).layers, "upsamplers.0")
    yield from _skips(network, last) if isinstance(network, NCSNpp) else ()
    yield from {"conv_norm_out": network.normalization, "conv_out": network.head}.items()


def _condition(network: UNetEncoder, name: str, layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    """The layers of a condition: see `kdiff.interop.unet_conditions`."""
    while isinstance(layer, (Prompt, PicturePrompt, OptionalCondition)) and layer.layer is not None:
        layer = layer.layer
    both = isinstance(layer, VectorAndTokens)
    vector, tokens = (layer.vector, layer.tokens) if both else (layer, layer)
    if isinstance(layer, NoisedEmbedding):
        yield "class_embedding", layer.projection
    elif name == "label":
        yield "class_embedding", layer
    elif isinstance(layer, Concat) and layer.noise is not None:
        yield "class_embedding", layer.level_embedding
    elif name == "added":
        yield "add_embedding", layer.layer
    elif name == "context":
        beside = "image_embeds" in network.conditions and _has_tokens(network.conditions["image_embeds"])
        yield "encoder_hid_proj.text_proj" if beside else "encoder_hid_proj", tokens
        if both:
            words = ("norm1", "pool", "proj", "norm2")
            yield from ((f"add_embedding.{word}", one) for word, one in zip(words, _layers(vector), strict=True))
    elif name == "text_embeds":
        yield from zip(("add_embedding.text_proj", "add_embedding.text_norm"), _layers(layer), strict=True)
    elif name == "image_embeds":
        if _has_tokens(layer):
            first, _, *norm = _layers(tokens)
            yield from zip(("encoder_hid_proj.image_embeds", "encoder_hid_proj.norm"), (first, *norm), strict=False)
        if both or not _has_tokens(layer):
            yield from zip(("add_embedding.image_proj", "add_embedding.image_norm"), _layers(vector), strict=False)


def _layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return layer.layers if isinstance(layer, Chain) else [layer]


def _has_tokens(layer: keras.layers.Layer) -> bool:
    """Whether the layer maps a vector to tokens."""
    return any(isinstance(one, keras.layers.Reshape) for one in _layers(getattr(layer, "tokens", layer)))


def _unit(name, index, mixer, layers, after):
    """The layers of a unit: a block; a mixer, if any; the resampling, at the end of a level."""
    for layer in layers[1:]:
        yield f"{name}.{f'attentions.{mixer}' if isinstance(layer, MIXERS) else after}", layer
    yield f"{name}.resnets.{index}", layers[0]


def _skips(network: NCSNpp, last: int):
    """The layers of the progressive input and output."""
    for i, (inner, outer, grow) in enumerate(zip(network.inputs_down, network.outputs_up, network.grow, strict=True)):
        up = f"up_blocks.{last - 1 - i}"
        yield f"down_blocks.{i}.skip_conv", inner.convolution
        yield from {f"{up}.skip_norm": outer.normalization, f"{up}.skip_conv": outer.convolution}.items()
        yield f"{up}.resnet_up", grow.layers[0]


def _bridge(network):
    counts = {"attentions": 0, "resnets": 0}
    for layer in network.bridge.layers:
        name = "attentions" if isinstance(layer, MIXERS) else "resnets"
        yield f"mid_block.{name}.{counts[name]}", layer
        counts[name] += 1


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict with current names."""
    return {".".join(_renamed(name.split("."))): array for name, array in state.items()}


def _renamed(words: list[str]) -> list[str]:
    if "attentions" in words and len(words) > 1:
        words = [*words[:-2], OLD_NAMES.get(words[-2], words[-2]), words[-1]]
    return words
