"""The pipeline class in diffusers of a model, and the content of its `model_index.json`.

| text | maps with x_t | class |
|---|---|---|
| one encoder; two | nothing | StableDiffusion; StableDiffusionXL; with only XL's second, the refiner, XLImg2Img |
| CLIP's two, and T5 or zeros | nothing | StableDiffusion3 |
| T5 alone, for pixels | nothing; a noised "low" | IF; IFSuperResolution |
| one encoder, and the guidance scale as an input | nothing | LatentConsistencyModel |
| one encoder; two | "mask_image", "masked_image" | StableDiffusionInpaint; StableDiffusionXLInpaint |
| one encoder; two | "source" | StableDiffusionInstructPix2Pix; StableDiffusionXLInstructPix2Pix |
| one encoder | "depth"; "low" | StableDiffusionDepth2Img; StableDiffusionUpscale |
| one encoder, and a noised embedding of a picture; of a prior | nothing | StableUnCLIPImg2Img; StableUnCLIP |
| an image embedding, as "image_embeds" | nothing | KandinskyV22 |
| `LDMText` | nothing | LDMTextToImage |
| a picture | nothing | StableDiffusionImageVariation |
| none: latents | nothing | LDM; DiT with a class |
| none: pixels | nothing | DDPM, DDIM, PNDM, ScoreSdeVe, ConsistencyModel, by the scheduler |

Parts that kdiff does not have are arguments of `diffusers.Pipeline.from_pretrained`: the depth estimator, and the
scheduler by which the upscaler noises its input.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from kdiff.blocks.embeddings import GuidanceEmbedding
from kdiff.codecs import Codec, Latent
from kdiff.encoders.joint_prompt import JointPrompt
from kdiff.encoders.ldm import LDMText
from kdiff.encoders.picture_prompt import PICTURE, PicturePrompt
from kdiff.encoders.prompt import Prompt
from kdiff.encoders.t5 import T5Text
from kdiff.interop import maps, prompts

__all__ = ["Pipeline", "pipeline_of"]


class Pipeline(NamedTuple):
    """The entries of `model_index.json` other than the written parts.

    Attributes:
        index: the class, missing parts and settings; without a class if there is none.
        autoencoder: the name of the autoencoder.
    """

    index: Mapping[str, Any]
    autoencoder: str = "vae"


_UNSAFE = {"safety_checker": [None, None], "requires_safety_checker": False}
_PLAIN = {**_UNSAFE, "feature_extractor": [None, None], "image_encoder": [None, None]}
_XL = {name: [None, None] for name in ("feature_extractor", "image_encoder")}
# By the names of the maps, for one text encoder and for two.
_BESIDE = {
    (): ("StableDiffusion", _PLAIN, "StableDiffusionXL", _XL),
    ("mask_image", "masked_image"): ("StableDiffusionInpaint", _PLAIN, "StableDiffusionXLInpaint", _XL),
    ("source",): ("StableDiffusionInstructPix2Pix", _PLAIN, "StableDiffusionXLInstructPix2Pix", {}),
    ("depth",): (
        "StableDiffusionDepth2Img",
        {"depth_estimator": [None, None], "feature_extractor": [None, None]},
        None,
        {},
    ),
    ("low",): (
        "StableDiffusionUpscale",
        {name: [None, None] for name in ("low_res_scheduler", "safety_checker", "feature_extractor", "watermarker")},
        None,
        {},
    ),
}
# Pixel models, by their scheduler; the default is DDPM.
_PIXELS = {
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PNDM",
    "ScoreSdeVeScheduler": "ScoreSdeVe",
    "CMStochasticIterativeScheduler": "ConsistencyModel",
}
# Classes of Stable Diffusion with ControlNets.
_CONTROLLED = {
    f"StableDiffusion{xl}{task}Pipeline": f"StableDiffusion{xl}ControlNet{task}Pipeline"
    for xl in ("", "XL")
    for task in ("", "Img2Img", "Inpaint")
}
_LABELLED = ("ConsistencyModel",)  # class-conditional ones


def pipeline_of(network: keras.Model, kind: str, scheduler: str, codec: Codec, controlled: bool = False) -> Pipeline:
    """The pipeline of a model.

    Args:
        network: the network of the model.
        kind: its class in diffusers.
        scheduler: the class of its scheduler.
        codec: the codec of the model.
        controlled: whether there are ControlNets, for which Stable Diffusion has separate classes.
    """
    pipeline = _without_controls(network, kind, scheduler, codec)
    if not controlled:
        return pipeline
    name = _CONTROLLED.get(pipeline.index.get("_class_name"))
    return pipeline._replace(index={**pipeline.index, "_class_name": name}) if name else Pipeline({})


def _without_controls(network: keras.Model, kind: str, scheduler: str, codec: Codec) -> Pipeline:
    prompt, beside = prompts.prompt_of(network), tuple(sorted(maps.map_conditions(network)))
    latent, others = isinstance(codec, Latent), set(network.conditions) - {prompts.CONTEXT}
    if others & {PICTURE, "embedding"}:
        name = "StableUnCLIPImg2Img" if PICTURE in others else "StableUnCLIP"
        plain = latent and len(others) == 1 and isinstance(prompt, Prompt)
        return _named(name, {}) if plain else Pipeline({})
    if others == {"image_embeds"} and prompt is None:
        return _named("KandinskyV22", {}, "movq") if latent else Pipeline({})
    if isinstance(prompt, JointPrompt):
        return _of_sd3(prompt) if latent and not beside else Pipeline({})
    if isinstance(prompt, PicturePrompt):
        return _named("StableDiffusionImageVariation", _UNSAFE) if latent and not beside else Pipeline({})
    if prompt is not None and isinstance(prompt.encoders[0], T5Text):
        return _of_deepfloyd(network) if not latent else Pipeline({})
    if prompt is not None:
        noised = any(one.noise is not None for one in maps.map_conditions(network).values())
        return _of_text(network, prompt, beside) if latent and not noised else Pipeline({})
    if beside:
        return Pipeline({})
    labels = set(network.conditions)
    if kind == "DiTTransformer2DModel":
        return _named("DiT", {}) if latent and labels == {"label"} else Pipeline({})
    if kind != "UNet2DModel":
        return Pipeline({})
    if latent:
        return _named("LDM", {}, "vqvae") if not labels else Pipeline({})
    name = _PIXELS.get(scheduler, "DDPM")
    return _named(name, {}) if not labels or name in _LABELLED else Pipeline({})


def _named(name: str, more: Mapping[str, Any], autoencoder: str = "vae") -> Pipeline:
    return Pipeline({"_class_name": f"{name}Pipeline", **more}, autoencoder)


def _of_sd3(prompt: JointPrompt) -> Pipeline:
    absent = prompts.PARTS[2] if prompts.PARTS[2][0] not in prompts.encoders_of(prompt) else ()
    return _named("StableDiffusion3", {**_XL, **{name: [None, None] for name in absent}})


def _of_deepfloyd(network) -> Pipeline:
    beside = maps.map_conditions(network)
    if set(beside) - {"low"} or any(one.noise is None for one in beside.values()):
        return Pipeline({})
    absent = {name: [None, None] for name in ("feature_extractor", "safety_checker", "watermarker")}
    return _named("IFSuperResolution" if beside else "IF", {**absent, "requires_safety_checker": False})


def _of_text(network, prompt, beside) -> Pipeline:
    if isinstance(prompt.encoders[0], LDMText):
        return _named("LDMTextToImage", {}, "vqvae") if not beside else Pipeline({})
    if beside not in _BESIDE:
        return Pipeline({})
    plain, plain_more, double, double_more = _BESIDE[beside]
    if isinstance(network.embedding, GuidanceEmbedding):
        return _named("LatentConsistencyModel", _PLAIN) if plain == "StableDiffusion" else Pipeline({})
    names = set(prompts.encoders_of(prompt))
    zeros = {"force_zeros_for_empty_prompt": prompt.zeros}
    if "text_encoder_2" not in names:
        return _named(plain, plain_more)
    if "text_encoder" in names:
        return _named(double, {**double_more, **zeros}) if double else Pipeline({})
    absent = {name: [None, None] for name in prompts.PARTS[0]}
    more = {**_XL, **absent, "requires_aesthetics_score": True, **zeros}
    return _named("StableDiffusionXLImg2Img", more) if not beside else Pipeline({})
