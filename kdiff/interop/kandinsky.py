"""Kandinsky 2.2 in diffusers: a prior, whose folder has both encoders of CLIP, and a decoder of its embeddings.

| folder | here |
|---|---|
| of the prior: `prior`, `scheduler`, `text_encoder`, `tokenizer` | a model of embeddings, given a text |
| its `image_encoder`, `image_processor` | with the text encoder, the `clip` of an `UnCLIP` |
| of the decoder: `unet`, `scheduler`, `movq` | a model of images, with the condition "image_embeds" |

    prior, decoder = load("kandinsky-2-2-prior"), load("kandinsky-2-2-decoder")
    unclip = load("kandinsky-2-2-decoder", prior="kandinsky-2-2-prior")
    unclip.sample(1, text="a red circle", prior={"guidance": 4.0, "steps": 25}, decoder={"guidance": 4.0, "steps": 50})
    unclip.variations(photo, 4, decoder={"guidance": 4.0, "steps": 50})

In the `UnCLIP` "no image" is represented by the embedding of zero pixels (after CLIP's normalisation), as in the prior
of diffusers. One folder may hold both, with the prefix "prior_" for the parts of the prior.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff.blocks.conditions import OptionalCondition
from kdiff.encoders import Pair
from kdiff.interop import prompts, unclip
from kdiff.interop.configs import Described
from kdiff.interop.files import read_json
from kdiff.model import DiffusionModel

__all__ = ["COMBINED", "CONDITION", "DECODERS", "PRIORS", "absent_of", "before", "conditioned", "prior_of"]

PRIORS = ("KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
COMBINED = tuple(f"KandinskyV22{task}CombinedPipeline" for task in ("", "Img2Img", "Inpaint"))
DECODERS = tuple(f"KandinskyV22{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
CONDITION = "image_embeds"


class _Parts(NamedTuple):
    """The folders of the parts of a prior."""

    prior: Path
    scheduler: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path
    image_processor: Path


def _parts(folder: Path, prefix: str = "") -> _Parts:
    return _Parts(*(folder / f"{prefix}{name}" for name in _Parts._fields))


def prior_of(folder: Path, strict: bool = True, variant: str | None = None) -> DiffusionModel:
    """Loads the prior in a folder."""
    parts = _parts(folder)
    text = unclip.prompt(parts.text_encoder, parts.tokenizer, variant)
    return unclip.prior_model(parts.prior, parts.scheduler, text, strict, variant)


def before(
    folder: Path, index: Mapping[str, Any], prior: str | Path | None, strict: bool, variant: str | None
) -> unclip.Before | None:
    """The models before the network of a decoder; None if there is no prior.

    Args:
        folder: of the decoder.
        index: its `model_index.json`.
        prior: the folder of its prior; None for one in the same folder, if any.
        strict, variant: as in `diffusers.load`.

    Raises:
        ValueError: if `prior` is not a prior, or `folder` not such a decoder.
    """
    name = index.get("_class_name")
    if prior is None and name not in COMBINED:
        return None
    if prior is not None:
        kind = read_json(Path(prior) / "model_index.json").get("_class_name")
        if name not in DECODERS or kind not in PRIORS:
            raise ValueError(
                f"{folder}: `prior` must be the folder of one of {list(PRIORS)}, for one of {list(DECODERS)}; received "
                f"{kind!r} for {name!r}"
            )
    parts = _parts(folder, "prior_") if prior is None else _parts(Path(prior))
    text = unclip.prompt(parts.text_encoder, parts.tokenizer, variant)
    model = unclip.prior_model(parts.prior, parts.scheduler, text, strict, variant)
    clip = Pair(prompts.picture(parts.image_encoder, parts.image_processor, variant), text.through(None))
    return unclip.Before(partial(conditioned, absent=absent_of(clip)), model, clip, CONDITION)


def absent_of(clip: Pair) -> np.ndarray:
    """The embedding that represents no image: of zero pixels after CLIP's normalisation."""
    encoder = clip.picture.encoder
    pixels = np.zeros((1, encoder.size, encoder.size, encoder.channels), "float32")
    return ops.convert_to_numpy(encoder(pixels, training=False).vector)[0]


def conditioned(described: Described, absent: np.ndarray) -> Described:
    """An unbuilt network with the embedding that represents no image.

    Raises:
        ValueError: if it does not take an image embedding of this width.
    """
    network, shape = described.network, described.shapes.get(CONDITION)
    if shape is None or shape[-1] != len(absent):
        raise ValueError(
            f"the network must take embeddings of width {len(absent)}, as the prior returns; it takes {shape}"
        )
    layer = OptionalCondition(network.conditions[CONDITION], absent, dropout=0.0)
    network.conditions = {**network.conditions, CONDITION: layer}
    return described
