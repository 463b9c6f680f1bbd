"""Text and picture conditions from folders of diffusers: encoders and tokenizers as one condition of the network.

text_encoder, tokenizer        Stable Diffusion 1 and 2: the last hidden state, after the final norm
text_encoder_2, tokenizer_2    the second of XL: from both encoders the penultimate state, without the norm, and from
the
                               second the vector; the refiner has only the second
text_encoder_3, tokenizer_3    the third of Stable Diffusion 3, T5, whose tokens follow those of the other two, which
are
                               as in XL, with both vectors; without it, zeros are used
text_encoder, tokenizer        DeepFloyd IF's T5: 77 tokens of lower-case text, padding masked only in the encoder
bert, tokenizer                text-to-image latent diffusion: the last hidden state
image_encoder                  image variations: the vector of a picture is its only token
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kdiff.blocks.conditions import Joint, VectorAndTokens
from kdiff.blocks.layers import Dense
from kdiff.encoders.base import Encoder
from kdiff.encoders.joint_prompt import JointPrompt
from kdiff.encoders.ldm import LDMText
from kdiff.encoders.picture_prompt import PicturePrompt
from kdiff.encoders.prompt import INPUT, Prompt, PromptVector
from kdiff.interop import encoders, folders, tokenizers
from kdiff.interop.configs import Described, explained
from kdiff.interop.files import read_json, write_json

__all__ = [
    "BERT",
    "CONTEXT",
    "IF",
    "IF_LENGTH",
    "IMAGE_ENCODER",
    "PARTS",
    "PIPELINES",
    "SD3",
    "SD3_LENGTH",
    "UNCLIP",
    "VARIATIONS",
    "conditioned",
    "encoders_of",
    "load",
    "picture",
    "prompt_of",
    "save",
]

SD3 = tuple(f"StableDiffusion3{name}Pipeline" for name in ("", "Img2Img"))
SD3_LENGTH = 256  # tokens of T5, as in diffusers' pipelines
IF = tuple(f"IF{name}Pipeline" for name in ("", "Img2Img", "Inpainting"))
IF += tuple(f"{name.removesuffix('Pipeline')}SuperResolutionPipeline" for name in IF)
IF_LENGTH = 77  # of texts, regardless of the tokenizer's configuration
# The pipelines with such a text condition; others take the output of their encoders.
VARIATIONS = "StableDiffusionImageVariationPipeline"
UNCLIP = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")
PIPELINES = (
    *IF,
    VARIATIONS,
    "LDMTextToImagePipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    *UNCLIP,
    *(
        f"StableDiffusion{name}Pipeline"
        for name in ("", "Img2Img", "Inpaint", "InstructPix2Pix", "Depth2Img", "Upscale")
    ),
    *SD3,
    *(f"StableDiffusionXL{name}Pipeline" for name in ("", "Img2Img", "Inpaint", "InstructPix2Pix")),
    *(f"StableDiffusion{xl}ControlNet{name}Pipeline" for xl in ("", "XL") for name in ("", "Img2Img", "Inpaint")),
)
PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3"))
BERT = (("bert", "tokenizer"),)
IMAGE_ENCODER = ("image_encoder", "feature_extractor")
CONTEXT = "context"  # the condition for the tokens of the text


def load(
    folder: str | Path, index: Mapping[str, Any], skip: int = 0, variant: str | None = None
) -> Prompt | PicturePrompt | None:
    """The text or picture condition of a pipeline; None if it is not one of `PIPELINES`, or has no encoder.

    For Stable Diffusion 3 the folder of T5 is optional: without it its tokens are zeros.

    Args:
        folder: of the pipeline.
        index: its `model_index.json`.
        skip: the number of further final blocks to skip ("clip skip").
        variant: of the weights, as in `encoders.load`, if an encoder has it.

    Raises:
        ValueError: as in `encoders.load`, `tokenizers.load` and `Prompt`; if "clip skip" is given for another encoder
            than CLIP's for text.
    """
    folder, name = Path(folder), index.get("_class_name")
    known = [("image_encoder", "")] if name == VARIATIONS else [*PARTS, *BERT]
    parts = [pair for pair in known if folders.has(index, pair[0])]
    parts = [pair for pair in parts if pair != PARTS[2] or (folder / pair[0]).exists()]  # T5 is optional
    if name not in PIPELINES or not parts or not all((folder / part / "config.json").exists() for part, _ in parts):
        return None
    own = parts[0][0] in ("text_encoder", "text_encoder_2") and name not in IF
    if skip and not own:
        raise ValueError(f"{folder}: `clip_skip` applies to CLIP's text encoder; the pipeline has {parts[0][0]!r}")
    xl = PARTS[1] in parts
    clip = {"skip": skip + 1, "normalized": False} if xl else {"skip": skip}
    if name == VARIATIONS:
        return picture(folder / "image_encoder", folder / "feature_extractor", variant)
    there = {encoder: folders.variant_of(folder / encoder, variant) for encoder, _ in parts}
    made = [
        encoders.load(folder / encoder, variant=variant, **(clip if own and encoder != PARTS[2][0] else {}))
        for encoder, variant in there.items()
    ]
    # The tokenizer of BERT may allow longer texts than this encoder.
    lengths = {
        part: None if own else IF_LENGTH if name in IF else one.length for part, one in zip(there, made, strict=True)
    }
    lengths[PARTS[2][0]] = SD3_LENGTH
    words = [tokenizers.load(folder / tokenizer, lengths[part]) for part, tokenizer in parts]
    if name in IF:
        return Prompt(made, words, masked=True, padded=True, lower=True)
    if name in SD3:
        width = read_json(folder / "transformer" / "config.json").get("joint_attention_dim", 4096)
        with explained(folder):
            return JointPrompt(made, words, width, SD3_LENGTH)
    return Prompt(made, words, zeros=index.get("force_zeros_for_empty_prompt") is True)


def picture(encoder: Path, processor: Path, variant: str | None = None, **options: Any) -> PicturePrompt:
    """The picture condition from the folders of CLIP's image encoder and of its processor.

    Args:
        encoder, processor: the folders.
        variant: of the weights, if the encoder has it.
        options: arguments of `PicturePrompt`.
    """
    path = processor / "preprocessor_config.json"
    config = read_json(path) if path.is_file() else {}
    names = {"mean": "image_mean", "std": "image_std"}
    pixels = {name: config[key] for name, key in names.items() if isinstance(config.get(key), list)}
    made = encoders.load(encoder, variant=folders.variant_of(encoder, variant))
    with explained(encoder):
        return PicturePrompt(made, **pixels, **options)


def conditioned(described: Described, prompt: Prompt | PicturePrompt) -> Described:
    """An unbuilt network whose context (and vector) comes from the text: the input "text" replaces both.

    For a picture the input is "picture".

    Raises:
        ValueError: if the network has no context, or one of another width.
    """
    network, shapes = described.network, dict(described.shapes)
    conditions = dict(network.conditions)
    layer = conditions.get(CONTEXT)
    if not isinstance(layer, (keras.layers.Identity, Dense, VectorAndTokens)):
        raise ValueError(
            f"the network must take the tokens of a text as {CONTEXT!r}; its conditions: {conditions}; with "
            "`text=False` these are passed directly"
        )
    given = {CONTEXT: prompt.width, "text_embeds": prompt.vector}
    for name, width in given.items():
        if (name == CONTEXT or name in shapes) and shapes.get(name, (None,))[-1] != width:
            raise ValueError(
                f"the network must take the width of the text, {width}, as {name!r}; it takes: {shapes.get(name)}"
            )
    conditions[CONTEXT] = prompt if isinstance(layer, keras.layers.Identity) else prompt.through(layer)
    if "text_embeds" in shapes and "added" in conditions:
        parts = {**conditions["added"].parts, "text_embeds": PromptVector(prompt.vector)}
        conditions["added"] = Joint(
            {INPUT if name == "text_embeds" else name: part for name, part in parts.items()}, conditions["added"].layer
        )
    network.conditions = conditions
    shapes = {name: shape for name, shape in shapes.items() if name not in given}
    return Described(network, {**shapes, prompt.input: (None, *prompt.row)})


def prompt_of(network: Any) -> Prompt | PicturePrompt | None:
    """The condition that `conditioned` added to the network."""
    found = getattr(network, "conditions", {}).get(CONTEXT)
    return found if isinstance(found, (Prompt, PicturePrompt)) else None


def encoders_of(prompt: Prompt | PicturePrompt) -> dict[str, Encoder]:
    """The encoders by the names of their folders."""
    if isinstance(prompt, PicturePrompt):
        return {"image_encoder": prompt.encoder}
    return {name: encoder for (name, _), encoder in zip(_parts(prompt), prompt.encoders, strict=False)}


def _parts(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt.encoders[0], LDMText):
        return BERT
    second = len(prompt.encoders) == 1 and prompt.vector > 0  # the refiner of XL has only the second
    return PARTS[1:] if second else PARTS


def save(
    prompt: Prompt | PicturePrompt,
    folder: str | Path,
    parts: Sequence[tuple[str, str]] | None = None,
    picture: tuple[str, str] = IMAGE_ENCODER,
) -> dict[str, list[str]]:
    """Writes the folders of encoders and tokenizers; returns their entries of `model_index.json`.

    Args:
        prompt: the text, or the picture.
        folder: of the pipeline.
        parts: the folder names of each text encoder and its tokenizer; None for those of Stable Diffusion.
        picture: those of the image encoder and its processor.

    Raises:
        ValueError: if transformers does not support the encoder or tokenizer.
    """
    folder = Path(folder)
    if isinstance(prompt, PicturePrompt):
        return _save_picture(prompt, folder, *picture)
    index = {}
    for (name, words), encoder, tokenizer in zip(
        parts or _parts(prompt), prompt.encoders, prompt.tokenizers, strict=False
    ):
        encoders.save(encoder, folder / name)
        tokenizers.save(tokenizer, folder / words)
        kind = f"{type(encoder).__name__}Model{'WithProjection' if encoder.projection else ''}"
        index[name] = ["transformers", kind.replace("T5TextModel", "T5EncoderModel")]
        if isinstance(encoder, LDMText):
            index[name] = ["latent_diffusion", "LDMBertModel"]
        index[words] = ["transformers", tokenizers.class_of(tokenizer)]
    return index


def _save_picture(prompt: PicturePrompt, folder: Path, name: str, processor: str) -> dict[str, list[str]]:
    encoders.save(prompt.encoder, folder / name)
    size = prompt.encoder.size
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(prompt.mean),
        "image_std": list(prompt.std),
    }
    write_json(folder / processor / "preprocessor_config.json", config)
    return {
        name: ["transformers", "CLIPVisionModelWithProjection"],
        processor: ["transformers", "CLIPImageProcessor"],
    }
