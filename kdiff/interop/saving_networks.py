"""Configurations of networks for diffusers, from our objects, held to what reading them gives.

What diffusers has no word for, `check_same` finds: the network that is read back would differ.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import keras

from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import LabelEmbedding, MLPEmbedding
from kdiff.blocks.normalization import GroupNorm
from kdiff.blocks.transformer import SpatialTransformer
from kdiff.interop import transformers
from kdiff.interop.maps import input_shapes, map_conditions
from kdiff.interop.unets import PADDINGS
from kdiff.networks.dit import DiT
from kdiff.networks.ncsnpp import NCSNpp
from kdiff.networks.unet import UNet

__all__ = ["FREE", "FREE_OF", "Config", "check_same", "network_config"]

Config = dict[str, Any]


def network_config(network: keras.Model) -> Config:
    """The configuration of the class of diffusers that the network is.

    Raises:
        ValueError: if there is none.
    """
    if not network.built:
        raise ValueError(f"{network.name}: has no weights to save; build it, or call it once")
    if isinstance(network, DiT):
        return _dit(network)
    if isinstance(network, NCSNpp):
        return _ncsnpp(network)
    if isinstance(network, UNet):
        return _unet(network)
    raise ValueError(
        f"{network.name}: only a UNet and a DiT can be saved for diffusers; this is a {type(network).__name__}"
    )


def _unet(network: UNet) -> Config:
    conditioned = "context" in network.conditions
    waves = _attribute(network, network.embedding, "embedding")
    config = {
        "_class_name": "UNet2DConditionModel" if conditioned else "UNet2DModel",
        "sample_size": _size(network),
        "in_channels": network.stem.kernel.shape[2],
        "out_channels": network.head.kernel.shape[3],
        "flip_sin_to_cos": not _attribute(network, waves, "sine_first"),
        "freq_shift": int(_attribute(network, waves, "shift")),
        "time_embedding_dim": network.embedding.output_layer.units,
        "block_out_channels": [level.width for level in network.levels],
        "layers_per_block": _one(network, "depth", [level.depth for level in network.levels]),
        "norm_num_groups": _groups(network),
        "norm_eps": _attribute(network, network.normalization, "epsilon"),
        "resnet_time_scale_shift": "scale_shift" if network.levels[0].block.scale_shift else "default",
        "dropout": network.levels[0].block.dropout,
        **_labels(network),
        **_blocks(network),
        **_middle(network, conditioned),
    }
    return {**config, **(_conditioned(network) if conditioned else {"attention_head_dim": _head_width(network)})}


def _ncsnpp(network: NCSNpp) -> Config:
    attention = ["" if level.mixer is None else "Attn" for level in network.levels]
    norm, first = _attribute(network, network.normalization, "epsilon"), network.normalization.groups
    _one(network, "groups` of attention's norm on the levels", [32, *_attended_groups(network)])
    if first is not None:  # None is as many as there can be, up to 32, there too
        _one(network, "groups` in the middle and at the end", [first, *_middle_groups(network)])
    return {
        "_class_name": "UNet2DModel",
        "sample_size": _size(network),
        "in_channels": network.stem.kernel.shape[2],
        "out_channels": network.head.kernel.shape[3],
        "time_embedding_type": "fourier",
        "time_embedding_dim": _attribute(network, network.embedding, "output_layer").units,
        "down_block_types": [f"{kind}SkipDownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}SkipUpBlock2D" for kind in attention[::-1]],
        "block_out_channels": [level.width for level in network.levels],
        "layers_per_block": _one(network, "depth", [level.depth for level in network.levels]),
        "norm_num_groups": first,
        "norm_eps": norm,
        "resnet_time_scale_shift": "scale_shift" if network.levels[0].block.scale_shift else "default",
        "dropout": network.levels[0].block.dropout,
        "attention_head_dim": _head_width(network),
        **_labels(network),
        **_middle(network, False),
    }


def _blocks(network: UNet) -> Config:
    *finer, _ = network.levels
    down = [_type(network, "Down", level, level.downsample) for level in finer]
    up = [_type(network, "Up", level, above.upsample) for above, level in itertools.pairwise(network.levels)]
    last, first = network.levels[-1], network.levels[0]
    down += [_type(network, "Down", last, None)]
    up = [_type(network, "Up", first, None), *up]
    resnets = {
        f"{way}sample_type": "resnet"
        for way, name in (("down", "downsample"), ("up", "upsample"))
        if any(isinstance(level.mixer, SelfAttention) for level in network.levels)
        and any(isinstance(getattr(level, name), ResidualBlock) for level in finer)
    }
    paddings = {level.downsample.padding for level in finer if hasattr(level.downsample, "padding")}
    padding = _one(network, "padding", sorted(paddings) or ["symmetric"])
    padding = next(number for number, name in PADDINGS.items() if name == padding)
    return {"down_block_types": down, "up_block_types": up[::-1], "downsample_padding": padding, **resnets}


def _type(network, way: str, level, resampler) -> str:
    kind = type(level.mixer)
    names = {type(None): "", SelfAttention: "Attn", SpatialTransformer: "CrossAttn"}
    if kind not in names:
        raise ValueError(f"{network.name}: diffusers has no block with the mixer {level.mixer!r}")
    if isinstance(resampler, ResidualBlock) and not names[kind]:
        return f"Resnet{way}sampleBlock2D"
    return f"{names[kind]}{way}Block2D"


def _middle(network: UNet, conditioned: bool) -> Config:
    middle = network.middle
    if conditioned:
        kind = "UNetMidBlock2DCrossAttn" if isinstance(middle.mixer, SpatialTransformer) else "UNetMidBlock2D"
        return {"mid_block_type": kind, "mid_block_scale_factor": middle.block.rescale}
    norm = getattr(middle.mixer, "normalization", None)
    groups = network.bridge.layers[1].normalization.groups_used if isinstance(norm, GroupNorm) else None
    config = {"add_attention": middle.mixer is not None, "mid_block_scale_factor": middle.block.rescale}
    return {**config, "attn_norm_num_groups": groups}


def _conditioned(network: UNet) -> Config:
    count = len(network.levels)
    crossed = {i: layer for i, layer in _mixers(network) if isinstance(layer, SpatialTransformer)}
    default = crossed.get(-1) or next(iter(crossed.values()), None)
    if default is None:
        raise ValueError(f"{network.name}: no level attends to the context, and diffusers has no such network")
    at = [crossed.get(i, default) for i in range(count)]
    config = {
        "attention_head_dim": [layer.blocks[0].self_attention.attention._split[0] for layer in at],
        "transformer_layers_per_block": [layer.depth for layer in at],
        "cross_attention_dim": default.blocks[0].cross_attention.attention.key.kernel.shape[0],
        "use_linear_projection": True,
    }
    if "added" in network.conditions:
        added = network.conditions["added"]
        waves = _attribute(network, _attribute(network, added, "parts").get("time_ids"), "width")
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = waves
        config["projection_class_embeddings_input_dim"] = _attribute(network, added.layer, "hidden").kernel.shape[0]
    return config


def _mixers(network: UNet) -> Iterator[tuple[int, Any]]:
    """(level, mixer): the first of each level, and that of the middle as level -1."""
    down = iter(network.down)
    for i, level in enumerate(network.levels):
        units = [next(down) for _ in range(level.depth + (i < len(network.levels) - 1))]
        if level.mixer is not None:
            yield i, units[0].layers[1]
    if network.middle.mixer is not None:
        yield -1, network.bridge.layers[1]


def _head_width(network: UNet) -> int | None:
    """The width of a head at every level; None where each has one head."""
    splits = [layer.attention._split for _, layer in _mixers(network) if isinstance(layer, SelfAttention)]
    if all(heads == 1 for heads, _ in splits):
        return None
    return _one(network, "head_width", [width for _, width in splits])


def _labels(network: UNet) -> Config:
    layer = network.conditions.get("label")
    kinds = {
        type(None): lambda: {},
        LabelEmbedding: lambda: {"num_class_embeds": layer.table.shape[0]},
        MLPEmbedding: lambda: {"class_embed_type": "timestep"},
        keras.layers.Identity: lambda: {"class_embed_type": "identity"},
    }
    unknown = sorted(set(network.conditions) - {"context", "label", "added", *map_conditions(network)})
    if unknown or type(layer) not in kinds:
        raise ValueError(f"{network.name}: diffusers has no such conditions: {unknown or {'label': layer}}")
    return kinds[type(layer)]()


def _attended_groups(network: UNet) -> list[int]:
    """Of the norms of attention, but for that in the middle."""
    layers = [layer for i, layer in _mixers(network) if i >= 0 and isinstance(layer, SelfAttention)]
    return [layer.normalization.groups_used for layer in layers]


def _middle_groups(network: UNet) -> list[int]:
    blocks = [layer for layer in network.bridge.layers if isinstance(layer, ResidualBlock)]
    return [block.normalization.groups_used for block in blocks]


def _groups(network: UNet) -> int:
    """Of all normalisations but that of the attention in the middle, which may have others, and those of templates."""
    own = {id(layer.normalization) for layer in network.bridge.layers if isinstance(layer, SelfAttention)}
    norms = [layer for layer in network._flatten_layers() if isinstance(layer, GroupNorm) and layer.built]
    return _one(network, "groups", [norm.groups_used for norm in norms if id(norm) not in own])


def _dit(network: DiT) -> Config:
    block = network.blocks[0].layers[0]
    heads, width = block.self_attention.attention._split
    label = network.conditions.get("label")
    if set(network.conditions) != {"label"} or not isinstance(label, LabelEmbedding):
        raise ValueError(f"{network.name}: diffusers' DiT has a label, and nothing else; this has {network.conditions}")
    size = _size(network)
    if not isinstance(size, int):
        raise ValueError(f"{network.name}: diffusers' DiT is for square images of one size; this is for {size}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "in_channels": network.patchify.projection.kernel.shape[0] // network.patch**2,
        "out_channels": network.head.channels,
        "num_layers": network.depth,
        "dropout": block.dropout,
        "attention_bias": block.bias,
        "sample_size": size,
        "patch_size": network.patch,
        "activation_fn": _name_of(network, transformers.ACTIVATIONS, block.activation),
        "num_embeds_ada_norm": label.table.shape[0] - 1,
        "norm_type": "ada_norm_zero",
        "norm_eps": 1e-6,
    }


def _size(network) -> int | list | None:
    sizes = list(input_shapes(network).get("image", (None,) * 4)[1:3])
    return sizes[0] if sizes[0] == sizes[1] else sizes


def _one(network, name: str, values: list) -> Any:
    """The value that all have."""
    if len(set(values)) != 1:
        raise ValueError(f"{network.name}: diffusers has one `{name}` for all blocks; received: {values}")
    return values[0]


def _attribute(network, layer, name: str) -> Any:
    if not hasattr(layer, name):
        raise ValueError(f"{network.name}: diffusers has nothing like {layer!r}")
    return getattr(layer, name)


def _name_of(network, table: dict, value: Any) -> str:
    for name, known in table.items():
        if known == value:
            return name
    raise ValueError(f"{network.name}: diffusers knows {sorted(table.values())}; received: {value!r}")


# What may differ between the network and what is read back: names, seeds, initial weights, and numbers that the weights
# themselves, or `network_config`, have settled.
FREE = {"name", "seed", "zero", "trainable", "dtype", "build_config", "groups", "heads", "head_width", "width", "remat"}
FREE_OF = {
    "LabelEmbedding": {"num_classes", "dropout"},
    "MLPEmbedding": set(),
    "DiT": {"out_channels", "separate"},
    "UNet": {"out_channels", "levels"},
    "NCSNpp": {"out_channels", "levels"},
}


def check_same(network: keras.Model, again: keras.Model) -> None:
    """Raises a ValueError unless what diffusers reads, `again`, is the network that was to be saved."""
    differences = [f"{path}: {a!r} would be {b!r}" for path, a, b in _differences(network, again)]
    if differences:
        raise ValueError(f"{network.name}: diffusers has no such network:\n  " + "\n  ".join(differences))


def _differences(network, again):
    yield from _compare("", _plain(network), _plain(again))
    if isinstance(network, UNet):
        pairs = list(zip(network.levels, again.levels, strict=True))
        for i, (a, b) in enumerate(pairs):
            names = ("block", "mixer", *(("downsample", "upsample") if i < len(pairs) - 1 else ()))
            for name in names:
                yield from _compare(f"levels[{i}].{name}", _plain(getattr(a, name)), _plain(getattr(b, name)))


def _plain(layer: Any) -> Any:
    return keras.saving.serialize_keras_object(layer)


def _compare(path: str, a: Any, b: Any):
    if isinstance(a, dict) and isinstance(b, dict):
        free = FREE | FREE_OF.get(a.get("class_name"), set())
        if "config" in a and "config" in b:
            a, b = ({**value, "config": _without(value["config"], free)} for value in (a, b))
        for name in sorted((set(a) | set(b)) - FREE):
            yield from _compare(f"{path}.{name}".strip("."), a.get(name), b.get(name))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _compare(f"{path}[{i}]", one, other)
    elif a != b:
        yield path.replace("config.", ""), a, b


def _without(config: Any, names: set[str]) -> Any:
    return {key: value for key, value in config.items() if key not in names} if isinstance(config, dict) else config
