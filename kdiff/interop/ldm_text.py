"""The text encoder of text-to-image latent diffusion, "bert" in a folder of diffusers: keys and weight names."""

from collections.abc import Iterator, Mapping
from typing import Any

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.transformer import TransformerBlock
from kdiff.encoders.ldm import LDMText
from kdiff.interop.arrays import State
from kdiff.interop.configs import Key, Keys, only, whole
from kdiff.interop.weights import Slot, slots

__all__ = ["KEYS", "NAMES", "arguments", "config_of", "ldm_slots", "ours"]

KEYS: Keys = {
    "vocab_size": Key(30522, whole(1, 10_000_000)),
    "max_position_embeddings": Key(77, whole(1)),
    "d_model": Key(1280, whole(1)),
    "encoder_layers": Key(32, whole(1, 256)),
    "encoder_attention_heads": Key(8, whole(1)),
    "head_dim": Key(64, whole(1)),
    "encoder_ffn_dim": Key(5120, whole(1)),
    "activation_function": only("gelu"),
    "scale_embedding": only(False),
}
_ARGUMENTS = {
    "vocabulary_size": "vocab_size",
    "length": "max_position_embeddings",
    "width": "d_model",
    "depth": "encoder_layers",
    "heads": "encoder_attention_heads",
    "head_width": "head_dim",
    "hidden": "encoder_ffn_dim",
    "activation": "activation_function",
}
NAMES = {
    LDMText: {
        "model.embed_tokens": "table",
        "model.embed_positions": "positions",
        "model.layers.*": "blocks",
        "model.layer_norm": "norm",
    },
    TransformerBlock: {
        "self_attn_layer_norm": "self_attention.normalization",
        "self_attn": "self_attention.attention",
        "final_layer_norm": "feed_forward.normalization",
        "fc1": "feed_forward.hidden",
        "fc2": "feed_forward.output_layer",
    },
    MultiHeadAttention: {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output_layer"},
}


def arguments(config: Mapping[str, Any], state: State) -> dict[str, Any]:
    """The arguments of `LDMText`."""
    return {name: config[key] for name, key in _ARGUMENTS.items()}


def config_of(encoder: LDMText) -> dict[str, Any]:
    """The configuration that `arguments` reads."""
    return {key: getattr(encoder, name) for name, key in _ARGUMENTS.items()}


def ldm_slots(encoder: LDMText) -> Iterator[Slot]:
    """The names of the weights."""
    return slots(encoder, "", NAMES)


def ours(state: State) -> State:
    """The arrays without the language-model head, which the encoding does not use."""
    return {name: array for name, array in state.items() if not name.startswith("to_logits.")}
