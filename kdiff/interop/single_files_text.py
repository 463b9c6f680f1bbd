"""The text encoders in a single file of Stable Diffusion 1, 2 or XL: CLIP's and OpenCLIP's."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.transformer import FeedForward, TransformerBlock
from kdiff.encoders import CLIPText, Prompt
from kdiff.encoders.base import Encoder
from kdiff.encoders.tokenizers import JSONTokenizer
from kdiff.interop import tokenizers
from kdiff.interop.arrays import State
from kdiff.interop.configs import explained
from kdiff.interop.encoder_names import CLIP_NAMES
from kdiff.interop.original import count_of, shape_of
from kdiff.interop.weights import Part, Rows, Slot, fill, slots
from kdiff.text import Tokenizer

__all__ = [
    "ENCODERS",
    "HEAD_WIDTH",
    "NOT_WEIGHTS",
    "OPEN_CLIP_BLOCKS",
    "OPEN_CLIP_NAMES",
    "open_clip_slots",
    "prompt_of",
]

ENCODERS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
# None of the three uses CLIP's projection of the vector.
NOT_WEIGHTS = re.compile(r"\.(position_ids|attn_mask|logit_scale|transformer\.text_projection\.weight)$")
HEAD_WIDTH = 64
OPEN_CLIP_BLOCKS = 23  # of 24 in version 2

OPEN_CLIP_NAMES = {
    CLIPText: {
        "token_embedding": "table",
        "positional_embedding": "positions",
        "transformer.resblocks.*": "blocks",
        "ln_final": "norm",
        "text_projection": Part("projection_layer", "same"),  # (width, projection)
    },
    TransformerBlock: {
        "ln_1": "self_attention.normalization",
        "attn": "self_attention.attention",
        "ln_2": "feed_forward.normalization",
        "mlp": "feed_forward",
    },
    MultiHeadAttention: {
        "in_proj": [Part(name, rows=Rows((i,), 3)) for i, name in enumerate(("query", "key", "value"))],
        "out_proj": "output_layer",
    },
    FeedForward: {"c_fc": "hidden", "c_proj": "output_layer"},
}
# Some arrays of OpenCLIP belong to no layer.
_BARE = {
    "in_proj.weight": "in_proj_weight",
    "in_proj.bias": "in_proj_bias",
    "positional_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def prompt_of(state: State, name: str, tokenizer: Any, xl: bool, skip: int, strict: bool) -> Prompt:
    """The text condition of a file: its encoders with their tokenizers.

    Args:
        state: the arrays.
        name: of the file, for errors.
        tokenizer, strict: as in `single_files.load`.
        xl: whether it is XL, which uses the penultimate states.
        skip: the number of final blocks to skip.

    Raises:
        ValueError: if the file has no text encoder, or weights do not match.
    """
    options = {"skip": skip + 1, "normalized": False} if xl else {"skip": skip}
    made: list[Encoder] = []
    opened: list[bool] = []
    for place in ENCODERS:
        for inner, make in (("transformer.", _clip), ("model.", _open_clip)):
            if any(key.startswith(place + inner) for key in state):
                made.append(make(state, name, place + inner, strict, **options))
                opened.append(make is _open_clip)
    if not made:
        raise ValueError(
            f"{name}: no text encoder was found under {list(ENCODERS)}; without a `tokenizer` the model takes "
            "embeddings"
        )
    with explained(name):
        return Prompt(made, _tokenizers(tokenizer, opened), zeros=xl and len(made) == 2)  # not in the refiner of XL


def _tokenizers(given: Any, opened: Sequence[bool]) -> list[Any]:
    if isinstance(given, (list, tuple)):
        return [_tokenizer(one) for one in given]
    one = _tokenizer(given)
    if not isinstance(one, JSONTokenizer) or not one.end:
        return [one for _ in opened]
    return [tokenizers.padded(one, 0 if open_clip else one.end[-1]) for open_clip in opened]


def _tokenizer(given: Any) -> Tokenizer:
    return tokenizers.load(given) if isinstance(given, (str, Path)) else Tokenizer.get(given)


def _clip(state: State, name: str, prefix: str, strict: bool, **options) -> Encoder:
    """CLIP's encoder in the layout of transformers, with the prefix "text_model." or, in version 5, without."""
    inner = f"{prefix}text_model."
    inner = inner if any(key.startswith(inner) for key in state) else prefix
    vocabulary, width = shape_of(state, f"{inner}embeddings.token_embedding.weight", name)
    with explained(name):
        encoder = CLIPText(
            vocabulary,
            shape_of(state, f"{inner}embeddings.position_embedding.weight", name)[0],
            width,
            count_of(state, f"{inner}encoder.layers"),
            max(1, width // HEAD_WIDTH),
            shape_of(state, f"{inner}encoder.layers.0.mlp.fc1.weight", name)[0],
            **options,
        )
    arrays = _weights(state, prefix)
    fill(encoder, (None, encoder.length), lambda one: slots(one, inner[:-1], CLIP_NAMES), arrays, name, strict)
    return encoder


def _open_clip(state: State, name: str, prefix: str, strict: bool, **options) -> Encoder:
    """OpenCLIP's encoder; for version 2 without the last of 24 blocks and the projection that follows."""
    second, blocks = prefix.startswith("cond_stage_model."), f"{prefix}transformer.resblocks"
    vocabulary, width = shape_of(state, f"{prefix}token_embedding.weight", name)
    depth = count_of(state, blocks)
    arrays = _weights(state, prefix)
    if second:
        unused = (f"{blocks}.{OPEN_CLIP_BLOCKS}.", f"{prefix}text_projection")
        depth = min(depth, OPEN_CLIP_BLOCKS)
        arrays = {key: array for key, array in arrays.items() if not key.startswith(unused)}
    with explained(name):
        encoder = CLIPText(
            vocabulary,
            shape_of(state, f"{prefix}positional_embedding", name)[0],
            width,
            depth,
            max(1, width // HEAD_WIDTH),
            shape_of(state, f"{blocks}.0.mlp.c_fc.weight", name)[0],
            "gelu",
            None if second else shape_of(state, f"{prefix}text_projection", name)[1],
            **options,
        )
    named = functools.partial(open_clip_slots, prefix=prefix)
    fill(encoder, (None, encoder.length), named, arrays, name, strict)
    return encoder


def open_clip_slots(encoder: CLIPText, prefix: str = "") -> Iterator[Slot]:
    """The names of the weights of CLIP's encoder of text in OpenCLIP."""
    for slot in slots(encoder, "", OPEN_CLIP_NAMES):
        ending = next((one for one in _BARE if slot.name.endswith(one)), "")
        yield slot._replace(name=prefix + slot.name.removesuffix(ending) + _BARE.get(ending, ""))


def _weights(state: State, prefix: str) -> State:
    return {key: array for key, array in state.items() if key.startswith(prefix) and not NOT_WEIGHTS.search(key)}
