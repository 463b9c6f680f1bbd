"""Stable Diffusion 3 and 3.5 in one file, in the layout of the original code.

    model.diffusion_model.                         the MMDiT: x_embedder, joint_blocks.0.x_block, .context_block, ...
    first_stage_model.                             the autoencoder
    text_encoders.clip_l.transformer.text_model.   the encoders of CLIP and T5 in the layout of transformers, if any
    text_encoders.clip_g.transformer.text_model.
    text_encoders.t5xxl.transformer.

`single_files.load` reads such a file. Sizes are inferred from the weights; other properties are as published: heads of
64 channels if queries are not normalised, a shift of 3, the scale and shift of the latents, and 256 tokens of T5.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.embeddings import MLPEmbedding
from kdiff.blocks.joint import JointBlock
from kdiff.blocks.normalization import AdaptiveNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.transformer import FeedForward, TransformerBlock
from kdiff.codecs import Latent
from kdiff.encoders import JointPrompt
from kdiff.encoders.base import Encoder
from kdiff.encoders.tokenizers import JSONTokenizer
from kdiff.interop import autoencoders, diffusers, encoders, prompts, schedulers, tokenizers
from kdiff.interop.arrays import State
from kdiff.interop.configs import explained
from kdiff.interop.mmdit import STEERING, TABLE, mmdit, steering
from kdiff.interop.original import count_of, shape_of
from kdiff.interop.transformers import patch_layout
from kdiff.interop.weights import Part, Rows, Slot, fill, slots
from kdiff.model import DiffusionModel
from kdiff.networks.mmdit import MMDiT
from kdiff.text import Tokenizer

__all__ = [
    "FACTOR",
    "HEAD_WIDTH",
    "NAMES",
    "SCALE",
    "SHIFT",
    "TEXT",
    "UNET",
    "is_one",
    "load",
    "sd3_config",
    "sd3_slots",
]

UNET = "model.diffusion_model."
TEXT = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.")
SCALE, SHIFT, FACTOR, HEAD_WIDTH = 1.5305, 0.0609, 8, 64
_ACTIVATIONS = ("quick_gelu", "gelu")  # of OpenAI's CLIP and of OpenCLIP
_SWAPPED = Part("projection", rows=Rows((1, 0), 2))  # shift, scale

NAMES = {
    MLPEmbedding: {"mlp.0": "hidden", "mlp.2": "output_layer"},
    Patchify: {"": Part("projection", patch_layout)},
    Unpatchify: {"": "projection"},
    AdaptiveNorm: {"": _SWAPPED},
    JointBlock: {
        "x_block": "image",
        "x_block.attn2": "dual_attention.attention",
        "x_block.adaLN_modulation.1": STEERING,
        "context_block": "text",
        "context_block.attn": "text_attention",
        "context_block.adaLN_modulation.1": [*steering("text"), Part("text_norm.projection", rows=Rows((1, 0), 2))],
    },
    TransformerBlock: {"attn": "self_attention.attention", "mlp": "feed_forward"},
    MultiHeadAttention: {
        "qkv": [Part(name, rows=Rows((i,), 3)) for i, name in enumerate(("query", "key", "value"))],
        "ln_q": "query_norm",
        "ln_k": "key_norm",
        "proj": "output_layer",
    },
    FeedForward: {"fc1": "hidden", "fc2": "output_layer"},
}


def is_one(state: State) -> bool:
    """Whether the arrays are those of Stable Diffusion 3, by their names."""
    return any(key.startswith(f"{UNET}joint_blocks.") for key in state)


def sd3_slots(network: MMDiT) -> Iterator[Slot]:
    """The names of the weights of an `MMDiT` in the code of Stable Diffusion 3, as in a full file."""
    for name, layer in _named_layers(network):
        yield from slots(layer, UNET + name, NAMES)
    yield Slot(f"{UNET}pos_embed", network.positions.table, TABLE)


def _named_layers(network):
    yield "x_embedder.proj", network.patchify
    yield "t_embedder", network.embedding
    yield "y_embedder", network.conditions["added"].layer
    yield "context_embedder", network.projection
    for i, chain in enumerate(network.blocks):
        yield f"joint_blocks.{i}", chain.layers[0]
    yield from {"final_layer.adaLN_modulation.1": network.last, "final_layer.linear": network.head}.items()


def sd3_config(state: State, name: str, size: int) -> dict[str, Any]:
    """The configuration of an `SD3Transformer2DModel` with such weights, for latents of this size."""
    width, channels, patch, _ = shape_of(state, f"{UNET}x_embedder.proj.weight", name, 4)
    depth = count_of(state, f"{UNET}joint_blocks")
    normed = f"{UNET}joint_blocks.0.x_block.attn.ln_q.weight"
    head_width = shape_of(state, normed, name, 1)[0] if normed in state else HEAD_WIDTH
    return {
        "sample_size": size,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(state, f"{UNET}final_layer.linear.weight", name)[0] // patch**2,
        "num_layers": depth,
        "attention_head_dim": head_width,
        "num_attention_heads": max(1, width // head_width),
        "joint_attention_dim": shape_of(state, f"{UNET}context_embedder.weight", name)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shape_of(state, f"{UNET}y_embedder.mlp.0.weight", name)[1],
        "pos_embed_max_size": math.isqrt(shape_of(state, f"{UNET}pos_embed", name, 3)[1]),
        "dual_attention_layers": [
            i for i in range(depth) if f"{UNET}joint_blocks.{i}.x_block.attn2.qkv.weight" in state
        ],
        "qk_norm": "rms_norm" if normed in state else None,
    }


def load(
    state: State,
    name: str,
    tokenizer: Any,
    image_size: int,
    clip_skip: int,
    strict: bool,
    options: Mapping[str, Any],
    codec: Latent | None = None,
    shift: float = 3.0,
    heads: int | None = None,
    following: int = prompts.SD3_LENGTH,
) -> DiffusionModel:
    """The model of a file; arguments as in `single_files.load`.

    Args:
        state: the arrays.
        name: of the file, for errors.
        tokenizer: of CLIP, for both encoders; or a list, one per encoder, the third for T5. None for no text encoders;
            without a third tokenizer T5 is skipped, and replaced by zeros, as in training.
        image_size: the default size of samples.
        clip_skip: the number of further final blocks of CLIP's encoders to skip.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: arguments of `DiffusionModel`.
        codec: instead of that of the file.
        shift: of the times of `sample`.
        heads: of the attention; None to infer it from the weights or the published value.
        following: without T5, the number of zero tokens that replace its tokens.

    Raises:
        ValueError: as in `single_files.load`.
    """
    first = any(key.startswith(autoencoders.FIRST_STAGE) for key in state)
    if codec is None and first and "codec" not in options:
        codec = autoencoders.from_state(state, name, SCALE, SHIFT, upcast=True, strict=strict)
    config = sd3_config(state, name, image_size // (codec.factor if isinstance(codec, Latent) else FACTOR))
    if heads is not None:
        width = config["caption_projection_dim"]
        config |= {"num_attention_heads": heads, "attention_head_dim": width // heads}
    prompt = None
    if tokenizer is not None:
        prompt = _prompt(state, name, tokenizer, config["joint_attention_dim"], clip_skip, strict, following)
    with explained(name):
        described = mmdit(config, name)
        described = described if prompt is None else prompts.conditioned(described, prompt)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    process = schedulers.process(scheduler, name)
    others = (autoencoders.FIRST_STAGE, "text_encoders.", "model_sampling.")
    mine = {key: array for key, array in state.items() if not key.startswith(others)}
    fill(described.network, {"time": (None,), **described.shapes}, sd3_slots, mine, name, strict)
    return diffusers.assembled(described, process, codec or "identity", options)


# --- text


def _prompt(
    state: State, name: str, tokenizer: Any, width: int, skip: int, strict: bool, following: int
) -> JointPrompt:
    parts = [{key.removeprefix(place): state[key] for key in state if key.startswith(place)} for place in TEXT]
    if not parts[0] or not parts[1]:
        raise ValueError(
            f"{name}: no text encoders were found under {list(TEXT[:2])}; without a `tokenizer` the model takes "
            "embeddings"
        )
    words = _tokenizers(tokenizer)
    if len(words) == 3 and not parts[2]:
        raise ValueError(f"{name}: a tokenizer of T5 was given, but there is no encoder under {TEXT[2]!r}")
    made: list[Encoder] = [
        _clip(part, f"{name}, {place}", activation, skip, strict)
        for part, place, activation in zip(parts, TEXT, _ACTIVATIONS, strict=False)
    ]
    if len(words) == 3:
        made.append(_t5(parts[2], f"{name}, {TEXT[2]}", strict))
    with explained(name):
        return JointPrompt(made, words, width, words[2].length if len(words) == 3 else following)


def _tokenizers(given: Any) -> list[Tokenizer]:
    if isinstance(given, (list, tuple)):
        return [_tokenizer(one, prompts.SD3_LENGTH if i == 2 else None) for i, one in enumerate(given)]
    one = _tokenizer(given)
    if not isinstance(one, JSONTokenizer) or not one.end:
        return [one, one]
    return [tokenizers.padded(one, one.end[-1]), tokenizers.padded(one, 0)]


def _tokenizer(given: Any, length: int | None = None) -> Tokenizer:
    return tokenizers.load(given, length) if isinstance(given, (str, Path)) else Tokenizer.get(given)


def _clip(part: State, name: str, activation: str, skip: int, strict: bool) -> Encoder:
    foreign = encoders.ENCODERS["clip_text_model"]
    arrays = {key: one for key, one in foreign.ours(part).items() if key != "logit_scale"}
    vocabulary, width = shape_of(arrays, "embeddings.token_embedding.weight", name)
    # The first encoder of the published file has no projection; the identity replaces it.
    projection = arrays.setdefault("text_projection.weight", np.eye(width, dtype="float32"))
    with explained(name):
        encoder = foreign.made(
            vocabulary,
            shape_of(arrays, "embeddings.position_embedding.weight", name)[0],
            width,
            count_of(arrays, "encoder.layers"),
            max(1, width // HEAD_WIDTH),
            shape_of(arrays, "encoder.layers.0.mlp.fc1.weight", name)[0],
            activation,
            projection.shape[0],
            skip=skip + 1,
            normalized=False,
        )
    fill(encoder, (None, encoder.length), foreign.slots, arrays, name, strict)
    return encoder


def _t5(part: State, name: str, strict: bool) -> Encoder:
    foreign = encoders.ENCODERS["t5"]
    arrays = foreign.ours(part)
    first = "encoder.block.0.layer."
    vocabulary, width = shape_of(arrays, "shared.weight", name)
    buckets, heads = shape_of(arrays, f"{first}0.SelfAttention.relative_attention_bias.weight", name)
    inner = shape_of(arrays, f"{first}0.SelfAttention.q.weight", name)[0]
    hidden = shape_of(arrays, f"{first}1.DenseReluDense.wo.weight", name)[1]
    with explained(name):
        encoder = foreign.made(
            vocabulary, width, count_of(arrays, "encoder.block"), heads, inner // heads, hidden, buckets=buckets
        )
    fill(encoder, (None, None), foreign.slots, arrays, name, strict)
    return encoder
