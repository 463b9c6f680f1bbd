"""The text of diffusers' folders: encoders and tokenizers as one condition of the network beside them.

text_encoder, tokenizer        Stable Diffusion 1 and 2: the last state, after the last norm
text_encoder_2, tokenizer_2    XL's second, beside the first: of both the state before the last, without the norm,
                               and of the second the vector; its refiner has the second alone
text_encoder_3, tokenizer_3    3's third, T5, whose tokens follow those of the two, which are as in XL, with the vectors
                               of both; without it zeros do
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from kdiff.blocks.conditions import Joint
from kdiff.encoders.base import Encoder
from kdiff.encoders.joint_prompt import JointPrompt
from kdiff.encoders.prompt import INPUT, Prompt, PromptVector
from kdiff.interop import encoders, folders, tokenizers
from kdiff.interop.configs import Described, explained
from kdiff.interop.files import read_json

__all__ = [
    "CONTEXT",
    "PARTS",
    "PIPELINES",
    "SD3",
    "SD3_LENGTH",
    "conditioned",
    "encoders_of",
    "load",
    "pipeline_of",
    "prompt_of",
    "save",
]

SD3 = tuple(f"StableDiffusion3{name}Pipeline" for name in ("", "Img2Img"))
SD3_LENGTH = 256  # tokens of T5, as in diffusers' pipelines
# The pipelines whose text is read so; that of others is given as what its encoders make of it.
PIPELINES = (
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    *(
        f"StableDiffusion{name}Pipeline"
        for name in ("", "Img2Img", "Inpaint", "InstructPix2Pix", "Depth2Img", "Upscale")
    ),
    *SD3,
    *(f"StableDiffusionXL{name}Pipeline" for name in ("", "Img2Img", "Inpaint", "InstructPix2Pix")),
)
PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
CONTEXT = "context"  # the condition of a network that takes the text's tokens


def load(folder: str | Path, index: Mapping[str, Any], skip: int = 0, variant: str | None = None) -> Prompt | None:
    """The text of the folder of a pipeline; None if it is not one of `PIPELINES`, or its encoders were left out.

    Of Stable Diffusion 3 the folder of T5 alone may be left out: zeros stand for its tokens then.

    Args:
        folder: of the pipeline.
        index: its `model_index.json`.
        skip: how many of the last blocks to leave out besides, "clip skip".
        variant: of the weights, as in `encoders.load`, where an encoder has it.

    Raises:
        ValueError: as of `encoders.load` and `tokenizers.load`, and of `Prompt`.
    """
    folder = Path(folder)
    parts = [pair for pair in PARTS if folders.has(index, pair[0])]
    parts = [pair for pair in parts if pair != PARTS[2] or (folder / pair[0]).exists()]  # T5 may be left out
    known = index.get("_class_name") in PIPELINES and parts
    if not known or not all((folder / encoder / "config.json").exists() for encoder, _ in parts):
        return None
    xl = PARTS[1] in parts
    clip = {"skip": skip + 1, "normalized": False} if xl else {"skip": skip}
    there = {encoder: variant if variant in folders.variants(folder / encoder) else None for encoder, _ in parts}
    made = [
        encoders.load(folder / encoder, variant=variant, **({} if encoder == PARTS[2][0] else clip))
        for encoder, variant in there.items()
    ]
    words = [tokenizers.load(folder / word, SD3_LENGTH if word == PARTS[2][1] else None) for _, word in parts]
    if index["_class_name"] in SD3:
        width = read_json(folder / "transformer" / "config.json").get("joint_attention_dim", 4096)
        with explained(folder):
            return JointPrompt(made, words, width, SD3_LENGTH)
    return Prompt(made, words, zeros=index.get("force_zeros_for_empty_prompt") is True)


def conditioned(described: Described, prompt: Prompt) -> Described:
    """A network that is not built, whose context, and vector, are those of the text: its input is "text" for both.

    Raises:
        ValueError: if the network takes none, or of another width.
    """
    network, shapes = described.network, dict(described.shapes)
    conditions = dict(network.conditions)
    if not isinstance(conditions.get(CONTEXT), keras.layers.Identity):
        raise ValueError(
            f"the network must take a text's tokens as they are, as {CONTEXT!r}; its conditions: {conditions}; with "
            "`text=False` they are given as they come"
        )
    given = {CONTEXT: prompt.width, "text_embeds": prompt.vector}
    for name, width in given.items():
        if (name == CONTEXT or name in shapes) and shapes.get(name, (None,))[-1] != width:
            raise ValueError(
                f"the network must take the text's numbers, {width}, as {name!r}; it takes: {shapes.get(name)}"
            )
    conditions[CONTEXT] = prompt
    if "text_embeds" in shapes and "added" in conditions:
        parts = {**conditions["added"].parts, "text_embeds": PromptVector(prompt.vector)}
        conditions["added"] = Joint(
            {INPUT if name == "text_embeds" else name: part for name, part in parts.items()}, conditions["added"].layer
        )
    network.conditions = conditions
    shapes = {name: shape for name, shape in shapes.items() if name not in given}
    return Described(network, {**shapes, INPUT: (None, *prompt.row)})


def prompt_of(network: Any) -> Prompt | None:
    """The condition that `conditioned` gave the network."""
    found = getattr(network, "conditions", {}).get(CONTEXT)
    return found if isinstance(found, Prompt) else None


def encoders_of(prompt: Prompt) -> dict[str, Encoder]:
    """The text encoders by the names of their folders."""
    return {name: encoder for (name, _), encoder in zip(_parts(prompt), prompt.encoders, strict=False)}


def _parts(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    second = len(prompt.encoders) == 1 and prompt.vector > 0  # XL's refiner has the second alone
    return PARTS[1:] if second else PARTS


def pipeline_of(prompt: Prompt) -> dict[str, Any]:
    """What `model_index.json` says of a pipeline with this text beside its parts: its class, and what it has not."""
    names, zeros = _parts(prompt)[: len(prompt.encoders)], {"force_zeros_for_empty_prompt": prompt.zeros}
    if isinstance(prompt, JointPrompt):
        absent = ("image_encoder", "feature_extractor", *(PARTS[2] if PARTS[2] not in names else ()))
        return {"_class_name": SD3[0], **{name: [None, None] for name in absent}}
    if PARTS[1] not in names:
        kind, absent, more = "StableDiffusionPipeline", ("safety_checker",), {"requires_safety_checker": False}
    elif PARTS[0] in names:
        kind, absent, more = "StableDiffusionXLPipeline", (), zeros
    else:
        kind, absent, more = "StableDiffusionXLImg2ImgPipeline", PARTS[0], {"requires_aesthetics_score": True, **zeros}
    absent = {name: [None, None] for name in (*absent, "feature_extractor", "image_encoder")}
    return {"_class_name": kind, **absent, **more}


def save(prompt: Prompt, folder: str | Path) -> dict[str, list[str]]:
    """Writes the folders of encoders and tokenizers; returns their entries of `model_index.json`.

    Raises:
        ValueError: if transformers has no such encoder or tokenizer.
    """
    folder, index = Path(folder), {}
    for (name, words), encoder, tokenizer in zip(_parts(prompt), prompt.encoders, prompt.tokenizers, strict=False):
        encoders.save(encoder, folder / name)
        tokenizers.save(tokenizer, folder / words)
        kind = f"{type(encoder).__name__}Model{'WithProjection' if encoder.projection else ''}"
        index[name] = ["transformers", kind.replace("T5TextModel", "T5EncoderModel")]
        index[words] = ["transformers", tokenizers.class_of(tokenizer)]
    return index
