"""Karlo's folder, diffusers' `UnCLIPPipeline`, as a `kdiff.UnCLIP`.

| folder | here |
|---|---|
| `text_encoder`, `tokenizer` | a frozen `Prompt`, masked, of prior and decoder |
| `prior`, `prior_scheduler` | a `PriorTransformer`; `clip_mean` and `clip_std` are its model's codec |
| `text_proj` | conditions of the decoder: "embedding", "text", "vector" |
| `decoder`, `decoder_scheduler` | a `UNet` |
| `super_res_first`, `super_res_last`, `super_res_scheduler` | `Experts`, one for the last step, with "low" beside |

    unclip = load("karlo-v1-alpha")
    unclip.sample(1, text="a red circle", prior={"guidance": 4.0, "steps": 25}, decoder={"guidance": 8.0, "steps": 25})
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from kdiff.blocks.base import Chain
from kdiff.blocks.beside import Beside
from kdiff.blocks.conditions import Joint
from kdiff.blocks.embedded import ImageEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.normalization import LayerNorm
from kdiff.codecs import Codec
from kdiff.encoders import Prompt, PromptVector
from kdiff.interop import encoders, folders, maps, priors, schedulers, tokenizers, unet_names, unets
from kdiff.interop.configs import Described, Key, complete, explained
from kdiff.interop.files import State, read_json
from kdiff.interop.unet_keys import COUNT
from kdiff.interop.weights import Layout, Slot, fill, slots
from kdiff.model import DiffusionModel
from kdiff.networks.experts import Experts
from kdiff.networks.unet import UNet
from kdiff.unclip import UnCLIP

__all__ = ["PIPELINE", "TEXT_PROJ", "decoder", "decoder_slots", "load", "prior_of_text"]

PIPELINE = "UnCLIPPipeline"
TEXT_PROJ = {
    "clip_extra_context_tokens": Key(4, COUNT),
    "clip_embeddings_dim": Key(768, COUNT),
    "time_embed_dim": Key(None, COUNT),
    "cross_attention_dim": Key(None, COUNT),
}


def load(folder: str | Path, strict: bool = True, variant: str | None = None) -> UnCLIP:
    """The folder's models. Its super-resolution is one stage of a cascade.

    Args:
        folder: of the pipeline.
        strict, variant: as of `diffusers.load`.

    Raises:
        ValueError: if a file is missing or damaged, or says what kdiff cannot do.
    """
    folder = Path(folder)
    encoder = encoders.load(folder / "text_encoder", variant=_variant(folder / "text_encoder", variant))
    words = tokenizers.load(folder / "tokenizer")

    def prompt(**options):
        return Prompt(encoder, words, masked=True, **options)

    prior, codec = _prior(folder / "prior", prompt, strict, variant)
    decoder = _decoder(folder, prompt, strict, variant)
    upsampler = _upsampler(folder, strict, variant)
    return UnCLIP(
        _model(prior, folder / "prior_scheduler", codec),
        _model(decoder, folder / "decoder_scheduler"),
        _model(upsampler, folder / "super_res_scheduler"),
    )


def _variant(folder: Path, variant: str | None) -> str | None:
    return variant if variant in folders.variants(folder) else None


def _read(folder: Path, variant: str | None) -> tuple[dict[str, Any], State]:
    config, state = read_json(folder / "config.json"), folders.read_weights(folder, _variant(folder, variant))
    return config, unet_names.renamed(state)


def _model(described: Described, scheduler: Path, codec: Codec | str = "pixels") -> DiffusionModel:
    network, shapes = described
    learned = network.out_channels == 2 * shapes["image"][-1]
    source = scheduler / "scheduler_config.json"
    process = schedulers.process(read_json(source), source, learned)
    model = DiffusionModel(network, **{**process._asdict(), "codec": codec, "times": "discrete", "ema": None})
    model.build(shapes)
    return model


# --- the prior


def prior_of_text(described: Described, prompt: Prompt) -> Described:
    """The prior, whose tokens and vector are those of the text."""
    vector = Joint({"text": PromptVector(prompt.vector)}, keras.layers.Identity())
    network, image = described.network, described.shapes["image"]
    network.conditions = {"text": prompt, "vector": vector}  # the encoder's weights with it, which a clone had not
    return Described(network, {"image": image, "text": (None, *prompt.row)})


def _prior(folder, prompt, strict, variant) -> tuple[Described, Codec]:
    config, state = _read(folder, variant)
    described = prior_of_text(priors.prior(config, folder / "config.json"), prompt())
    own = {name: array for name, array in state.items() if name not in priors.OF_CODEC}
    fill(described.network, {"time": (None,), **described.shapes}, priors.prior_slots, own, folder, strict)
    return described, priors.prior_codec(state)


# --- the decoder


def decoder(config: Mapping[str, Any], text: Mapping[str, Any], prompt: Prompt, source: Any) -> Described:
    """The decoder, with what `text_proj` makes of the embeddings as its conditions.

    Args:
        config: of the U-Net.
        text: of `UnCLIPTextProjModel`.
        prompt: the text.
        source: the file, for errors.
    """
    described = unets.unet_2d_condition(dict(config), source)
    text = complete(text, TEXT_PROJ, source)
    width, cross = text["time_embed_dim"], text["cross_attention_dim"]
    wanted = {"label": (None, width), "context": (None, None, cross)}
    if any(described.shapes.get(name) != shape for name, shape in wanted.items()):
        raise ValueError(
            f"{source}: `text_proj` makes {wanted}, and the decoder takes other conditions: {described.shapes}"
        )
    layer = Chain([Dense(cross), LayerNorm()])
    network = described.network
    network.conditions = {
        "embedding": ImageEmbedding(cross, text["clip_extra_context_tokens"]),
        "text": prompt.through(layer),
        "vector": Joint({"text": PromptVector(prompt.vector)}, Dense(width)),
    }
    shapes = {"image": described.shapes["image"], "embedding": (None, text["clip_embeddings_dim"])}
    return Described(network, {**shapes, "text": (None, *prompt.row)})


def _tokens_layout(count: int) -> Layout:
    """The outputs of a dense layer that makes `count` tokens: there, the number of the token changes fastest."""

    def ours(array):
        turned = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return turned.T if turned.ndim > 1 else turned

    def theirs(array):
        array = array.T if array.ndim > 1 else array
        return array.reshape(count, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return Layout(ours, theirs)


def decoder_slots(network: UNet) -> Iterator[Slot]:
    """The names of the weights of the decoder and, after "text_proj.", of what makes its conditions."""
    yield from unet_names.unet_slots(network)
    image, text, vector = (network.conditions[name] for name in ("embedding", "text", "vector"))
    names = {
        "clip_image_embeddings_project_to_time_embeddings": image.to_vector,
        "embedding_proj": vector.layer,
        "encoder_hidden_states_proj": text.layer.layers[0],
        "text_encoder_hidden_states_norm": text.layer.layers[1],
    }
    for name, layer in names.items():
        yield from slots(layer, f"text_proj.{name}", {})
    layout = _tokens_layout(image.tokens)
    yield Slot("text_proj.clip_extra_context_tokens_proj.weight", image.to_tokens.kernel, layout)
    yield Slot("text_proj.clip_extra_context_tokens_proj.bias", image.to_tokens.bias, layout)
    yield Slot("text_proj.learned_classifier_free_guidance_embeddings", image.learned)


def _decoder(folder, prompt, strict, variant) -> Described:
    config, state = _read(folder / "decoder", variant)
    text, own = _read(folder / "text_proj", variant)
    state |= {f"text_proj.{name}": array for name, array in own.items()}
    with explained(folder / "decoder"):
        described = decoder(config, text, prompt(), folder / "decoder" / "config.json")
    fill(described.network, {"time": (None,), **described.shapes}, decoder_slots, state, folder, strict)
    return described


# --- super-resolution


def _upsampler(folder, strict, variant) -> Described:
    networks = []
    for part in ("super_res_first", "super_res_last"):
        config, state = _read(folder / part, variant)
        source = folder / part / "config.json"
        with explained(source):
            described = unets.unet_2d(config, source)
            beside = described.shapes["image"][-1] // 2
            described = maps.with_maps(described, {"low": beside}, {"low": Beside("bicubic")})
        shapes = {**described.shapes, "low": (None, None, None, beside)}
        fill(described.network, {"time": (None,), **shapes}, unet_names.unet_slots, state, source.parent, strict)
        networks.append(described.network)
    return Described(Experts(*networks), shapes)
