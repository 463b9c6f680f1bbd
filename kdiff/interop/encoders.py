"""Folders of encoders of transformers: text and image encoders of CLIP, T5's text encoder, and latent diffusion's.

    encoder = load("stable-diffusion-v1-5/text_encoder")        # config.json, model.safetensors
    tokenizer = tokenizers.load("stable-diffusion-v1-5/tokenizer")    # vocab.json and merges.txt, or another form
    text = encoder(tokenizer(["a red circle"]))                 # Encoded: tokens (1, 77, 768), vector (1, 768)

Folders of transformers 4 and 5 are read: a single file, shards, or a precision variant, in safetensors or, if there are
none, PyTorch pickles, which are not executed (`interop.pickles`). Keys of a configuration that are not in the tables
below are not used by transformers for these encoders either.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdiff.encoders.base import Encoder
from kdiff.encoders.clip import CLIPText, CLIPVision
from kdiff.encoders.ldm import LDMText
from kdiff.encoders.t5 import T5Text
from kdiff.interop import ldm_text
from kdiff.interop.arrays import State
from kdiff.interop.configs import LARGEST, Key, Keys, complete, explained, kind, one_of, only, optional, real, whole
from kdiff.interop.encoder_names import clip_slots, joined, split, t5_slots, without
from kdiff.interop.files import read_json, write_json, write_safetensors
from kdiff.interop.folders import read_weights
from kdiff.interop.weights import Slot, export, fill

__all__ = [
    "ACTIVATIONS",
    "CLIP",
    "COUNT",
    "ENCODERS",
    "FEED_FORWARDS",
    "PARTS",
    "T5",
    "TEXT",
    "VISION",
    "Foreign",
    "load",
    "save",
]

# --- configurations

COUNT = whole(1)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
CLIP = {
    "intermediate_size": Key(2048, COUNT),
    "num_hidden_layers": Key(12, whole(1, 256)),
    "hidden_act": Key("quick_gelu", one_of(*ACTIVATIONS)),
    "layer_norm_eps": Key(1e-5, real(0.0, 1.0)),
}
TEXT = {
    **CLIP,
    "vocab_size": Key(49408, whole(1, 10_000_000)),
    "hidden_size": Key(512, COUNT),
    "num_attention_heads": Key(8, COUNT),
    "max_position_embeddings": Key(77, COUNT),
    "eos_token_id": Key(49407, optional(whole(0, 10_000_000))),
}
VISION = {
    **CLIP,
    "intermediate_size": Key(3072, COUNT),
    "hidden_size": Key(768, COUNT),
    "num_attention_heads": Key(12, COUNT),
    "num_channels": Key(3, COUNT),
    "image_size": Key(224, COUNT),
    "patch_size": Key(32, COUNT),
}
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu_tanh", True), "gated-silu": ("silu", True)}
T5 = {
    "vocab_size": Key(32128, whole(1, 10_000_000)),
    "d_model": Key(512, COUNT),
    "d_kv": Key(64, COUNT),
    "d_ff": Key(2048, COUNT),
    "num_layers": Key(6, whole(1, 256)),
    "num_heads": Key(8, COUNT),
    "relative_attention_num_buckets": Key(32, whole(4, LARGEST)),
    "relative_attention_max_distance": Key(128, whole(2, LARGEST)),
    "layer_norm_epsilon": Key(1e-6, real(0.0, 1.0)),
    "feed_forward_proj": Key("relu", one_of(*FEED_FORWARDS)),
    "is_decoder": only(False),
}


def _clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments common to both encoders of CLIP."""
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "activation": ACTIVATIONS[config["hidden_act"]],
        "epsilon": config["layer_norm_eps"],
    }


def _text(config: Mapping[str, Any], state: State) -> dict[str, Any]:
    # Older files have the wrong end token, 2, and mean the largest token.
    end = config["eos_token_id"]
    return {
        **_clip(config),
        "vocabulary_size": config["vocab_size"],
        "length": config["max_position_embeddings"],
        "projection": _projection(state, "text_projection.weight"),
        "end": None if end in (None, 2) else end,
    }


def _vision(config: Mapping[str, Any], state: State) -> dict[str, Any]:
    return {
        **_clip(config),
        "size": config["image_size"],
        "patch": config["patch_size"],
        "channels": config["num_channels"],
        "projection": _projection(state, "visual_projection.weight"),
    }


def _projection(state: State, name: str) -> int | None:
    return state[name].shape[0] if name in state and len(state[name].shape) == 2 else None


def _t5(config: Mapping[str, Any], state: State) -> dict[str, Any]:
    activation, glu = FEED_FORWARDS[config["feed_forward_proj"]]
    return {
        "vocabulary_size": config["vocab_size"],
        "width": config["d_model"],
        "depth": config["num_layers"],
        "heads": config["num_heads"],
        "head_width": config["d_kv"],
        "hidden": config["d_ff"],
        "activation": activation,
        "glu": glu,
        "buckets": config["relative_attention_num_buckets"],
        "furthest": config["relative_attention_max_distance"],
        "epsilon": config["layer_norm_epsilon"],
    }


# --- folders


class Foreign(NamedTuple):
    """The translation of one kind of model of transformers.

    Attributes:
        made: the class of the encoder.
        keys: of the configuration.
        arguments: of the class, from the configuration and the arrays.
        slots: the names of the weights.
        ours: the arrays by those names, from those of a file.
    """

    made: type[Encoder]
    keys: Keys
    arguments: Callable[[Mapping[str, Any], State], dict[str, Any]]
    slots: Callable[[Encoder], Iterator[Slot]]
    ours: Callable[[State], State]


ENCODERS = {
    "clip_text_model": Foreign(
        CLIPText, TEXT, _text, clip_slots, lambda state: without(state, "text_model.", "text_projection.weight")
    ),
    "clip_vision_model": Foreign(
        CLIPVision,
        VISION,
        _vision,
        clip_slots,
        lambda state: without(state, "vision_model.", "visual_projection.weight"),
    ),
    "t5": Foreign(T5Text, T5, _t5, t5_slots, joined),
    "ldmbert": Foreign(LDMText, ldm_text.KEYS, ldm_text.arguments, ldm_text.ldm_slots, ldm_text.ours),
}
PARTS = {"text": ("clip_text_model", "text_config"), "vision": ("clip_vision_model", "vision_config")}


def load(
    folder: str | Path, part: str | None = None, variant: str | None = None, strict: bool = True, **options: Any
) -> Encoder:
    """The encoder in a folder of transformers: `config.json`, and weights in safetensors or PyTorch files.

    Args:
        folder: of `CLIPTextModel`, `CLIPTextModelWithProjection`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`,
            `CLIPModel`, `T5EncoderModel`, a full T5, whose decoder is skipped, or `LDMBertModel` of diffusers.
        part: of a `CLIPModel`, "text" or "vision".
        variant: of the weights, such as "fp16" for `model.fp16.safetensors`; None for the file without a variant or, if
            there is none, for the only variant.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: arguments of the encoder that replace those of the folder, such as `skip` or `dtype`.

    Raises:
        ValueError: if a file is missing or damaged; if the configuration is not supported; if the weights do not match,
            with a list of all mismatches.
    """
    folder = Path(folder)
    source = folder / "config.json"
    config = read_json(source)
    name = config.get("model_type")
    if name == "clip":
        name, inner = kind(PARTS, part, source, "part")
        config = config.get(inner) or {}
    elif part is not None:
        raise ValueError(
            f"{source}: `part` applies only to a CLIP with text and vision, not to {name!r}; received: {part!r}"
        )
    foreign = kind(ENCODERS, name, source, "model_type")
    config = complete({key: config[key] for key in foreign.keys if key in config}, foreign.keys, source)
    state = foreign.ours(read_weights(folder, variant))
    with explained(source):
        encoder = foreign.made(**{**foreign.arguments(config, state), **options})
    fill(encoder, _input_shape(encoder), foreign.slots, state, folder, strict)
    return encoder


def _input_shape(encoder: Encoder) -> tuple:
    if isinstance(encoder, CLIPVision):
        return (None, encoder.size, encoder.size, encoder.channels)
    return (None, getattr(encoder, "length", None))


def save(encoder: Encoder, folder: str | Path) -> None:
    """Writes a folder that transformers 4 and 5 read: `config.json` and `model.safetensors`.

    Args:
        encoder: a `CLIPText`, `CLIPVision`, `T5Text` or `LDMText`.
        folder: to write to; files of the same names are replaced.

    Raises:
        ValueError: if transformers does not support the encoder.
    """
    folder = Path(folder)
    name = next((name for name, foreign in ENCODERS.items() if isinstance(encoder, foreign.made)), None)
    if name is None or not encoder.built:
        known = sorted(foreign.made.__name__ for foreign in ENCODERS.values())
        raise ValueError(f"save: the encoder must be built and one of {known}; received: {encoder!r}")
    foreign = ENCODERS[name]
    state = export(foreign.slots(encoder))
    config = _config(encoder, name)
    read = complete({key: config[key] for key in foreign.keys if key in config}, foreign.keys, folder)
    differences = {
        key: (getattr(encoder, key), value)
        for key, value in foreign.arguments(read, state).items()
        if getattr(encoder, key) != value
    }
    if differences:
        raise ValueError(
            f"save: transformers does not support this {type(encoder).__name__}; these would change: {differences}"
        )
    if isinstance(encoder, T5Text):
        state = split(state, encoder)
    elif not isinstance(encoder, LDMText):
        prefix = "text_model." if isinstance(encoder, CLIPText) else "vision_model."
        state = {key if key.endswith("_projection.weight") else prefix + key: array for key, array in state.items()}
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", state)


def _config(encoder: Encoder, name: str) -> dict[str, Any]:
    if isinstance(encoder, LDMText):
        return {"model_type": name, "architectures": ["LDMBertModel"], **ldm_text.config_of(encoder)}
    if isinstance(encoder, T5Text):
        feed_forward = {pair: key for key, pair in FEED_FORWARDS.items()}.get((encoder.activation, encoder.glu))
        return {
            "model_type": name,
            "architectures": ["T5EncoderModel"],
            "vocab_size": encoder.vocabulary_size,
            "d_model": encoder.width,
            "d_kv": encoder.head_width,
            "d_ff": encoder.hidden,
            "num_layers": encoder.depth,
            "num_heads": encoder.heads,
            "relative_attention_num_buckets": encoder.buckets,
            "relative_attention_max_distance": encoder.furthest,
            "layer_norm_epsilon": encoder.epsilon,
            "feed_forward_proj": feed_forward,
            "tie_word_embeddings": False,
        }
    text = isinstance(encoder, CLIPText)
    config = {
        "model_type": name,
        "architectures": [f"CLIP{'Text' if text else 'Vision'}Model{'WithProjection' if encoder.projection else ''}"],
        "hidden_size": encoder.width,
        "intermediate_size": encoder.hidden,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}.get(encoder.activation),
        "layer_norm_eps": encoder.epsilon,
        **({"projection_dim": encoder.projection} if encoder.projection else {}),
    }
    if text:
        end = 2 if encoder.end is None else encoder.end
        own = {"vocab_size": encoder.vocabulary_size, "max_position_embeddings": encoder.length, "eos_token_id": end}
    else:
        own = {"image_size": encoder.size, "patch_size": encoder.patch, "num_channels": encoder.channels}
    return {**config, **own}
