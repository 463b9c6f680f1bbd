"""Autoencoders of diffusers and of latent diffusion's own code, as codecs: with the scale and shift of their latents.

codec = load("stable-diffusion/vae")              # AutoencoderKL, VQModel, AutoencoderTiny
save(codec, "mine")                               # diffusers.AutoencoderKL.from_pretrained("mine")
codec = original("vae-ft-mse-840000.safetensors") # the layout of latent diffusion, alone or in a whole checkpoint
model.codec = codec;  network = codec.autoencoder
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdiff.blocks.normalization import GroupNorm
from kdiff.codecs.latent import Latent
from kdiff.interop.arrays import array_of
from kdiff.interop.autoencoder_names import diffusers_slots, original_slots, tiny_slots
from kdiff.interop.configs import (
    FLAG,
    Key,
    Keys,
    complete,
    explained,
    kind,
    listed,
    one_of,
    only,
    optional,
    real,
    whole,
)
from kdiff.interop.files import State, read_json, read_state, write_json, write_safetensors
from kdiff.interop.folders import read_weights
from kdiff.interop.unet_keys import COUNT, DEPTH, MAYBE, NAMED, SIZE
from kdiff.interop.unet_names import renamed
from kdiff.interop.weights import Slot, export, fill
from kdiff.networks.autoencoder import VQ, Autoencoder, AutoencoderKL, Convolutional
from kdiff.networks.autoencoder_tiny import Tiny

__all__ = [
    "CLASSES",
    "CONVOLUTIONAL",
    "DEPTHS",
    "DOWN",
    "FIRST_STAGE",
    "KINDS",
    "KL",
    "SCALE",
    "TINY",
    "UP",
    "VECTOR",
    "VECTORS",
    "Kind",
    "from_state",
    "image_shape",
    "load",
    "original",
    "save",
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
    "norm_type": Key("group", one_of("group", "spatial")),  # Kandinsky's movq
    "lookup_from_codebook": only(False),
    "force_upcast": Key(False, FLAG),
}
TINY: Keys = {
    "in_channels": Key(3, COUNT),
    "out_channels": Key(3, COUNT),
    "encoder_block_out_channels": Key((64,) * 4, listed(COUNT, 1, 12)),
    "decoder_block_out_channels": Key((64,) * 4, listed(COUNT, 1, 12)),
    "block_out_channels": Key(None, optional(listed(COUNT, 1, 12))),  # a copy that diffusers writes
    "act_fn": only("relu"),
    "upsample_fn": only("nearest"),
    "latent_channels": Key(4, COUNT),
    "upsampling_scaling_factor": only(2),
    "num_encoder_blocks": Key((1, 3, 3, 3), DEPTHS),
    "num_decoder_blocks": Key((3, 3, 3, 1), DEPTHS),
    "latent_magnitude": only(3),  # of bytes made of latents, which kdiff does not
    "latent_shift": only(0.5),
    "force_upcast": only(False),
    "scaling_factor": Key(1.0, SCALE),
    "shift_factor": Key(0.0, optional(real(-1e6, 1e6))),
}
# Whether a block of each type has attention.
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Kind(NamedTuple):
    """How one class of diffusers is translated.

    Attributes:
        keys: of its configuration.
        network: of a complete configuration and its source.
        config: of a network, what it has of that configuration.
        slots: the names of its weights.
    """

    keys: Keys
    network: Callable[[dict[str, Any], Any], Autoencoder]
    config: Callable[[Any], dict[str, Any]]
    slots: Callable[[Any], Iterator[Slot]]


# --- configurations


def _kl(config, source) -> AutoencoderKL:
    quant = {"quant": config["use_quant_conv"], "post_quant": config["use_post_quant_conv"]}
    return AutoencoderKL(**_convolutional(config, source), **quant)


def _vq(config, source) -> VQ:
    spatial, widths = config["norm_type"] == "spatial", (config["vq_embed_dim"], config["latent_channels"])
    if spatial and (config["norm_num_groups"] != 32 or widths[0] not in (None, widths[1])):
        raise ValueError(
            f"{source}: with `norm_type` 'spatial', `norm_num_groups` must be 32 and `vq_embed_dim` that of "
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


def _tiny(config, source) -> Tiny:
    widths = {*config["encoder_block_out_channels"], *config["decoder_block_out_channels"]}
    if len(widths) > 1:
        raise ValueError(f"{source}: all blocks must have one width to be loaded; received: {sorted(widths)}")
    depths = config["num_encoder_blocks"], config["num_decoder_blocks"]
    ends = config["in_channels"], config["out_channels"]
    return Tiny(widths.pop(), config["latent_channels"], *depths, *ends)


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


def _config_of_tiny(network: Tiny) -> dict[str, Any]:
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


def _scales(config) -> dict[str, Any]:
    """The scale and shift of the codec: with statistics of the channels, these, and the scale besides."""
    scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return {"scale": scale, "shift": shift}
    return {"scale": scale / np.asarray(std), "shift": mean}


def _config_of_scales(codec: Latent, keys: Keys) -> dict[str, Any]:
    if np.ndim(codec.scale) == 0 and (np.ndim(codec.shift) == 0):
        config = {"scaling_factor": codec.scale, **({"shift_factor": codec.shift} if codec.shift else {})}
    else:
        width = codec.autoencoder.latent_width
        std, mean = (np.broadcast_to(one, width).tolist() for one in (1.0 / np.asarray(codec.scale), codec.shift))
        config = {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    if unknown := sorted(set(config) - set(keys)):
        raise ValueError(f"{codec.autoencoder.name}: diffusers has no {unknown} for it; received: {codec!r}")
    return config


KINDS = {
    "AutoencoderKL": Kind(KL, _kl, _config_of_kl, diffusers_slots),
    "VQModel": Kind(VECTORS, _vq, _config_of_vq, diffusers_slots),
    "AutoencoderTiny": Kind(TINY, _tiny, _config_of_tiny, tiny_slots),
}
CLASSES = {AutoencoderKL: "AutoencoderKL", VQ: "VQModel", Tiny: "AutoencoderTiny"}


# --- folders


def load(folder: str | Path, strict: bool = True, variant: str | None = None, **options: Any) -> Latent:
    """The codec of a folder of an `AutoencoderKL`, a `VQModel` or an `AutoencoderTiny` of diffusers.

    Args:
        folder: with `config.json` and the weights.
        strict: whether weights that do not match are an error; otherwise a warning.
        variant: of the weights, as of `diffusers.load`.
        options: arguments of `codecs.Latent` in place of what the folder says.

    Raises:
        ValueError: if a file is missing or damaged; if the configuration says what kdiff cannot do; if the weights do
            not match, with a list of all that do not.
    """
    folder = Path(folder)
    source = folder / "config.json"
    config = read_json(source)
    model = kind(KINDS, config.get("_class_name"), source, "_class_name")
    config = complete(config, model.keys, source)
    with explained(source):
        network = model.network(config, source)
        codec = Latent(network, **{"upcast": config["force_upcast"], **_scales(config), **options})
    state = renamed(read_weights(folder, variant))
    fill(network, (None, None, None, network.channels), model.slots, state, folder, strict)
    return codec


def save(codec: Latent | Autoencoder, folder: str | Path) -> None:
    """Writes a folder that diffusers reads by `from_pretrained` of the class.

    Args:
        codec: a `codecs.Latent`, or an autoencoder, whose latents then have scale 1.
        folder: to write to; files of the same names are replaced.

    Raises:
        ValueError: if diffusers has no such autoencoder.
    """
    codec = codec if isinstance(codec, Latent) else Latent(codec)
    network = codec.autoencoder
    if type(network) not in CLASSES or not network.built or len(network.get_build_config()["input_shape"]) != 4:
        raise ValueError(
            f"{network.name}: only a built {' or '.join(one.__name__ for one in CLASSES)} of images can be saved for "
            f"diffusers; this is {network!r}"
        )
    name = CLASSES[type(network)]
    keys = KINDS[name].keys
    config = {"_class_name": name, **KINDS[name].config(network), **_config_of_scales(codec, keys)}
    config |= {"force_upcast": codec.upcast} if name != "AutoencoderTiny" else {}
    config |= {"sample_size": codec.tiles or 512} if "sample_size" in keys else {}
    write_json(Path(folder) / "config.json", config)
    state = export(KINDS[name].slots(network))
    write_safetensors(Path(folder) / "diffusion_pytorch_model.safetensors", state)


def image_shape(codec: Latent, shape: tuple) -> tuple:
    """The shape of a batch of images, from that of a batch of their latents."""
    sizes = (size and size * codec.factor for size in shape[1:-1])
    return (shape[0], *sizes, codec.autoencoder.channels)


# --- latent diffusion's own files

FIRST_STAGE = "first_stage_model."


def original(
    source: str | Path | Mapping[str, Any],
    scale: float = 0.18215,
    shift: float = 0.0,
    *,
    groups: int = 32,
    strict: bool = True,
    **options: Any,
) -> Latent:
    """The codec of an autoencoder in the layout of latent diffusion, with or without a codebook.

    All sizes are read off the weights. Of a whole checkpoint, what is called "first_stage_model." is read, and of one
    of an autoencoder in training not the networks of its loss.

    Args:
        source: a `.safetensors`, `.npz` or `.pt` file, of which the last needs PyTorch and is read for its tensors
            alone; or a mapping of arrays.
        scale, shift: of the codec, which such a file does not tell.
        groups: of the group norms.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: other arguments of `codecs.Latent`.
    """
    if isinstance(source, Mapping):
        return from_state(source, "the state dict", scale, shift, groups=groups, strict=strict, **options)
    return from_state(read_state(source), str(source), scale, shift, groups=groups, strict=strict, **options)


def from_state(
    whole: Mapping[str, Any],
    name: str,
    scale: float = 0.18215,
    shift: float = 0.0,
    *,
    groups: int = 32,
    strict: bool = True,
    **options: Any,
) -> Latent:
    """As `original`, of arrays by name; `name` is of their source, for errors."""
    prefix = FIRST_STAGE if any(key.startswith(FIRST_STAGE) for key in whole) else ""
    parts = tuple(f"{prefix}{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize"))
    state = {key: array_of(array, key, name) for key, array in whole.items() if key.startswith(parts)}
    with explained(name):
        network = _measured({key.removeprefix(prefix): array for key, array in state.items()}, groups)
        codec = Latent(network, scale, shift, **options)
    named = functools.partial(_prefixed, prefix)
    fill(network, (None, None, None, network.channels), named, state, name, strict)
    return codec


def _prefixed(prefix: str, network: Convolutional) -> Iterator[Slot]:
    return (slot._replace(name=prefix + slot.name) for slot in original_slots(network))


def _measured(state: State, groups: int) -> Convolutional:
    """The network whose sizes are those of the weights."""
    levels = _numbers(state, r"encoder\.down\.(\d+)\.block\.")
    needed = {"encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"}
    missing = sorted(key for key in needed if np.ndim(state.get(key)) != 4)
    if missing or levels != list(range(len(levels))) or not levels:
        raise ValueError(
            f"no autoencoder in the layout of latent diffusion: {missing or 'encoder.down'} must be there; it has: "
            f"{sorted(state)[:5]}"
        )
    widths = [len(state.get(f"encoder.down.{level}.block.0.conv1.bias", ())) for level in levels]
    shared = {
        "widths": widths,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "depth": len(_numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")),
        "channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "attention": any(key.startswith("encoder.mid.attn_1.") for key in state),
        "attention_at": _numbers(state, r"encoder\.down\.(\d+)\.attn\."),
        "groups": groups,
    }
    table = state.get("quantize.embedding.weight")
    if table is None:
        quant = {"quant": "quant_conv.weight" in state, "post_quant": "post_quant_conv.weight" in state}
        return AutoencoderKL(**shared, **quant)
    return VQ(**shared, codes=table.shape[0], code_width=table.shape[-1])


def _numbers(state: State, pattern: str) -> list[int]:
    found = map(functools.partial(re.match, pattern), state)
    return sorted({int(one[1]) for one in found if one})
