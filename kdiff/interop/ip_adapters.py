"""IP-Adapter: files that let a U-Net of Stable Diffusion attend to an image in addition to its text.

    load(model, "ip-adapter_sd15.safetensors", "image_encoder")
    images = model.sample(4, text="best quality", image_prompt=image, guidance=7.5)
    set_scale(model, 0.6)                             # scales the contribution of the image
    set_scale(model, 0.0, r"/down_")                  # only in some layers

| file | the image is given as | its tokens |
|---|---|---|
| `ip-adapter_sd15`, `_sd15_light`, `_sdxl`, `_sdxl_vit-h` | the vector of CLIP's encoder | 4, from a dense layer |
| `ip-adapter-plus_...`, `ip-adapter-plus-face_...` | its tokens before the last block | 16, `PerceiverResampler` |

    image_proj.{proj, norm} or .{latents, proj_in, layers, proj_out, norm_out}
    ip_adapter.{1, 3, 5 ...}.{to_k_ip, to_v_ip}.weight    for attention layers 1, 3, ...: first the encoder,
                                                          then the decoder, then the middle; even ones are
                                                          self-attention
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.base import Chain
from kdiff.blocks.beside_context import DecoupledAttention, PerceiverResampler
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.layers import Dense
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.transformer import FeedForward
from kdiff.encoders import CLIPVision, ImagePrompt
from kdiff.interop import encoders
from kdiff.interop.arrays import State, array_of
from kdiff.interop.configs import explained
from kdiff.interop.files import read_archived, read_state
from kdiff.interop.unet_names import unet_slots
from kdiff.interop.weights import Part, Rows, Slot, assign, slots
from kdiff.networks.unet import UNet

__all__ = ["CONDITION", "HEAD_WIDTH", "RESAMPLER", "TOKENS", "UNKNOWN", "load", "set_scale"]

CONDITION = "image_prompt"
TOKENS, HEAD_WIDTH = 4, 64
# Kinds of files that are not supported, by an array that only they have.
UNKNOWN = {
    "perceiver_resampler.proj_in.weight": "FaceID Plus",
    "proj.3.weight": "Full Face",
    "proj.2.weight": "FaceID",
    "time_embedding.linear_1.weight": "time-dependent tokens",
}
RESAMPLER = {
    PerceiverResampler: {
        "proj_in": "projection_in",
        "layers.*.0": "attention",
        "layers.*.1": "feed_forward",
        "proj_out": "projection_out",
        "norm_out": "norm",
    },
    ContextAttention: {
        "norm1": "context_normalization",
        "norm2": "normalization",
        "to_q": "query",
        "to_kv": [
            *(Part(name, rows=Rows((0,), 2)) for name in ("key", "context_key")),
            *(Part(name, rows=Rows((1,), 2)) for name in ("value", "context_value")),
        ],
        "to_out": "output_layer",
    },
    FeedForward: {"0": "normalization", "1": "hidden", "3": "output_layer"},
}


def load(
    model: Any,
    source: str | Path | Mapping[str, Any],
    encoder: CLIPVision | str | Path | None = None,
    scale: float = 1.0,
) -> None:
    """Adds the condition "image_prompt" to a model: an image, None, or the output of the encoder.

    It is frozen. A model has at most one; it is part of the model, and saved with it.

    Args:
        model: a built `DiffusionModel` with a `UNet` that attends to a text, or its network.
        source: a file, `.safetensors` or `.bin`, or its content: {"image_proj": ..., "ip_adapter": ...}, or one mapping
            with dotted names.
        encoder: the image encoder of CLIP with which it was trained, or its folder; None if the condition is given as
            the output vector of the encoder (not for files of the second kind, which need the encoding of a black
            image).
        scale: of the contribution of the image to the attention.

    Raises:
        ValueError: if the file is missing, damaged, of another kind, or of FaceID; if it does not match the network or
            the encoder. In these cases nothing is changed.
    """
    network = getattr(model, "network", model)
    if not isinstance(network, UNet) or not network.built or CONDITION in network.conditions:
        raise ValueError(
            f"ip_adapters.load: the network must be a built UNet without {CONDITION!r}; received: {network!r:.80}"
        )
    state, where = _read(source)
    layers = _attentions(network)
    projection = {key.removeprefix("image_proj."): one for key, one in state.items() if key.startswith("image_proj.")}
    layer, row = _projection(projection, where)
    _check_width(state, layers, where)
    if isinstance(encoder, (str, Path)):
        encoder = encoders.load(encoder, **({"skip": 1} if isinstance(layer, PerceiverResampler) else {}))
    condition = _condition(layer, row, encoder, where)
    shapes = {**network.get_build_config()["input_shape"], CONDITION: (None, *condition.row)}
    condition.build((None, *condition.row))
    made = [DecoupledAttention(*one.split, dtype=one.dtype_policy, name="image") for one in layers]
    width = layer.compute_output_shape((None, *condition.row))
    for one in made:
        one.build(width)
    wanted = [*_projection_slots(condition.layer), *_attention_slots(made)]
    assign(wanted, _complete(state, condition.layer), where)
    network.add_condition(CONDITION, condition, shapes)
    for ours, one in zip(_attentions(network), made, strict=True):
        for variable, given in zip(ours.beside.weights, one.weights, strict=True):
            variable.assign(given)
    set_scale(model, scale)
    if hasattr(model, "shapes"):
        model.shapes = {**model.shapes, CONDITION: (None, *condition.row)}
        model._forget_graphs()


def set_scale(model: keras.layers.Layer, scale: float, where: str = "") -> None:
    """Sets the scale of the contribution of the image to the attention; 0 disables it.

    Args:
        model: a `DiffusionModel` or its network.
        scale: the factor.
        where: a regular expression searched in the paths of layers, such as "u_net/down_0/..."; "" for all.

    Raises:
        ValueError: if no layer matches.
    """
    network = getattr(model, "network", model)
    layers = [
        one for one in network._flatten_layers() if isinstance(one, MultiHeadAttention) and one.beside is not None
    ]
    paths = {one.query._kernel.path.rpartition("/query/")[0]: one for one in layers}
    found = [one for path, one in paths.items() if re.search(where, path)]
    if not found:
        raise ValueError(
            f"set_scale: `where` must match the path of an attention layer, {list(paths)}; received: {where!r}"
        )
    for one in found:
        one.beside.scale.assign(float(scale))


def _read(source) -> tuple[State, str]:
    if isinstance(source, Mapping):
        content, where = source, "the mapping"
    else:
        path = Path(source)
        content, where = read_archived(path) if path.suffix in (".bin", ".pt") else read_state(path), str(path)
    state: State = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        state |= {".".join(filter(None, (name, key))): array_of(one, f"{name}.{key}", where) for key, one in inner}
    if not all(any(name.startswith(f"{part}.") for name in state) for part in ("image_proj", "ip_adapter")):
        raise ValueError(f"{where}: an IP-Adapter must have `image_proj` and `ip_adapter`; it has: {list(state)[:5]}")
    return state, where


def _attentions(network: UNet) -> list[MultiHeadAttention]:
    """The attention layers to the context, in the order of the file."""
    found = {}
    for slot in unet_slots(network):
        if re.search(r"\.attn2\.to_q\.weight$", slot.name):
            found[id(slot.layer)] = slot.name
    by_query = {
        id(one.query): one for one in network._flatten_layers() if isinstance(one, MultiHeadAttention) and one.built
    }
    order = ("down_blocks", "up_blocks", "mid_block")

    def place(name):
        return order.index(name.partition(".")[0]), [int(number) for number in re.findall(r"\.(\d+)\.", name)]

    return [by_query[key] for key, _ in sorted(found.items(), key=lambda one: place(one[1]))]


def _projection(state: State, where: str) -> tuple[Any, tuple[int, ...]]:
    """(the layer from an image to tokens, the shape of its input, with None for unknown sizes)."""
    refused = [kind for name, kind in UNKNOWN.items() if name in state]
    base, plus = (
        {"proj.weight", "proj.bias", "norm.weight", "norm.bias"},
        {"latents", "proj_in.weight", "proj_out.weight"},
    )
    if refused or not (set(state) == base or plus <= set(state)):
        raise ValueError(
            f"{where}: an IP-Adapter must have one dense layer or a resampler for the image; received "
            + (f"the kind {refused[0]}" if refused else f"{list(state)[:5]}")
        )
    with explained(where):
        if set(state) == base:
            width = state["norm.weight"].shape[0]
            count = state["proj.weight"].shape[0] // width
            layers = [Dense(count * width), keras.layers.Reshape((count, width)), LayerNorm()]
            return Chain(layers), (state["proj.weight"].shape[1],)
        _, count, width = state["latents"].shape
        depth = len({found[1] for found in (re.match(r"layers\.(\d+)\.", name) for name in state) if found})
        heads = state["layers.0.0.to_q.weight"].shape[0] // HEAD_WIDTH
        ratio = state["layers.0.1.1.weight"].shape[0] / width
        layer = PerceiverResampler(count, width, state["proj_out.weight"].shape[0], depth, heads, HEAD_WIDTH, ratio)
        return layer, (-1, state["proj_in.weight"].shape[1])


def _condition(layer, row, encoder, where) -> ImagePrompt:
    of_tokens = isinstance(layer, PerceiverResampler)
    if encoder is None and of_tokens:
        raise ValueError(f"{where}: needs an `encoder`, since the tokens of a black image represent no image")
    if encoder is None:
        return ImagePrompt(layer, row=row)
    width = encoder.width if of_tokens else encoder.projection or encoder.width
    if width != row[-1] or (of_tokens and encoder.skip != 1):
        raise ValueError(
            f"{where}: needs the encoder with which it was trained, of output width {row[-1]}"
            + (", and `skip=1`" if of_tokens else "")
            + f"; received {width}{f', and skip={encoder.skip}' if of_tokens else ''}"
        )
    return ImagePrompt(layer, encoder, of_tokens=of_tokens)


def _check_width(state, layers, where) -> None:
    count = len({name.split(".")[1] for name in state if name.startswith("ip_adapter.")})
    if count != len(layers):
        raise ValueError(
            f"{where}: is for a network with {count} layers of attention to text; this one has {len(layers)}"
        )


def _projection_slots(layer: Any) -> Iterator[Slot]:
    if isinstance(layer, PerceiverResampler):
        yield Slot("image_proj.latents", layer.learned.table)
        yield from slots(layer, "image_proj", RESAMPLER)
    else:
        for name, one in zip(("proj", "norm"), (layer.layers[0], layer.layers[-1]), strict=True):
            yield from slots(one, f"image_proj.{name}", {})


def _attention_slots(made: list[DecoupledAttention]) -> Iterator[Slot]:
    for i, layer in enumerate(made):
        for name, one in (("to_k_ip", layer.key), ("to_v_ip", layer.value)):
            yield from slots(one, f"ip_adapter.{2 * i + 1}.{name}", {})


def _complete(state: State, layer: Any) -> State:
    """The arrays without the batch axis, and with zero biases, which the attention of the resampler lacks."""
    state = dict(state)
    if isinstance(layer, PerceiverResampler):
        state["image_proj.latents"] = np.asarray(state["image_proj.latents"])[0]
        zeros = np.zeros(layer.width, "float32")
        state |= {f"image_proj.layers.{i}.0.to_out.bias": zeros for i in range(layer.depth)}
    return state
