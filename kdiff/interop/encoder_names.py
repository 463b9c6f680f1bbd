"""The names and layouts of the weights of encoders in transformers."""

import math
from collections.abc import Iterator

import numpy as np

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.transformer import FeedForward, TransformerBlock
from kdiff.encoders.base import Encoder
from kdiff.encoders.clip import CLIPText, CLIPVision
from kdiff.encoders.t5 import T5Text
from kdiff.interop.arrays import Array, State, Stored
from kdiff.interop.transformers import patch_layout
from kdiff.interop.weights import Layout, Part, Slot, slots

__all__ = ["CLIP_NAMES", "T5_NAMES", "clip_slots", "joined", "split", "t5_slots", "without"]

CLIP_NAMES = {
    CLIPText: {
        "embeddings.token_embedding": "table",
        "embeddings.position_embedding": "positions",
        "encoder.layers.*": "blocks",
        "final_layer_norm": "norm",
        "text_projection": "projection_layer",
    },
    CLIPVision: {
        "embeddings.patch_embedding": Part("patchify.projection", lambda encoder: patch_layout(encoder.patchify)),
        "embeddings.position_embedding": "positions",
        "pre_layrnorm": "first_norm",
        "encoder.layers.*": "blocks",
        "post_layernorm": "norm",
        "visual_projection": "projection_layer",
    },
    TransformerBlock: {
        "layer_norm1": "self_attention.normalization",
        "self_attn": "self_attention.attention",
        "layer_norm2": "feed_forward.normalization",
        "mlp": "feed_forward",
    },
    MultiHeadAttention: {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output_layer"},
    FeedForward: {"fc1": "hidden", "fc2": "output_layer"},
}


def _query_layout(layer: MultiHeadAttention) -> Layout:
    """The kernel of T5's queries, whose logits are not divided by sqrt(head_width)."""
    factor = np.float32(math.sqrt(layer._split[1]))
    return Layout(lambda array: array.T * factor, lambda array: array.T / factor)


T5_NAMES = {
    T5Text: {
        "shared": "table",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "bias.table",
        "encoder.block.*": "blocks",
        "encoder.final_layer_norm": "norm",
    },
    TransformerBlock: {
        "layer.0.layer_norm": "self_attention.normalization",
        "layer.0.SelfAttention": "self_attention.attention",
        "layer.1.layer_norm": "feed_forward.normalization",
        "layer.1.DenseReluDense": "feed_forward",
    },
    MultiHeadAttention: {"q": Part("query", _query_layout), "k": "key", "v": "value", "o": "output_layer"},
    FeedForward: {"wi": "hidden", "wo": "output_layer"},
}


def clip_slots(encoder: Encoder) -> Iterator[Slot]:
    """The names of the weights of an encoder of CLIP."""
    yield from slots(encoder, "", CLIP_NAMES)
    if isinstance(encoder, CLIPVision):
        yield Slot("embeddings.class_embedding", encoder.first)


def t5_slots(encoder: Encoder) -> Iterator[Slot]:
    """The names of the weights of T5's encoder."""
    return slots(encoder, "", T5_NAMES)


def without(state: State, prefix: str, projection: str) -> State:
    """The arrays of one encoder of CLIP without its prefix, which transformers 5 omits in some files."""
    inner = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    whole = any(name.startswith(other) for name in state for other in ("text_model.", "vision_model."))
    inner = inner if whole else dict(state)
    inner |= {name: array for name, array in state.items() if name == projection}
    return {name: array for name, array in inner.items() if not name.endswith("position_ids")}


def joined(state: State) -> State:
    """The arrays of T5's encoder, with one token table, and both halves of a gated layer joined: value, gate."""
    arrays = {name: array for name, array in state.items() if not name.startswith(("decoder.", "lm_head."))}
    table = arrays.pop("encoder.embed_tokens.weight", None)
    if table is not None and not np.array_equal(table, arrays.setdefault("shared.weight", table)):
        arrays["encoder.embed_tokens.weight"] = table  # the second name is not expected
    for name in [name for name in arrays if name.endswith(".wi_0.weight")]:
        value = name.replace(".wi_0.", ".wi_1.")
        if value in arrays and arrays[value].shape == arrays[name].shape:
            arrays[name.replace(".wi_0.", ".wi.")] = _one_after_the_other(arrays.pop(value), arrays.pop(name))
    return arrays


def _one_after_the_other(first: Array, second: Array) -> Stored:
    """Two arrays of the same shape concatenated, read lazily."""
    shape = (2 * first.shape[0], *first.shape[1:])
    return Stored(shape, first.dtype, lambda: np.concatenate([np.asarray(first), np.asarray(second)]))


def split(state: State, encoder: Encoder) -> State:
    """The inverse of `joined`."""
    parts: State = {}
    for name, array in state.items():
        if encoder.glu and name.endswith(".wi.weight"):
            value, gate = np.split(array, 2)
            parts |= {name.replace(".wi.", ".wi_0."): gate, name.replace(".wi.", ".wi_1."): value}
        else:
            parts[name] = array
    return parts
