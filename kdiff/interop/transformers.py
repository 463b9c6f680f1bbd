"""Transformers of diffusers: the configuration of DiT and the names of its weights.

    DiTTransformer2DModel    DiT on latents, with classes

In older files the class is `Transformer2DModel`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import AdaptiveNorm, LayerNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.transformer import TransformerBlock, adaptive_block
from kdiff.interop.configs import FLAG, Described, Key, complete, one_of, only, optional, real, whole
from kdiff.interop.files import State
from kdiff.interop.unet_keys import COUNT, image_shape
from kdiff.interop.unet_names import NAMES as UNET_NAMES
from kdiff.interop.weights import Layout, Part, Rows, Slot, slots
from kdiff.networks.dit import DiT

__all__ = ["ACTIVATIONS", "DIT", "NAMES", "OLD_DEFAULTS", "OLD_DIT", "dit", "dit_slots", "patch_layout", "told"]

DIT = {
    "num_attention_heads": Key(16, COUNT),
    "attention_head_dim": Key(72, COUNT),
    "in_channels": Key(4, COUNT),
    "out_channels": Key(None, optional(COUNT)),
    "num_layers": Key(28, whole(1, 256)),
    "dropout": Key(0.0, real(0.0, 1.0)),
    "norm_num_groups": Key(32, COUNT),
    "attention_bias": Key(True, FLAG),
    "sample_size": Key(32, COUNT),
    "patch_size": Key(2, COUNT),
    "activation_fn": Key("gelu-approximate", one_of("gelu-approximate", "gelu")),
    "num_embeds_ada_norm": Key(1000, whole(1, 10_000_000)),
    "upcast_attention": Key(False, FLAG),  # float32 logits, as always in kdiff
    "norm_type": only("ada_norm_zero"),
    "norm_elementwise_affine": only(False),
    "norm_eps": Key(1e-5, real(0.0, 1.0)),  # of the normalisation of the feed-forward layer; others have _NORM_EPS
}
_NORM_EPS = 1e-6
# The former class of DiT, `Transformer2DModel`, has many uses and so other defaults. Its own keys have no meaning for
# DiT, except with these values.
OLD_DEFAULTS = {
    "attention_head_dim": 88,
    "in_channels": None,
    "num_layers": 1,
    "attention_bias": False,
    "sample_size": None,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
}
OLD_DIT = {
    **{name: Key(OLD_DEFAULTS.get(name, key.default), key.rule) for name, key in DIT.items()},
    "attention_type": only("default"),
}
ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}


def dit(config: dict[str, Any], source: Any, separate: bool = False) -> Described:
    """The network of a `DiTTransformer2DModel`: the condition "label" is a class, or the number of classes for none.

    Args:
        config: the configuration in the file.
        source: the file, for errors.
        separate: whether each block has its own embeddings, as in networks trained with diffusers.
    """
    config = complete(config, OLD_DIT if config.get("_class_name") == "Transformer2DModel" else DIT, source)
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    options = {"bias": config["attention_bias"], "dropout": config["dropout"]}
    if config["norm_eps"] != _NORM_EPS:
        options["normalization"] = [LayerNorm(epsilon, affine=False) for epsilon in (_NORM_EPS, config["norm_eps"])]
    network = DiT(
        width,
        config["num_layers"],
        config["patch_size"],
        adaptive_block(heads, activation=ACTIVATIONS[config["activation_fn"]], **options),
        embedding=MLPEmbedding(SinusoidalEmbedding(256, shift=1), width),
        conditions={"label": LabelEmbedding(config["num_embeds_ada_norm"], dropout=0.1)},
        out_channels=config["out_channels"] or config["in_channels"],
        separate=separate,
    )
    return Described(network, {"image": image_shape(config), "label": (None,)})


def told(state: State, index: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the embeddings of the blocks differ, which only the weights show."""
    found = [(name, re.fullmatch(r"transformer_blocks\.\d+\.(norm1\.emb\..+)", name)) for name in state]
    pairs = [(state[name], state.get(f"transformer_blocks.0.{one[1]}")) for name, one in found if one]
    return {"separate": any(a is not None and not np.array_equal(a, b) for a, b in pairs)}


# --- names of weights


def patch_layout(layer: Patchify | Unpatchify) -> Layout:
    """The layout of the convolution with stride `size`, (width, channels, size, size)."""

    def theirs(kernel):
        return kernel.reshape(layer.size, layer.size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)

    return Layout(lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]), theirs)


NAMES = {
    **{layer: UNET_NAMES[layer] for layer in UNET_NAMES if layer is not AdaptiveNorm},
    MLPEmbedding: {"linear_1": "hidden", "linear_2": "output_layer"},
    # One dense layer returns shift, scale and gate of the attention, then of the feed-forward layer.
    TransformerBlock: {
        "norm1.linear": [
            Part("self_attention.normalization.projection", rows=Rows((1, 0), 6)),
            Part("self_attention.gate", rows=Rows((2,), 6)),
            Part("feed_forward.normalization.projection", rows=Rows((4, 3), 6)),
            Part("feed_forward.gate", rows=Rows((5,), 6)),
        ],
        "attn1": "self_attention.attention",
        "ff": "feed_forward",
    },
    AdaptiveNorm: {"": Part("projection", rows=Rows((1, 0), 2))},
    Patchify: {"": Part("projection", patch_layout)},
    Unpatchify: {"": "projection"},
}


def dit_slots(network: DiT) -> Iterator[Slot]:
    """The names of the weights of a DiT. Each block holds embeddings of time and class, or copies of the first's."""
    for name, layer in _named_layers(network):
        yield from slots(layer, name, NAMES)


def _named_layers(network):
    yield "pos_embed.proj", network.patchify
    for i, chain in enumerate(network.blocks):
        yield f"transformer_blocks.{i}", chain.layers[0]
        own = network.steering[i - 1] if i and network.separate else network
        yield f"transformer_blocks.{i}.norm1.emb.timestep_embedder", own.embedding
        yield f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table", own.conditions["label"]
    yield from {"proj_out_1": network.last, "proj_out_2": network.head}.items()
