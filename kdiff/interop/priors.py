"""diffusers' `PriorTransformer`, of Karlo and Kandinsky: its configuration and the names of its weights.

| diffusers | here |
|---|---|
| `encoder_hidden_states`, `attention_mask` | the condition "context", tokens, and its optional input "context_mask" |
| `proj_embedding` | the condition "text_embeds", a vector |
| `clip_mean`, `clip_std` | the codec of the model, `codecs.Standard` |

Without a mask, which every pipeline passes, attention in diffusers is not causal; in kdiff it always is.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from kdiff.blocks.embedded import MaskedTokens
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.patterns import Causal
from kdiff.blocks.transformer import TransformerBlock
from kdiff.codecs import Standard
from kdiff.interop.arrays import State
from kdiff.interop.configs import Described, Key, complete, explained, only, optional, real, whole
from kdiff.interop.unet_keys import COUNT
from kdiff.interop.unet_names import NAMES
from kdiff.interop.weights import Layout, Slot, slots
from kdiff.networks.prior_transformer import PriorTransformer

__all__ = ["OF_CODEC", "PRIOR", "prior", "prior_codec", "prior_config", "prior_slots", "state_of_codec"]

PRIOR = {
    "num_attention_heads": Key(32, COUNT),
    "attention_head_dim": Key(64, COUNT),
    "num_layers": Key(20, whole(1, 256)),
    "embedding_dim": Key(768, COUNT),
    "num_embeddings": Key(77, COUNT),
    "additional_embeddings": only(4),
    "dropout": Key(0.0, real(0.0, 1.0)),
    "time_embed_act_fn": only("silu"),
    "norm_in_type": only(None),
    "embedding_proj_norm_type": only(None),
    "encoder_hid_proj_type": only("linear"),
    "added_emb_type": only("prd"),
    "time_embed_dim": Key(None, optional(COUNT)),
    "embedding_proj_dim": Key(None, optional(COUNT)),
    "clip_embed_dim": Key(None, optional(COUNT)),
}
OF_CODEC = ("clip_mean", "clip_std")


def prior(config: dict[str, Any], source: Any) -> Described:
    """The network of a `PriorTransformer`.

    Args:
        config: the configuration in the file.
        source: the file, for errors.
    """
    config = complete(config, PRIOR, source)
    heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
    width, size = heads * head_width, config["embedding_dim"]
    if config["time_embed_dim"] not in (None, width):
        raise ValueError(
            f"{source}: `time_embed_dim` must be the token width, {width}, to be loaded; received: "
            f"{config['time_embed_dim']}"
        )
    options = {"pattern": Causal(), "dropout": config["dropout"], "zero": False}
    network = PriorTransformer(
        width,
        config["num_layers"],
        TransformerBlock(heads, head_width, **options),
        MLPEmbedding(SinusoidalEmbedding(width), width),
        conditions={"context": MaskedTokens(), "text_embeds": keras.layers.Identity()},
        out_channels=config["clip_embed_dim"],
    )
    tokens, vector = (None, config["num_embeddings"], size), (None, config["embedding_proj_dim"] or size)
    return Described(network, {"image": (None, size), "context": tokens, "text_embeds": vector})


def prior_codec(state: State, source: Any = "the weights", names: tuple[str, str] = OF_CODEC) -> Standard:
    """The codec of the embeddings, from their mean and standard deviation, which have these names."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"{source}: the weights must have {list(names)}; missing: {missing}")
    with explained(source):
        return Standard(*(np.asarray(state[name], "float32").reshape(-1) for name in names))


def state_of_codec(codec: Standard, width: int) -> State:
    """The inverse of `prior_codec`."""
    values = (codec.mean, codec.std)
    return {name: np.array(np.broadcast_to(one, (1, width))) for name, one in zip(OF_CODEC, values, strict=True)}


def prior_config(network: PriorTransformer) -> dict[str, Any]:
    """The configuration in diffusers of a built prior with one condition of tokens and one vector."""
    attention = network.blocks[0].layers[0].self_attention.attention
    vectors = list(network.vector_projections.values())
    if len(vectors) != 1:
        raise ValueError(
            f"{network.name}: the prior of diffusers has one vector condition; this one has "
            f"{list(network.vector_projections)}"
        )
    heads, head_width = attention.split
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "num_layers": network.depth,
        "embedding_dim": network.stem.kernel.shape[0],
        "num_embeddings": network.positions.table.shape[0] - PRIOR["additional_embeddings"].default,
        "dropout": network.blocks[0].layers[0].dropout,
        "embedding_proj_dim": vectors[0].kernel.shape[0],
        "clip_embed_dim": network.out_channels,
    }


_ONE = Layout(lambda array: array[0], lambda array: array[None])
_QUERY = Layout(lambda array: array[0, 0], lambda array: array[None, None])


def prior_slots(network: PriorTransformer) -> Iterator[Slot]:
    """The names of the weights of a prior."""
    vector = next(iter(network.vector_projections.values()))
    layers = {"time_embedding": network.embedding, "proj_in": network.stem, "embedding_proj": vector}
    layers |= {"encoder_hidden_states_proj": network.token_projection, "norm_out": network.normalization}
    layers |= {f"transformer_blocks.{i}": chain.layers[0] for i, chain in enumerate(network.blocks)}
    for name, layer in {**layers, "proj_to_clip_embeddings": network.head}.items():
        yield from slots(layer, name, NAMES)
    yield Slot("positional_embedding", network.positions.table, _ONE)
    yield Slot("prd_embedding", network.query, _QUERY)
