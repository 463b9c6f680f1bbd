"""Configurations of networks in diffusers, from kdiff's objects, verified by reading them back.

Anything that diffusers cannot express is found by `check_same`: the network that is read back would differ.
"""

from typing import Any

import keras

from kdiff.blocks.lookup import LabelEmbedding
from kdiff.interop import transformers
from kdiff.interop.mmdit import mmdit_config
from kdiff.interop.saving_unets import Config, name_of, ncsnpp_config, size_of, unet_config
from kdiff.networks.dit import DiT
from kdiff.networks.mmdit import MMDiT
from kdiff.networks.ncsnpp import NCSNpp
from kdiff.networks.unet import UNet, UNetEncoder

__all__ = ["FREE", "FREE_OF", "check_same", "network_config"]


def network_config(network: keras.Model) -> Config:
    """The configuration of the network in its class of diffusers.

    Raises:
        ValueError: if there is none.
    """
    if not network.built:
        raise ValueError(f"{network.name}: has no weights to save; build it, or call it once")
    if isinstance(network, MMDiT):
        return mmdit_config(network)
    if isinstance(network, DiT):
        return _dit(network)
    if isinstance(network, NCSNpp):
        return ncsnpp_config(network)
    if isinstance(network, UNet):
        return unet_config(network)
    raise ValueError(
        f"{network.name}: only a UNet, a DiT and an MMDiT can be saved for diffusers; received a "
        f"{type(network).__name__}"
    )


def _dit(network: DiT) -> Config:
    block = network.blocks[0].layers[0]
    heads, width = block.self_attention.attention._split
    label = network.conditions.get("label")
    if set(network.conditions) != {"label"} or not isinstance(label, LabelEmbedding):
        raise ValueError(f"{network.name}: DiT in diffusers has only a label; received: {network.conditions}")
    size = size_of(network)
    if not isinstance(size, int):
        raise ValueError(f"{network.name}: DiT in diffusers is for square images of one size; received: {size}")
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
        "activation_fn": name_of(network, transformers.ACTIVATIONS, block.activation),
        "num_embeds_ada_norm": label.table.shape[0] - 1,
        "norm_type": "ada_norm_zero",
        "norm_eps": block.feed_forward.normalization.normalization.epsilon,
    }


# Allowed differences between the network and the one read back: names, seeds, initialisers, and numbers that the
# weights or `network_config` determine.
FREE = {"name", "seed", "zero", "trainable", "dtype", "build_config", "groups", "heads", "head_width", "width", "remat"}
FREE_OF = {
    "LabelEmbedding": {"num_classes", "dropout"},
    "MLPEmbedding": set(),
    "ImageEmbedding": {"dropout"},
    "NoisedEmbedding": {"dropout", "max_level"},
    "OptionalCondition": {"dropout"},
    "PicturePrompt": {"dropout", "batch_size"},
    "DiT": {"out_channels", "separate"},
    "MMDiT": {"out_channels"},
    "PositionTable": {"base_size"},
    "UNet": {"out_channels", "levels"},
    "NCSNpp": {"out_channels", "levels"},
    "ControlNet": {"levels"},
}


def check_same(network: keras.Model, again: keras.Model) -> None:
    """Raises a ValueError unless the network that is read back, `again`, equals the saved one."""
    differences = [f"{path}: {a!r} would be {b!r}" for path, a, b in _differences(network, again)]
    if differences:
        raise ValueError(f"{network.name}: diffusers does not support this network:\n  " + "\n  ".join(differences))


def _differences(network, again):
    yield from _compare("", _plain(network), _plain(again))
    if isinstance(network, UNetEncoder):
        pairs = list(zip(network.levels, again.levels, strict=True))
        both = isinstance(network, UNet)
        for i, (a, b) in enumerate(pairs):
            ways = ("mixers_down", "mixers_up") if both else ("mixers_down",)
            resamplers = ("downsample", "upsample") if both else ("downsample",)
            names = ("block", *ways, *(resamplers if i < len(pairs) - 1 else ()))
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
