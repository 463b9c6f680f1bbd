"""Decoders of image embeddings as folders of diffusers, the inverse of `stable_unclip` and `kandinsky`.

| model | pipeline |
|---|---|
| a text, and a picture through a `NoisedEmbedding` | StableUnCLIPImg2Img |
| an `UnCLIP`: a prior, and a decoder of a text and a `NoisedEmbedding` | StableUnCLIP |
| "image_embeds" alone | KandinskyV22 |
| an `UnCLIP`: a prior, that decoder and a `Pair` | KandinskyV22Combined |
"""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.blocks.conditions import OptionalCondition
from kdiff.blocks.embedded import NoisedEmbedding
from kdiff.encoders import Pair, PicturePrompt
from kdiff.interop import kandinsky, prompts, saving_unclip, stable_unclip
from kdiff.interop.configs import Described
from kdiff.interop.files import read_json, write_json, write_safetensors
from kdiff.interop.scheduler_saving import scheduler_config, unclip_config
from kdiff.lora import ema_of
from kdiff.unclip import UnCLIP

__all__ = ["check", "conditioned_as", "noise_of", "save_before", "save_normalizer"]


def _noised(network: keras.Model) -> tuple[NoisedEmbedding, PicturePrompt | None] | None:
    """The noised embedding among the conditions, and the picture prompt that has it as its layer, if one does."""
    for one in network.conditions.values():
        layer = one.layer if isinstance(one, PicturePrompt) else one
        if isinstance(layer, NoisedEmbedding):
            return layer, one if isinstance(one, PicturePrompt) else None
    return None


def noise_of(network: keras.Model) -> Any:
    """The schedule that noises the embedding; None if none is noised.

    Raises:
        ValueError: if it has no table, whose steps are the levels in diffusers.
    """
    if (found := _noised(network)) is None:
        return None
    schedule = found[0].noise
    if getattr(schedule, "num_steps", None) is None:
        raise ValueError(f"{network.name}: diffusers noises an embedding by a table of steps; received: {schedule!r}")
    return schedule


def conditioned_as(described: Described, network: keras.Model) -> Described:
    """The unbuilt network with the conditions that `load` would give it for the image embeddings of `network`."""
    optional = network.conditions.get(kandinsky.CONDITION)
    if isinstance(optional, OptionalCondition) and optional.absent is not None:
        described = kandinsky.conditioned(described, optional.absent)
    if (noise := noise_of(network)) is None:
        return described
    layer, picture = _noised(network)
    own = None if picture is None else partial(PicturePrompt, picture.encoder, picture.mean, picture.std)
    return stable_unclip.conditioned(described, stable_unclip.noised_by(noise, *_moments(layer)), own)


def _moments(layer: NoisedEmbedding) -> list[np.ndarray]:
    """The mean and the standard deviation, each a vector."""
    width = layer.null.shape
    return [np.array(np.broadcast_to(value, width)) for value in (layer.mean, layer.std)]


def save_normalizer(network: keras.Model, folder: Path) -> dict[str, list[str]]:
    """Writes `image_normalizer` and the image encoder of Stable unCLIP; returns their entries of `model_index.json`."""
    if (found := _noised(network)) is None:
        return {}
    layer, picture = found
    part, (mean, std) = folder / "image_normalizer", _moments(layer)
    write_json(part / "config.json", {"_class_name": stable_unclip.CLASS[1], "embedding_dim": len(mean)})
    write_safetensors(part / "diffusion_pytorch_model.safetensors", {"mean": mean[None], "std": std[None]})
    encoder = {} if picture is None else prompts.save(picture, folder)
    return {part.name: list(stable_unclip.CLASS), **encoder}


def check(model: UnCLIP) -> None:
    """Raises a ValueError unless one of the pipelines has these parts."""
    name, found = model.embedding, model.decoder.network.conditions.get(model.embedding)
    pair = isinstance(model.clip, Pair) and None not in (model.clip.picture, model.clip.text)
    optional = isinstance(found, OptionalCondition) and found.absent is not None
    allowed = {"embedding": isinstance(found, NoisedEmbedding) and model.clip is None}
    allowed[kandinsky.CONDITION] = optional and pair
    if model.prior is None or model.upsamplers or not allowed.get(name):
        raise ValueError(
            f"{model.name}: for latents diffusers has a prior, no upsampler, and either a `NoisedEmbedding` as "
            f"'embedding' without `clip`, or an `OptionalCondition` with `absent` as {kandinsky.CONDITION!r} and a "
            f"`Pair` of both encoders; received: {model.prior!r}, {model.upsamplers}, {found!r} as {name!r} and "
            f"{model.clip!r}"
        )
    saving_unclip.text_of(model.prior, "text")
    if optional and not np.allclose(kandinsky.absent_of(model.clip), found.absent, atol=1e-4):
        raise ValueError(
            f"{model.name}: in diffusers the embedding of zero pixels represents no image; `absent` is another"
        )


def save_before(model: UnCLIP, folder: Path, ema: bool) -> None:
    """Adds the prior, and for Kandinsky its image encoder, to the folder of the decoder."""
    values, text = ema_of(model.prior) if ema else {}, saving_unclip.text_of(model.prior, "text")
    parts = prompts.save(text, folder, [("prior_text_encoder", "prior_tokenizer")])
    if model.embedding == kandinsky.CONDITION:
        pipeline, names, scheduler = kandinsky.COMBINED[0], ("prior_prior", "prior_scheduler"), unclip_config
        parts |= prompts.save(model.clip.picture, folder, picture=("prior_image_encoder", "prior_image_processor"))
    else:
        pipeline, names, scheduler = prompts.UNCLIP[0], ("prior", "prior_scheduler"), scheduler_config
    parts |= saving_unclip.save_prior(model.prior, folder, values, names, scheduler)
    path = folder / "model_index.json"
    write_json(path, {**read_json(path), **parts, "_class_name": pipeline})
