"""The configurations of autoencoders of diffusers, translated to networks of kdiff and back."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kdiff.blocks.normalization import GroupNorm
from kdiff.codecs.latent import Latent
from kdiff.interop.autoencoder_names import diffusers_slots, tiny_slots
from kdiff.interop.configs import FLAG, Key, Keys, kind, listed, one_of, only, optional, real, whole
from kdiff.interop.unet_keys import COUNT, DEPTH, MAYBE, NAMED, SIZE
from kdiff.interop.weights import Slot
from kdiff.networks.autoencoder import VQ, Autoencoder, AutoencoderKL, Convolutional
from kdiff.networks.autoencoder_tiny import AutoencoderTiny

__all__ = [
    "CLASSES",
    "CONVOLUTIONAL",
    "DEPTHS",
    "DOWN",
    "KINDS",
    "KL",
    "SCALE",
    "TINY",
    "UP",
    "VECTOR",
    "VECTORS",
    "Kind",
    "config_of_scales",
    "scales",
]

SCALE = real(1e-6, 1e6)
VECTOR = optional(listed(real(-1e6, 1e6), 1, 1024))
DEPTHS = listed(whole(0, 16), 1, 12)

CONVOLUTIONAL: Keys = {
    "in_channels": Key(3, COUNT),
    "out_channels": Key(3, COUNT),
    "down_block_types": Key(("DownEncoderBlock2D",), NAMED),
    "up_block_types": Key(("UpDecoderBlock2D",), NAMED),
    "block_out_channels": Key((64,), listed(COUNT, 1, 12)),
    "layers_per_block": Key(1, DEPTH),
    "act_fn": only("silu", "swish"),
    "norm_num_groups": Key(32, COUNT),
    "sample_size": Key(32, SIZE),
    "scaling_factor": Key(0.18215, SCALE),
    "mid_block_add_attention": Key(True, FLAG),
}
KL: Keys = {
    **CONVOLUTIONAL,
    "latent_channels": Key(4, COUNT),
    "shift_factor": Key(None, optional(real(-1e6, 1e6))),
    "latents_mean": Key(None, VECTOR),
    "latents_std": Key(None, VECTOR),
    "force_upcast": Key(True, FLAG),
    "use_quant_conv": Key(True, FLAG),
    "use_post_quant_conv": Key(True, FLAG),
}
VECTORS: Keys = {
    **CONVOLUTIONAL,
    "latent_channels": Key(3, COUNT),
    "num_vq_embeddings": Key(256, whole(1, 10_000_000)),
    "vq_embed_dim": Key(None, MAYBE),
    "norm_type": Key("group", one_of("group", "spatial")),  # MoVQ of Kandinsky
    "lookup_from_codebook": only(False),
    "force_upcast": Key(False, FLAG),
}
TINY: Keys = {
    "in_channels": Key(3, COUNT),
    "out_channels": Key(3, COUNT),
    "encoder_block_out_channels": Key((64,) * 4, listed(COUNT, 1, 12)),
    "decoder_block_out_channels": Key((64,) * 4, listed(COUNT, 1, 12)),
    "block_out_channels": Key(None, optional(listed(COUNT, 1, 12))),  # a redundant copy that diffusers writes
    "act_fn": only("relu"),
    "upsample_fn": only("nearest"),
    "latent_channels": Key(4, COUNT),
    "upsampling_scaling_factor": only(2),
    "num_encoder_blocks": Key((1, 3, 3, 3), DEPTHS),
    "num_decoder_blocks": Key((3, 3, 3, 1), DEPTHS),
    "latent_magnitude": only(3),  # for latents stored as bytes, which kdiff does not support
    "latent_shift": only(0.5),
    "force_upcast": only(False),
    "scaling_factor": Key(1.0, SCALE),
    "shift_factor": Key(0.0, optional(real(-1e6, 1e6))),
}
# Whether a block of each type has attention.
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Kind(NamedTuple):
    """The translation of one class of diffusers.

    Attributes:
        keys: of its configuration.
        network: the network, from a complete configuration and its source.
        config: the part of that configuration that a network determines.
        slots: the names of the weights.
    """

    keys: Keys
    network: Callable[[dict[str, Any], Any], Autoencoder]
    config: Callable[[Any], dict[str, Any]]
    slots: Callable[[Any], Iterator[Slot]]


def _kl(config, source) -> AutoencoderKL:
    quant = {"quant": config["use_quant_conv"], "post_quant": config["use_post_quant_conv"]}
    return AutoencoderKL(**_convolutional(config, source), **quant)


def _vq(config, source) -> VQ:
    spatial, widths = config["norm_type"] == "spatial", (config["vq_embed_dim"], config["latent_channels"])
    if spatial and (config["norm_num_groups"] != 32 or widths[0] not in (None, widths[1])):
        raise ValueError(
            f"{source}: with `norm_type` 'spatial', `norm_num_groups` must be 32 and `vq_embed_dim` equal to "
            f"`latent_channels`; received: {config['norm_num_groups']}, {widths[0]} and {widths[1]}"
        )
    codes = {"codes": config["num_vq_embeddings"], "code_width": widths[0], "spatial": spatial}
    return VQ(**_convolutional(config, source), **codes)


def _convolutional(config, source) -> dict[str, Any]:
    widths = list(config["block_out_channels"])
    down = [kind(DOWN, one, source, "down_block_types") for one in config["down_block_types"]]
    up = [kind(UP, one, source, "up_block_types") for one in config["up_block_types"]][::-1]
    if not len(down) == len(up) == len(widths) or down != up:
        raise ValueError(
            f"{source}: `up_block_types` must mirror `down_block_types`, one for each of `block_out_channels`; "
            f"received: {config['up_block_types']}, {config['down_block_types']} and {widths}"
        )
    return {
        "widths": widths,
        "latent_channels": config["latent_channels"],
        "depth": config["layers_per_block"],
        "channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "attention": config["mid_block_add_attention"],
        "attention_at": [level for level, there in enumerate(down) if there],
        "groups": config["norm_num_groups"],
    }


def _tiny(config, source) -> AutoencoderTiny:
    widths = {*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]}
    if len(widths) > 1:
        raise ValueError(f"{source}: all blocks must have one width to be loaded; received: {sorted(widths)}")
    depths = config["num_encoder_blocks"], config["num_decoder_blocks"]
    ends = config["in_channels"], config["out_channels"]
    return AutoencoderTiny(widths.pop(), config["latent_channels"], *depths, *ends)


def _config_of_convolutional(network: Convolutional) -> dict[str, Any]:
    norms = [layer for layer in network._flatten_layers() if isinstance(layer, GroupNorm) and layer.built]
    groups = sorted({norm.groups_used for norm in norms})
    if len(groups) != 1:
        raise ValueError(f"{network.name}: diffusers has one `groups` for all norms; received: {groups}")
    attention = [level in network.attention_at for level in range(len(network.widths))]
    return {
        "in_channels": network.channels,
        "out_channels": network.out_channels or network.channels,
        "down_block_types": [_name_of(DOWN, one) for one in attention],
        "up_block_types": [_name_of(UP, one) for one in attention[::-1]],
        "block_out_channels": network.widths,
        "layers_per_block": network.depth,
        "act_fn": "silu",
        "norm_num_groups": groups[0],
        "mid_block_add_attention": network.attention,
        "latent_channels": network.latent_channels,
    }


def _name_of(table, value):
    return next(name for name, known in table.items() if known == value)


def _config_of_kl(network: AutoencoderKL) -> dict[str, Any]:
    quant = {"use_quant_conv": network.quant, "use_post_quant_conv": network.post_quant}
    return {**_config_of_convolutional(network), **quant}


def _config_of_vq(network: VQ) -> dict[str, Any]:
    codes = {"num_vq_embeddings": network.codes, "vq_embed_dim": network.latent_width}
    return {**_config_of_convolutional(network), **codes, "norm_type": "spatial" if network.spatial else "group"}


def _config_of_tiny(network: AutoencoderTiny) -> dict[str, Any]:
    widths = [network.width] * len(network.depths)
    return {
        "in_channels": network.channels,
        "out_channels": network.out_channels or network.channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "latent_channels": network.latent_channels,
        "num_encoder_blocks": network.depths,
        "num_decoder_blocks": network.up_depths,
    }


def scales(config) -> dict[str, Any]:
    """The scale and shift of the codec, combined with the statistics of the channels, if any."""
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return {"scale": scale, "shift": shift}
    return {"scale": scale / np.asarray(std), "shift": mean}


def config_of_scales(codec: Latent, keys: Keys) -> dict[str, Any]:
    """The keys of a configuration for the scale and shift of the codec.

    Raises:
        ValueError: if the class of `keys` does not support them.
    """
    if np.ndim(codec.scale) == 0 and (np.ndim(codec.shift) == 0):
        config = {"scaling_factor": codec.scale, **({"shift_factor": codec.shift} if codec.shift else {})}
    else:
        width = codec.autoencoder.latent_width
        std, mean = (np.broadcast_to(one, width).tolist() for one in (1.0 / np.asarray(codec.scale), codec.shift))
        config = {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    if unknown := sorted(set(config) - set(keys)):
        raise ValueError(f"{codec.autoencoder.name}: diffusers does not support {unknown} here; received: {codec!r}")
    return config


KINDS = {
    "AutoencoderKL": Kind(KL, _kl, _config_of_kl, diffusers_slots),
    "VQModel": Kind(VECTORS, _vq, _config_of_vq, diffusers_slots),
    "AutoencoderTiny": Kind(TINY, _tiny, _config_of_tiny, tiny_slots),
}
CLASSES = {AutoencoderKL: "AutoencoderKL", VQ: "VQModel", AutoencoderTiny: "AutoencoderTiny"}
