"""Karlo, diffusers' `UnCLIPPipeline`, as a `kdiff.UnCLIP`.

| folder | here |
|---|---|
| `text_encoder`, `tokenizer` | a frozen, masked `Prompt`, shared by prior and decoder |
| `prior`, `prior_scheduler` | a `PriorTransformer`; `clip_mean` and `clip_std` give the codec of its model |
| `text_proj` | conditions of the decoder: "embedding", "text", "vector" |
| `decoder`, `decoder_scheduler` | a `UNet` |
| `super_res_first`, `super_res_last`, `super_res_scheduler` | `ExpertDenoisers`, one for the last step; "low" |

    unclip = load("karlo-v1-alpha")
    unclip.sample(1, text="a red circle", prior={"guidance": 4.0, "steps": 25}, decoder={"guidance": 8.0, "steps": 25})
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiff.blocks.base import Chain
from kdiff.blocks.concat import Concat
from kdiff.blocks.conditions import Joint
from kdiff.blocks.embedded import ImageEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.normalization import LayerNorm
from kdiff.codecs import Codec
from kdiff.encoders import Pair, Prompt, PromptVector
from kdiff.interop import encoders, folders, maps, priors, prompts, schedulers, tokenizers, unet_names, unets
from kdiff.interop.configs import Described, Key, complete, explained
from kdiff.interop.files import State, read_json
from kdiff.interop.unet_keys import COUNT
from kdiff.interop.weights import Layout, Slot, fill, slots
from kdiff.model import DiffusionModel
from kdiff.networks.experts import ExpertDenoisers
from kdiff.networks.unet import UNet
from kdiff.unclip import UnCLIP

__all__ = [
    "PIPELINES",
    "TEXT_PROJ",
    "Before",
    "decoder",
    "decoder_slots",
    "load",
    "prior_model",
    "prior_of_text",
    "prompt",
]

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
TEXT_PROJ = {
    "clip_extra_context_tokens": Key(4, COUNT),
    "clip_embeddings_dim": Key(768, COUNT),
    "time_embed_dim": Key(None, COUNT),
    "cross_attention_dim": Key(None, COUNT),
}


class Before(NamedTuple):
    """The models before the decoder of a pipeline.

    Attributes:
        change: adds the conditions to the unbuilt network of the decoder.
        prior: the model of embeddings, with which the decoder forms an `UnCLIP`; None for none.
        clip: of that `UnCLIP`.
        embedding: the name of the condition of the decoder.
    """

    change: Callable[[Described], Described]
    prior: DiffusionModel | None = None
    clip: Pair | None = None
    embedding: str = "embedding"

    def joined(self, decoder: DiffusionModel) -> keras.Model:
        """The decoder, combined with these."""
        if self.prior is None:
            return decoder
        return UnCLIP(self.prior, decoder, clip=self.clip, embedding=self.embedding)


def load(folder: str | Path, strict: bool = True, variant: str | None = None) -> UnCLIP:
    """Loads the models of a folder. Its super-resolution is one stage of a cascade.

    Args:
        folder: the folder of the pipeline.
        strict, variant: as in `diffusers.load`.

    Raises:
        ValueError: if a file is missing or damaged, or not supported.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    text = prompt(folder / "text_encoder", folder / "tokenizer", variant)
    prior, clip = None, None
    if folders.has(index, "prior"):
        prior = prior_model(folder / "prior", folder / "prior_scheduler", text, strict, variant)
    if folders.has(index, "image_encoder"):
        clip = Pair(
            prompts.picture(folder / "image_encoder", folder / "feature_extractor", variant), text.through(None)
        )
    decoder = _model(_decoder(folder, text, strict, variant), folder / "decoder_scheduler")
    upsampler = _model(_upsampler(folder, strict, variant), folder / "super_res_scheduler")
    return UnCLIP(prior, decoder, upsampler, clip=clip)


def prompt(encoder: Path, tokenizer: Path, variant: str | None) -> Prompt:
    """The text condition, with padding masked, from the folders of CLIP's encoder and its tokenizer."""
    there = folders.variant_of(encoder, variant)
    return Prompt(encoders.load(encoder, variant=there), tokenizers.load(tokenizer), masked=True)


def _read(folder: Path, variant: str | None) -> tuple[dict[str, Any], State]:
    config = read_json(folder / "config.json")
    return config, unet_names.renamed(folders.read_weights(folder, folders.variant_of(folder, variant)))


def _model(described: Described, scheduler: Path, codec: Codec | str = "pixels") -> DiffusionModel:
    network, shapes = described
    learned = network.out_channels == 2 * shapes["image"][-1]
    source = scheduler / "scheduler_config.json"
    process = schedulers.process(read_json(source), source, learned)
    model = DiffusionModel(network, **{**process._asdict(), "codec": codec, "times": "discrete", "ema": None})
    model.build(shapes)
    return model


# --- the prior


def prior_model(folder: Path, scheduler: Path, text: Prompt, strict: bool, variant: str | None) -> DiffusionModel:
    """The model of embeddings from the folders of a `PriorTransformer` and of its scheduler, given the text."""
    config, state = _read(folder, variant)
    described = prior_of_text(priors.prior(config, folder / "config.json"), text)
    own = {name: array for name, array in state.items() if name not in priors.OF_CODEC}
    fill(described.network, {"time": (None,), **described.shapes}, priors.prior_slots, own, folder, strict)
    return _model(described, scheduler, priors.prior_codec(state, folder))


def prior_of_text(described: Described, prompt: Prompt) -> Described:
    """The prior with the tokens and the vector of the text."""
    vector = Joint({"text": PromptVector(prompt.vector)}, keras.layers.Identity())
    network, image = described.network, described.shapes["image"]
    network.conditions = {"text": prompt, "vector": vector}  # keeps the weights of the encoder, which a clone would not
    return Described(network, {"image": image, "text": (None, *prompt.row)})


# --- the decoder


def decoder(config: Mapping[str, Any], text: Mapping[str, Any], prompt: Prompt, source: Any) -> Described:
    """The decoder, whose conditions are the outputs of `text_proj`.

    Args:
        config: the configuration of the U-Net.
        text: that of `UnCLIPTextProjModel`.
        prompt: the text condition.
        source: the file, for errors.
    """
    described = unets.unet_2d_condition(dict(config), source)
    text = complete(text, TEXT_PROJ, source)
    width, cross = text["time_embed_dim"], text["cross_attention_dim"]
    wanted = {"label": (None, width), "context": (None, None, cross)}
    if any(described.shapes.get(name) != shape for name, shape in wanted.items()):
        raise ValueError(f"{source}: `text_proj` returns {wanted}, but the decoder takes: {described.shapes}")
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
    """The outputs of a dense layer for `count` tokens, where the token index is the fastest axis."""

    def ours(array):
        turned = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return turned.T if turned.ndim > 1 else turned

    def theirs(array):
        array = array.T if array.ndim > 1 else array
        return array.reshape(count, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return Layout(ours, theirs)


def decoder_slots(network: UNet) -> Iterator[Slot]:
    """The names of the weights of the decoder and, with the prefix "text_proj.", of its condition layers."""
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
        described = decoder(config, text, prompt, folder / "decoder" / "config.json")
    both = f"{folder / 'decoder'}, and text_proj"
    fill(described.network, {"time": (None,), **described.shapes}, decoder_slots, state, both, strict)
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
            described = maps.with_maps(described, {"low": beside}, {"low": Concat("bicubic")})
        shapes = {**described.shapes, "low": (None, None, None, beside)}
        fill(described.network, {"time": (None,), **shapes}, unet_names.unet_slots, state, source.parent, strict)
        networks.append(described.network)
    return Described(ExpertDenoisers(*networks), shapes)
