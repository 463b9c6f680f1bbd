"""ControlNets of diffusers: a single folder, and those of a pipeline.

control = diffusers.load("sd-controlnet-canny")                               # networks.ControlNet
model = diffusers.load("stable-diffusion-v1-5", controlnet={"edges": "sd-controlnet-canny", "depth": "..."})
model.sample(4, text="a red hat", edges=drawing, depth=distances, depth_scale=0.5, guidance=7.5)
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kdiff import backend
from kdiff.blocks.base import copy_layer
from kdiff.blocks.conditions import Joint
from kdiff.encoders.prompt import INPUT, Prompt, PromptVector
from kdiff.interop import folders, prompts, saving_unets, unet_names, unets
from kdiff.interop.configs import Described, Key, complete, explained, listed, one_of, only
from kdiff.interop.files import read_json, write_json, write_safetensors
from kdiff.interop.folders import CONTROLS
from kdiff.interop.saving_networks import check_same
from kdiff.interop.unet_keys import COUNT, UNET_2D_CONDITION
from kdiff.interop.weights import Slot, export, fill
from kdiff.networks.control import Controlled, ControlNet, Hint
from kdiff.networks.unet import UNet

__all__ = [
    "KEYS",
    "NAME",
    "PART",
    "Controls",
    "control_config",
    "control_net",
    "control_slots",
    "folders_of",
    "load",
    "save",
    "save_all",
    "with_controls",
]

Controls = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
PART = "controlnet"  # the folder in a pipeline; further ones are controlnet_1, controlnet_2
NAME = "control"  # the picture of the ControlNet of a pipeline

# The keys that it shares with the U-Net.
_OWN = (
    *("in_channels", "block_out_channels", "down_block_types", "mid_block_type", "layers_per_block", "norm_eps"),
    *("downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "resnet_time_scale_shift"),
    *("flip_sin_to_cos", "freq_shift", "class_embed_type", "num_class_embeds", "addition_embed_type"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "attention_head_dim", "num_attention_heads"),
    *("only_cross_attention", "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection"),
    "upcast_attention",
)
KEYS = {
    **{name: UNET_2D_CONDITION[name] for name in _OWN},
    "layers_per_block": Key(2, COUNT),
    "cross_attention_dim": Key(1280, COUNT),
    "encoder_hid_dim": only(None),  # the ControlNet does not use its layer
    "encoder_hid_dim_type": only(None),
    "addition_embed_type": Key(None, one_of(None, "text_time")),
    "conditioning_channels": Key(3, COUNT),
    "conditioning_embedding_out_channels": Key((16, 32, 96, 256), listed(COUNT, 1, 12)),
    "controlnet_conditioning_channel_order": only("rgb"),
    "global_pool_conditions": only(False),
}


def control_net(config: dict[str, Any], source: Any) -> Described:
    """The network of a `ControlNetModel`: the encoder half of the U-Net of the same configuration.

    Raises:
        ValueError: if the configuration is not supported.
    """
    config = complete(config, KEYS, source, UNET_2D_CONDITION)
    names = config["down_block_types"]
    half = {name: config[name] for name in _OWN}
    half["up_block_types"] = [name.replace("Down", "Up") for name in reversed(names)]
    nested = any(isinstance(one, (list, tuple)) for one in _listed(config["transformer_layers_per_block"]))
    half |= {"reverse_transformer_layers_per_block": [1] * len(names)} if nested else {}
    unet, shapes = unets.unet_2d_condition(half, source)
    conditions, shapes = dict(unet.conditions), dict(shapes)
    if isinstance(conditions.get(prompts.CONTEXT), keras.layers.Identity):
        conditions.pop(prompts.CONTEXT)
        shapes["tokens"] = shapes.pop(prompts.CONTEXT)
    hint = Hint(config["conditioning_embedding_out_channels"])
    network = ControlNet(unet.levels, unet.middle, unet.embedding, conditions, hint)
    return Described(network, {**shapes, "hint": (None, None, None, config["conditioning_channels"])})


def control_slots(network: ControlNet) -> Iterator[Slot]:
    """The names of the weights of a ControlNet."""
    yield from unet_names.way_down_slots(network)
    first, *others = network.hint.layers
    layers = {"controlnet_cond_embedding.conv_in": first, "controlnet_cond_embedding.conv_out": network.hint.last}
    for i, layer in enumerate(others):
        layers[f"controlnet_cond_embedding.blocks.{i}"] = getattr(layer, "convolution", layer)
    *outlets, last = network.outlets
    layers |= {f"controlnet_down_blocks.{i}": layer for i, layer in enumerate(outlets)}
    yield from unet_names.named_slots({**layers, "controlnet_mid_block": last}.items())


# --- of a pipeline


def folders_of(folder: Path, index: Mapping[str, Any], given: Controls | None) -> dict[str, Path]:
    """The folders of the ControlNets of a pipeline, by the names of their pictures.

    Args:
        folder: the folder of the pipeline.
        index: its `model_index.json`.
        given: folders by name, instead of its own; a single one is "control", others "control_1", "control_2".
    """
    if given is None:
        own = index[PART][-1] if folders.has(index, PART) else None
        found = [folder / PART] if own else []
        if own == CONTROLS[1]:
            more = sorted(folder.glob(f"{PART}_*"), key=lambda path: (len(path.name), path.name))
            found += [path for path in more if (path / "config.json").is_file()]
        given = found
    if isinstance(given, Mapping):
        return {name: Path(path) for name, path in given.items()}
    paths = [given] if isinstance(given, (str, Path)) else list(given)
    return {f"{NAME}_{i}" if i else NAME: Path(path) for i, path in enumerate(paths)}


def load(folder: Path, strict: bool = True, variant: str | None = None, prompt: Prompt | None = None) -> Described:
    """A ControlNet with its weights.

    Args:
        folder: the folder of the `ControlNetModel`.
        strict, variant: as in `diffusers.load`.
        prompt: the text condition of the pipeline, if the network uses it.

    Raises:
        ValueError: if the folder is of another class; otherwise as in `diffusers.load`.
    """
    source = folder / "config.json"
    config = read_json(source)
    if config.get("_class_name") != CONTROLS[0]:
        raise ValueError(f"{source}: `_class_name` must be {CONTROLS[0]!r}; received: {config.get('_class_name')!r}")
    with explained(source):
        described = control_net(config, source)
        if prompt is not None:
            described = _prompted(described, prompt.vector, prompt.row)
    variant = folders.variant_of(folder, variant)
    state = unet_names.renamed(folders.read_weights(folder, variant))
    fill(described.network, {"time": (None,), **described.shapes}, control_slots, state, folder, strict)
    return described


def _prompted(described: Described, vector: int, row: tuple) -> Described:
    """The network with the vector of the text taken from its rows, "text"."""
    network, shapes = described.network, dict(described.shapes)
    if "text_embeds" not in shapes or "added" not in network.conditions:
        return described
    if shapes.pop("text_embeds")[-1] != vector:
        raise ValueError(f"{network.name}: must accept the text vector, of size {vector}")
    added = network.conditions["added"]
    named = {INPUT if name == "text_embeds" else name: part for name, part in added.parts.items()}
    network.conditions["added"] = Joint({**named, INPUT: PromptVector(vector)}, added.layer)
    return Described(network, {**shapes, INPUT: (None, *row)})


def with_controls(
    described: Described, paths: Mapping[str, Path], strict: bool, variant: str | None, prompt: Prompt | None
) -> Described:
    """The U-Net, with its weights, and the ControlNets of these folders."""
    if not paths:
        return described
    made = {name: load(path, strict, variant, prompt) for name, path in paths.items()}
    network = Controlled(described.network, {name: one.network for name, one in made.items()})
    return Described(network, {**described.shapes, **{name: one.shapes["hint"] for name, one in made.items()}})


# --- saving


def control_config(network: ControlNet) -> dict[str, Any]:
    """The configuration of a `ControlNetModel`.

    Raises:
        ValueError: if diffusers does not support the network.
    """
    shapes = network.get_build_config()["input_shape"]
    unet = _whole(network, shapes)
    config = saving_unets.unet_config(unet)
    if config["_class_name"] != "UNet2DConditionModel" or not isinstance(network.hint, Hint):
        raise ValueError(
            f"{network.name}: ControlNets of diffusers attend to a context and have a `Hint`; here: {network.hint!r} "
            f"and the inputs: {sorted(shapes)}"
        )
    own = {
        "_class_name": CONTROLS[0],
        "conditioning_channels": shapes["hint"][-1],
        "conditioning_embedding_out_channels": list(network.hint.widths),
    }
    return {**{name: config[name] for name in _OWN if name in config}, **own}


def _whole(network: ControlNet, shapes: Mapping[str, Any]) -> UNet:
    """A U-Net, without weights, whose encoder half is the control."""
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    levels = [level.clone(up_mixer="same", up_mixers=None) for level in network.levels]
    conditions = {name: copy_layer(layer) for name, layer in network.conditions.items()}
    if "tokens" in shapes:
        conditions = {prompts.CONTEXT: keras.layers.Identity(), **conditions}
    unet = UNet(
        levels, network.middle, copy_layer(network.embedding), conditions, network.levels[0].block.normalization
    )
    named = {prompts.CONTEXT if name == "tokens" else name: shape for name, shape in shapes.items() if name != "hint"}
    with backend.unallocated():
        unet.build(named)
    return unet


def save(network: ControlNet, folder: Path, values: Mapping[int, Any] | None = None) -> None:
    """Writes a folder that `ControlNetModel.from_pretrained` reads.

    Args:
        network: the ControlNet, built.
        folder: to write to.
        values: values of weights, by their `id`, that replace the current ones.

    Raises:
        ValueError: if diffusers does not support the network.
    """
    config = control_config(network)
    again, shapes = control_net(config, folder)
    parts = getattr(network.conditions.get("added"), "parts", {})
    if isinstance(parts.get(INPUT), PromptVector):
        again, _ = _prompted(Described(again, shapes), parts[INPUT].width, ())
    check_same(network, again)
    write_json(folder / "config.json", config)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", export(control_slots(network), values))


def save_all(network: Any, folder: Path, values: Mapping[int, Any]) -> dict[str, Any]:
    """Writes the ControlNets of a network; returns their entries for `model_index.json`, if any."""
    controls = list(network.controls.values()) if isinstance(network, Controlled) else []
    for i, one in enumerate(controls):
        save(one, folder / (f"{PART}_{i}" if i else PART), values)
    return {PART: ["diffusers", CONTROLS[len(controls) > 1]]} if controls else {}


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]
