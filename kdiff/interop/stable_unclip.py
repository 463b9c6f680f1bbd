"""Stable unCLIP of diffusers: Stable Diffusion conditioned also on a noised image embedding.

| folder | here |
|---|---|
| `image_encoder`, `feature_extractor` | a frozen `PicturePrompt`; without them "embedding" is the input |
| `image_normalizer`, `image_noising_scheduler` | a `NoisedEmbedding`, which replaces the label |
| `prior`, `prior_scheduler`, `prior_text_encoder`, `prior_tokenizer` | the prior of an `UnCLIP` |

Step n of T corresponds to the level (n + 1) / T.

    model = load("stable-diffusion-2-1-unclip")
    model.sample(4, text="", picture=photo, picture_level=0.201, guidance=10.0)        # noise_level=200 in diffusers
    unclip = load("stable-diffusion-2-1-unclip-small")                                 # with a prior
    unclip.sample(4, text="a red circle", prior={"guidance": 4.0}, decoder={"guidance": 10.0})
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.blocks.embedded import NoisedEmbedding
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.encoders import PicturePrompt
from kdiff.encoders.picture_prompt import PICTURE
from kdiff.interop import folders, maps, priors, prompts, schedulers, unclip
from kdiff.interop.configs import Described, Key, complete
from kdiff.interop.files import read_json
from kdiff.interop.unet_keys import COUNT
from kdiff.schedules import NoiseSchedule

__all__ = ["CLASS", "NORMALIZER", "before", "conditioned", "noised", "noised_by"]

CLASS = ("stable_diffusion", "StableUnCLIPImageNormalizer")  # of `image_normalizer`, in `model_index.json`
NORMALIZER = {"embedding_dim": Key(768, COUNT)}


def before(folder: Path, index: Mapping[str, Any], strict: bool, variant: str | None) -> unclip.Before | None:
    """The models before the network of one of these pipelines; None for other pipelines."""
    if index.get("_class_name") not in prompts.UNCLIP:
        return None
    change = partial(conditioned, layer=noised(folder, variant), picture=_picture(folder, index, variant))
    if not folders.has(index, "prior"):
        return unclip.Before(change)
    text = unclip.prompt(folder / "prior_text_encoder", folder / "prior_tokenizer", variant)
    prior = unclip.prior_model(folder / "prior", folder / "prior_scheduler", text, strict, variant)
    return unclip.Before(change, prior)


def _picture(folder, index, variant) -> Callable[..., PicturePrompt] | None:
    if not folders.has(index, "image_encoder"):
        return None
    return partial(prompts.picture, folder / "image_encoder", folder / "feature_extractor", variant)


def noised(folder: Path, variant: str | None = None) -> NoisedEmbedding:
    """The condition from `image_normalizer` and `image_noising_scheduler`, without its dense layers."""
    part, source = folder / "image_normalizer", folder / maps.NOISING / "scheduler_config.json"
    width = complete(read_json(part / "config.json"), NORMALIZER, part / "config.json")["embedding_dim"]
    state = folders.read_weights(part, folders.variant_of(part, variant))
    codec = priors.prior_codec(state, part, ("mean", "std"))
    if extra := sorted(set(state) - {"mean", "std"}):
        raise ValueError(f"{part}: the weights must have only 'mean' and 'std'; found: {extra}")
    if not codec.mean.shape == codec.std.shape == (width,):
        raise ValueError(
            f"{part}: 'mean' and 'std' must have the size `embedding_dim`, {width}; received the shapes "
            f"{codec.mean.shape} and {codec.std.shape}"
        )
    schedule = schedulers.process(read_json(source), source).schedule
    if schedule.num_steps is None:
        raise ValueError(
            f"{source}: the scheduler must have a table, whose steps are the levels that the network receives"
        )
    return noised_by(schedule, codec.mean, codec.std)


def noised_by(schedule: NoiseSchedule, mean: np.ndarray, std: np.ndarray) -> NoisedEmbedding:
    """The condition with the levels of a schedule of T steps, without its dense layers."""
    waves = SinusoidalEmbedding(len(mean), scale=float(schedule.num_steps), offset=-1.0)
    return NoisedEmbedding(schedule, mean, std, waves, level=1.0 / schedule.num_steps)


def conditioned(
    described: Described, layer: NoisedEmbedding, picture: Callable[..., PicturePrompt] | None
) -> Described:
    """An unbuilt network with the embedding as a condition instead of the label.

    Args:
        described: the network, which takes the noised embedding and the sinusoidal features of the level as its label.
        layer: as from `noised`.
        picture: builds the image condition from that layer; None for embeddings as input.

    Raises:
        ValueError: if it takes another label.
    """
    network, shapes = described.network, dict(described.shapes)
    conditions, width = dict(network.conditions), len(layer.mean)
    label, shape = conditions.pop("label", None), shapes.pop("label", None)
    own = isinstance(label, MLPEmbedding) and isinstance(label.embedding, keras.layers.Identity)
    if not own or shape[-1] != 2 * width:
        raise ValueError(
            f"the network must take an embedding of width {width}, and one of its level of that width, as its label, "
            f"by the `class_embed_type` 'projection' of {2 * width}; it takes: {shape} by {label!r}"
        )
    layer = layer.clone(layer=label)
    name = "embedding" if picture is None else PICTURE
    conditions[name] = layer if picture is None else picture(layer=layer)
    if picture is not None and conditions[name].width != width:
        raise ValueError(f"the image encoder must have the output width {width}; received: {conditions[name].width}")
    network.conditions = conditions
    return Described(network, {**shapes, name: (None, width)})
