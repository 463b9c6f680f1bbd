"""A `kdiff.UnCLIP` as the folder of Karlo for diffusers, the inverse of `kdiff.interop.unclip`: an `UnCLIPPipeline`,
or, without a prior, an `UnCLIPImageVariationPipeline`.

The index names the module of one class, `LIBRARY`, as diffusers 0.42 needs it: with the names in published folders,
"unclip", and in those that it writes, "diffusers", it finds no class.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from kdiff import deprecated
from kdiff.blocks.concat import Concat
from kdiff.blocks.embedded import ImageEmbedding
from kdiff.codecs import Standard
from kdiff.encoders import Pair, Prompt
from kdiff.interop import maps, priors, prompts, schedulers, unclip, unet_names, unets
from kdiff.interop.arrays import State
from kdiff.interop.files import write_json, write_safetensors
from kdiff.interop.saving_networks import check_same
from kdiff.interop.saving_unets import unet_config
from kdiff.interop.scheduler_saving import unclip_config
from kdiff.interop.weights import export
from kdiff.lora import ema_of
from kdiff.model import DiffusionModel
from kdiff.networks.experts import ExpertDenoisers
from kdiff.networks.prior_transformer import PriorTransformer
from kdiff.networks.unet import UNet
from kdiff.unclip import UnCLIP

__all__ = ["LIBRARY", "save", "save_prior", "text_of"]

LIBRARY = "diffusers.pipelines.deprecated.unclip.text_proj"


@deprecated.arguments(averages="ema")
def save(model: UnCLIP, folder: str | Path, ema: bool = True) -> None:
    """Writes the folder.

    Args:
        model: as from `unclip.load`: a prior, or instead a `Pair`; a decoder; one upsampler of two networks. With both,
            the `clip` is not written, since the pipeline has no place for it.
        folder, ema: as in `diffusers.save`.

    Raises:
        ValueError: if diffusers does not support the pipeline, network or scheduler.
    """
    folder, upsamplers = Path(folder), model.upsamplers
    experts = upsamplers[0].network if len(upsamplers) == 1 else None
    vision = model.clip.picture if model.prior is None and isinstance(model.clip, Pair) else None
    if not isinstance(experts, ExpertDenoisers) or experts.bound != 0 or (model.prior is None and vision is None):
        raise ValueError(
            f"{model.name}: the pipeline needs a prior, or a `clip` of an `encoders.Pair` with a picture, and one "
            f"upsampler, `ExpertDenoisers` with `bound` 0; received: {model.prior!r}, {model.clip!r} and {upsamplers}"
        )
    values = [ema_of(one) if ema else {} for one in (model.decoder, upsamplers[0])]
    text = text_of(model.decoder, "text")
    index = prompts.save(text, folder, prompts.PARTS[:1])
    if model.prior is not None:
        if text_of(model.prior, "text").encoders[0] is not text.encoders[0]:
            raise ValueError(f"{model.name}: prior and decoder share one text encoder in diffusers; these have two")
        index |= save_prior(model.prior, folder, ema_of(model.prior) if ema else {})
    else:
        index |= prompts.save(vision, folder)
    index |= _save_decoder(model.decoder, folder, values[0])
    for name, network in {"super_res_first": experts.noisy, "super_res_last": experts.clean}.items():
        index |= _save_upsampler(network, folder / name, values[1])
    index |= _save_scheduler(upsamplers[0], folder / "super_res_scheduler")
    write_json(folder / "model_index.json", {"_class_name": unclip.PIPELINES[model.prior is None], **index})


def text_of(model: DiffusionModel, name: str) -> Prompt:
    """Its text condition, or a ValueError if the pipelines with a prior have no such one."""
    found = model.network.conditions.get(name)
    if not isinstance(found, Prompt) or not found.masked:
        raise ValueError(
            f"{model.name}: the condition {name!r} must be a masked `Prompt` for diffusers; received: {found!r}"
        )
    return found


def _write(folder: Path, config: Mapping[str, Any], state: State) -> dict[str, list[str]]:
    """Writes a part; returns its entry for `model_index.json`."""
    write_json(folder / "config.json", config)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)
    return {folder.name: ["diffusers", config["_class_name"]]}


def _save_scheduler(model: DiffusionModel, folder: Path, config: Callable = unclip_config) -> dict[str, list[str]]:
    found = config(schedulers.Process(model.schedule, model.prediction, model.time_label, model.sampler))
    write_json(folder / "scheduler_config.json", found)
    return {folder.name: ["diffusers", found["_class_name"]]}


def save_prior(
    model: DiffusionModel,
    folder: Path,
    values: Mapping[int, Any],
    names: tuple[str, str] = ("prior", "prior_scheduler"),
    scheduler: Callable = unclip_config,
) -> dict[str, list[str]]:
    """Writes a prior and its scheduler; returns their entries of `model_index.json`.

    Args:
        model: the model of embeddings.
        folder: of the pipeline.
        values: averaged weights, as from `ema_of`.
        names: of the folders of the prior and of its scheduler.
        scheduler: the configuration from a `Process`: `unclip_config` or `scheduler_config`.
    """
    network, codec = model.network, model.codec
    if not isinstance(network, PriorTransformer) or not isinstance(codec, Standard):
        raise ValueError(
            f"{model.name}: the prior must be a PriorTransformer on `Standard`; received: {network!r} on {codec!r}"
        )
    config = priors.prior_config(network)
    again = unclip.prior_of_text(priors.prior(config, folder), text_of(model, "text"))
    check_same(network, again.network)
    state = {**export(priors.prior_slots(network), values), **priors.state_of_codec(codec, config["embedding_dim"])}
    return {**_write(folder / names[0], config, state), **_save_scheduler(model, folder / names[1], scheduler)}


def _save_decoder(model: DiffusionModel, folder: Path, values) -> dict[str, list[str]]:
    network, text = model.network, text_of(model, "text")
    embedding = network.conditions.get("embedding")
    if not isinstance(network, UNet) or not isinstance(embedding, ImageEmbedding):
        raise ValueError(
            f"{model.name}: the decoder must be a UNet with an `ImageEmbedding` as 'embedding'; received: {network!r}"
        )
    config = unet_config(network, {"context": keras.layers.Identity(), "label": keras.layers.Identity()})
    of_text = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": embedding.tokens,
        "clip_embeddings_dim": embedding.to_vector.kernel.shape[0],
        "time_embed_dim": embedding.to_vector.kernel.shape[1],
        "cross_attention_dim": embedding.width,
    }
    again = unclip.decoder(config, {n: v for n, v in of_text.items() if n[0] != "_"}, text, folder).network
    check_same(network, again)
    state, prefix = export(unclip.decoder_slots(network), values), "text_proj."
    own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    index = _write(folder / "decoder", config, {n: one for n, one in state.items() if not n.startswith(prefix)})
    _write(folder / "text_proj", of_text, own)
    index["text_proj"] = [LIBRARY, of_text["_class_name"]]
    return {**index, **_save_scheduler(model, folder / "decoder_scheduler")}


def _save_upsampler(network: UNet, folder: Path, values) -> dict[str, list[str]]:
    config, beside = unet_config(network), maps.map_conditions(network)
    low = Concat("bicubic", of=beside["low"].of if "low" in beside else None)
    again = maps.with_maps(unets.unet_2d(config, folder), maps.channels_of(network), dict.fromkeys(beside, low))
    check_same(network, again.network)
    return _write(folder, config, export(unet_names.unet_slots(network), values))
