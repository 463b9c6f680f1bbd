"""The conditions of U-Nets of diffusers: time, classes, tokens, and vectors added to the time embedding.

| diffusers | here |
|---|---|
| `num_class_embeds`, `class_embed_type` | the condition "label": a class, a number, or a vector |
| `encoder_hid_dim_type` None, "text_proj" | "context", tokens, directly or through a dense layer |
| "image_proj" (Kandinsky 2.2) | "image_embeds", a vector mapped to 32 tokens; there is no "context" |
| "text_image_proj" (Kandinsky 2.1) | "image_embeds", mapped to 10 tokens, and "context" through a dense layer |
| `addition_embed_type` "text_time" (XL) | "text_embeds" and "time_ids" |
| "text" (DeepFloyd IF) | "context", pooled by attention |
| "image", "text_image" | "image_embeds"; and "text_embeds" |
| `time_cond_proj_dim` (LCM) | the optional input "timestep_cond" |
"""

from collections.abc import Mapping
from typing import Any

import keras

from kdiff.blocks.base import Chain
from kdiff.blocks.conditions import OptionalCondition, VectorAndTokens
from kdiff.blocks.context_attention import AttentionPool
from kdiff.blocks.embedded import NoisedEmbedding
from kdiff.blocks.embeddings import GuidanceEmbedding, MLPEmbedding, SinusoidalEmbedding, SizeEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import LayerNorm
from kdiff.encoders.picture_prompt import PicturePrompt
from kdiff.interop.configs import each
from kdiff.interop.unet_keys import ACTIVATIONS, image_shape
from kdiff.networks.published import text_and_numbers

__all__ = [
    "IMAGE_TOKENS",
    "NUMBERS",
    "STEERING",
    "as_in_diffusers",
    "check_added",
    "classes",
    "conditions",
    "numbers_of",
    "shapes",
    "time",
    "time_width",
]

NUMBERS = 6  # in "time_ids": two sizes and a corner, (height, width) each; 5 in the refiner of XL, the last a score
IMAGE_TOKENS = {"image_proj": 32, "text_image_proj": 10}
STEERING = "timestep_cond"


def time(config: dict[str, Any]) -> MLPEmbedding:
    """The embedding of the time."""
    waves, width, activation = _waves(config, config["block_out_channels"][0]), time_width(config), _activation(config)
    if config.get("time_cond_proj_dim"):
        return GuidanceEmbedding(waves, STEERING, config["time_cond_proj_dim"], width, activation)
    return MLPEmbedding(waves, width, activation)


def _activation(config) -> str:
    """The activation of the embeddings, which only one of the two classes configures."""
    return ACTIVATIONS[config["act_fn"]] if "cross_attention_dim" in config else "silu"


def _waves(config, width) -> SinusoidalEmbedding:
    return SinusoidalEmbedding(width, sine_first=not config["flip_sin_to_cos"], shift=config["freq_shift"])


def _sizes(config) -> SizeEmbedding:
    first, shift = not config["flip_sin_to_cos"], config["freq_shift"]
    return SizeEmbedding(config["addition_time_embed_dim"], config["numbers"], sine_first=first, shift=shift)


def time_width(config: dict[str, Any]) -> int:
    """The channels of the embedding."""
    return config["time_embedding_dim"] or 4 * config["block_out_channels"][0]


def classes(config: dict[str, Any]) -> dict[str, keras.layers.Layer]:
    """The condition "label", if there is one."""
    if config["class_embed_type"] is None and config["num_class_embeds"] is None:
        return {}
    kinds = {
        None: lambda: LabelEmbedding(config["num_class_embeds"]),
        "timestep": lambda: MLPEmbedding(
            _waves(config, config["block_out_channels"][0]), time_width(config), _activation(config)
        ),
        "identity": keras.layers.Identity,
        "projection": lambda: MLPEmbedding(keras.layers.Identity(), time_width(config)),
        "simple_projection": lambda: Dense(time_width(config)),
    }
    return {"label": kinds[config["class_embed_type"]]()}


def conditions(config: dict[str, Any]) -> dict[str, keras.layers.Layer]:
    """The layers of all conditions of a `UNet2DConditionModel` by name, tokens in the order of diffusers."""
    width, kind, added = time_width(config), config["encoder_hid_dim_type"], config["addition_embed_type"]
    cross = each(config["cross_attention_dim"], 1, "", "cross_attention_dim")[0]
    vectors, tokens = {}, {}
    if kind in IMAGE_TOKENS:
        count = IMAGE_TOKENS[kind]
        layers = [Dense(count * cross), keras.layers.Reshape((count, cross))]
        tokens["image_embeds"] = Chain([*layers, LayerNorm()] if kind == "image_proj" else layers)
    if kind != "image_proj":
        tokens["context"] = keras.layers.Identity() if kind is None else Dense(cross)
    if added == "text":
        pool = AttentionPool(config["addition_embed_type_num_heads"])
        vectors["context"] = Chain([LayerNorm(), pool, Dense(width), LayerNorm()])
    if added in ("image", "text_image"):
        vectors["image_embeds"] = Chain([Dense(width), LayerNorm()]) if added == "image" else Dense(width)
    if added == "text_image":
        vectors["text_embeds"] = Chain([Dense(width), LayerNorm()])
    names = dict.fromkeys([*tokens, *vectors])
    made = {name: _joined(vectors.get(name), tokens.get(name)) for name in names}
    if added == "text_time":
        made["added"] = text_and_numbers(_sizes(config), width)
    return {**made, **classes(config)}


def as_in_diffusers(conditions: Mapping[str, keras.layers.Layer]) -> dict[str, keras.layers.Layer]:
    """Conditions of kdiff by the names above: a noised embedding is the label, and what may be absent is its layer."""
    found = {}
    for name, layer in conditions.items():
        inner = layer.layer if isinstance(layer, PicturePrompt) else layer
        if isinstance(inner, NoisedEmbedding):
            found["label"] = inner.projection
        else:
            found[name] = layer.layer if isinstance(layer, OptionalCondition) else layer
    return found


def _joined(vector, tokens):
    return VectorAndTokens(vector, tokens) if vector and tokens else vector or tokens


def numbers_of(config: dict[str, Any]) -> int:
    """The number of entries in "time_ids", from the widths."""
    width, total = (config[f"{name}_dim"] or 0 for name in ("addition_time_embed", "projection_class_embeddings_input"))
    return NUMBERS - 1 if total - (NUMBERS - 1) * width == config["cross_attention_dim"] else NUMBERS


def check_added(config: dict[str, Any], source: Any) -> None:
    """Raises a ValueError for a condition of unknown size, or an unsupported combination."""
    added, numbers, hidden = config["addition_embed_type"], config["numbers"], config["encoder_hid_dim"]
    width, total = (config[f"{name}_dim"] for name in ("addition_time_embed", "projection_class_embeddings_input"))
    kind = config["encoder_hid_dim_type"]
    if added == "text_time" and not (width and total and total > numbers * width):
        raise ValueError(
            f"{source}: `addition_embed_type` needs an `addition_time_embed_dim`, and "
            f"`projection_class_embeddings_input_dim` above {numbers} times that; received: {width} and {total}"
        )
    if config["class_embed_type"] in ("projection", "simple_projection") and not total:
        raise ValueError(
            f"{source}: `projection_class_embeddings_input_dim` must be a number where `class_embed_type` is "
            f"{config['class_embed_type']!r}"
        )
    if hidden is None and (kind is not None or added == "image"):
        raise ValueError(f"{source}: `encoder_hid_dim` must be a number where `encoder_hid_dim_type` is {kind!r}")
    pairs = {"image": (None, "text_proj", "image_proj"), "text_image": (None, "text_proj", "text_image_proj")}
    if kind not in pairs.get(added, (None, "text_proj", *IMAGE_TOKENS)) or (added == "text" and kind in IMAGE_TOKENS):
        raise ValueError(
            f"{source}: `addition_embed_type` {added!r} and `encoder_hid_dim_type` {kind!r} cannot be loaded together"
        )


def shapes(config: dict[str, Any]) -> dict[str, tuple]:
    """The shapes of the inputs. A context may have any number of tokens."""
    found = {"image": image_shape(config)}
    if "cross_attention_dim" in config:
        found |= _shapes_of_context(config)
    kind = config["class_embed_type"]
    if kind or config["num_class_embeds"] is not None:
        size = config.get("projection_class_embeddings_input_dim")
        sizes = {"identity": time_width(config), "projection": size, "simple_projection": size}
        found["label"] = (None, sizes[kind]) if kind in sizes else (None,)
    return found


def _shapes_of_context(config) -> dict[str, tuple]:
    cross = each(config["cross_attention_dim"], 1, "", "cross_attention_dim")[0]
    hidden, kind, added = (config[n] for n in ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type"))
    found: dict[str, tuple] = {} if kind == "image_proj" else {"context": (None, None, hidden if kind else cross)}
    if kind in IMAGE_TOKENS or added in ("image", "text_image"):
        found["image_embeds"] = (None, hidden if kind == "image_proj" or added == "image" else cross)
    if added == "text_image":
        found["text_embeds"] = (None, cross)
    if added == "text_time":
        vector = config["projection_class_embeddings_input_dim"] - config["numbers"] * config["addition_time_embed_dim"]
        found |= {"text_embeds": (None, vector), "time_ids": (None, config["numbers"])}
    return found
