"""The transformer of Stable Diffusion 3 in diffusers: its configuration, in both directions, and its weight names.

    SD3Transformer2DModel    joint blocks of image and text, on latents; in 3.5 with normalised queries and keys and,
                             in "medium", a second attention of the image in some blocks

The table of positions is among the weights, and is read from there.
"""

import math
from collections.abc import Iterator
from typing import Any

import keras

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.joint import JointBlock
from kdiff.blocks.normalization import AdaptiveNorm, RMSNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.positions import PositionTable
from kdiff.blocks.transformer import FeedForward, adaptive_block
from kdiff.interop.configs import Described, Key, complete, listed, one_of, optional, whole
from kdiff.interop.transformers import NAMES as DIT_NAMES
from kdiff.interop.unet_keys import COUNT, image_shape
from kdiff.interop.weights import Layout, Part, Rows, Slot, slots
from kdiff.networks.mmdit import MMDiT
from kdiff.networks.published import text_vector

__all__ = ["NAMES", "SD3", "STEERING", "TABLE", "chunks", "mmdit", "mmdit_config", "mmdit_slots", "steering"]

SD3 = {
    "sample_size": Key(128, COUNT),
    "patch_size": Key(2, COUNT),
    "in_channels": Key(16, COUNT),
    "num_layers": Key(18, whole(1, 256)),
    "attention_head_dim": Key(64, COUNT),
    "num_attention_heads": Key(18, COUNT),
    "joint_attention_dim": Key(4096, COUNT),
    "caption_projection_dim": Key(1152, COUNT),
    "pooled_projection_dim": Key(2048, COUNT),
    "out_channels": Key(16, optional(COUNT)),
    "pos_embed_max_size": Key(96, COUNT),
    "dual_attention_layers": Key((), listed(whole(0, 255), 0, 256)),
    "qk_norm": Key(None, one_of(None, "rms_norm")),
}


def mmdit(config: dict[str, Any], source: Any) -> Described:
    """The network of an `SD3Transformer2DModel`: "context" is the tokens of the text, "text_embeds" its vector.

    Args:
        config: the configuration in the file.
        source: the file, for errors.
    """
    config = complete(config, SD3, source)
    heads, patch = config["num_attention_heads"], config["patch_size"]
    width = heads * config["attention_head_dim"]
    if config["caption_projection_dim"] != width:
        raise ValueError(
            f"{source}: `caption_projection_dim` must be the width of the blocks, {width}; received: "
            f"{config['caption_projection_dim']}"
        )
    network = MMDiT(
        width,
        config["num_layers"],
        patch,
        adaptive_block(heads, qk_norm=None if config["qk_norm"] is None else RMSNorm()),
        config["dual_attention_layers"],
        PositionTable(config["pos_embed_max_size"], config["sample_size"] // patch),
        MLPEmbedding(SinusoidalEmbedding(256), width),
        {"context": keras.layers.Identity(), "added": text_vector(width)},
        out_channels=config["out_channels"] or config["in_channels"],
    )
    shapes = {
        "image": image_shape(config),
        "context": (None, None, config["joint_attention_dim"]),
        "text_embeds": (None, config["pooled_projection_dim"]),
    }
    return Described(network, shapes)


def mmdit_config(network: MMDiT) -> dict[str, Any]:
    """The configuration of an `SD3Transformer2DModel`.

    Raises:
        ValueError: if diffusers does not support these conditions or positions.
    """
    attention = network.blocks[0].layers[0].image.self_attention.attention
    heads, width = attention._split
    added = getattr(network.conditions.get("added"), "layer", None)
    if {*network.conditions} != {"context", "added"} or not isinstance(added, MLPEmbedding):
        raise ValueError(
            f"{network.name}: Stable Diffusion 3 has a text context and a text vector, as in "
            f"`published.stable_diffusion_3()`; received: {network.conditions}"
        )
    if not isinstance(network.positions, PositionTable):
        raise ValueError(
            f"{network.name}: the positions of Stable Diffusion 3 are a PositionTable; received: {network.positions}"
        )
    base = network.positions.base_size or network.positions.size
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": int(base * network.patch),
        "patch_size": network.patch,
        "in_channels": network.patchify.projection.kernel.shape[0] // network.patch**2,
        "num_layers": network.depth,
        "attention_head_dim": width,
        "num_attention_heads": heads,
        "joint_attention_dim": network.projection.kernel.shape[0],
        "caption_projection_dim": network.width,
        "pooled_projection_dim": added.hidden.kernel.shape[0],
        "out_channels": network.head.channels,
        "pos_embed_max_size": network.positions.size,
        "dual_attention_layers": list(network.dual),
        "qk_norm": None if attention.qk_norm is None else "rms_norm",
    }


# --- names of weights


TABLE = Layout(  # of positions, flattened there
    lambda array: array.reshape(2 * (math.isqrt(array.shape[1]),) + array.shape[2:]),
    lambda array: array.reshape(1, -1, array.shape[-1]),
)


def chunks(layer: JointBlock) -> int:
    """The number of vectors from the first dense layer of the image: shift, scale and gate of each residual."""
    return 9 if layer.dual else 6


def steering(block: str, of: Any = 6) -> list[Part]:
    """The parts of the dense layer for shift, scale and gate of the attention and of the feed-forward layer.

    Args:
        block: the path of the `TransformerBlock`.
        of: the number of its vectors, or a function of the layer around the block.
    """

    def rows(*which):
        return lambda layer: Rows(which, of(layer) if callable(of) else of)

    return [
        Part(f"{block}.self_attention.normalization.projection", rows=rows(1, 0)),
        Part(f"{block}.self_attention.gate", rows=rows(2)),
        Part(f"{block}.feed_forward.normalization.projection", rows=rows(4, 3)),
        Part(f"{block}.feed_forward.gate", rows=rows(5)),
    ]


STEERING = [
    *steering("image", chunks),
    Part("dual_attention.normalization.projection", rows=Rows((7, 6), 9)),
    Part("dual_attention.gate", rows=Rows((8,), 9)),
]


def _of_text(path: str) -> list[str]:
    """A part of the attention of the text, in the last block and in the others."""
    return [f"text.self_attention.attention.{path}", f"text_attention.{path}"]


NAMES = {
    **{layer: DIT_NAMES[layer] for layer in (MLPEmbedding, Patchify, Unpatchify, FeedForward)},
    JointBlock: {
        "norm1.linear": STEERING,
        "norm1_context.linear": [*steering("text"), "text_norm.projection"],
        "attn": "image.self_attention.attention",
        "attn.add_q_proj": _of_text("query"),
        "attn.add_k_proj": _of_text("key"),
        "attn.add_v_proj": _of_text("value"),
        "attn.norm_added_q": _of_text("query_norm"),
        "attn.norm_added_k": _of_text("key_norm"),
        "attn.to_add_out": "text.self_attention.attention.output_layer",
        "attn2": "dual_attention.attention",
        "ff": "image.feed_forward",
        "ff_context": "text.feed_forward",
    },
    MultiHeadAttention: {
        **DIT_NAMES[MultiHeadAttention],
        "norm_q": "query_norm",
        "norm_k": "key_norm",
    },
    AdaptiveNorm: {"": "projection"},
}


def mmdit_slots(network: MMDiT) -> Iterator[Slot]:
    """The names of the weights of an `MMDiT`."""
    for name, layer in _named_layers(network):
        yield from slots(layer, name, NAMES)
    if isinstance(network.positions, PositionTable):
        yield Slot("pos_embed.pos_embed", network.positions.table, TABLE)


def _named_layers(network):
    yield "pos_embed.proj", network.patchify
    yield "time_text_embed.timestep_embedder", network.embedding
    yield "time_text_embed.text_embedder", network.conditions["added"].layer
    yield "context_embedder", network.projection
    for i, chain in enumerate(network.blocks):
        yield f"transformer_blocks.{i}", chain.layers[0]
    yield from {"norm_out.linear": network.last, "proj_out": network.head}.items()
