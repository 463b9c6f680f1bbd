"""Autoencoders of diffusers and of the latent diffusion code, as codecs, with the scale and shift of their latents.

codec = load("stable-diffusion/vae")              # AutoencoderKL, VQModel, AutoencoderTiny
save(codec, "mine")                               # diffusers.AutoencoderKL.from_pretrained("mine")
codec = original("vae-ft-mse-840000.safetensors") # the layout of latent diffusion, alone or in a full checkpoint
model.codec = codec;  network = codec.autoencoder
"""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdiff.codecs.latent import Latent
from kdiff.interop.arrays import array_of
from kdiff.interop.autoencoder_configs import CLASSES, KINDS, config_of_scales, scales
from kdiff.interop.autoencoder_names import original_slots
from kdiff.interop.configs import complete, explained, kind
from kdiff.interop.files import State, read_json, read_state, write_json, write_safetensors
from kdiff.interop.folders import read_weights
from kdiff.interop.unet_names import renamed
from kdiff.interop.weights import Slot, export, fill
from kdiff.networks.autoencoder import VQ, Autoencoder, AutoencoderKL, Convolutional

__all__ = ["FIRST_STAGE", "from_state", "image_shape", "load", "original", "save"]


# --- folders


def load(folder: str | Path, strict: bool = True, variant: str | None = None, **options: Any) -> Latent:
    """The codec in the folder of an `AutoencoderKL`, a `VQModel` or an `AutoencoderTiny` of diffusers.

    Args:
        folder: with `config.json` and the weights.
        strict: whether weights that do not match are an error; otherwise a warning.
        variant: of the weights, as in `diffusers.load`.
        options: arguments of `codecs.Latent` that replace those of the folder.

    Raises:
        ValueError: if a file is missing or damaged; if the configuration is not supported; if the weights do not match,
            with a list of all mismatches.
    """
    folder = Path(folder)
    source = folder / "config.json"
    config = read_json(source)
    model = kind(KINDS, config.get("_class_name"), source, "_class_name")
    config = complete(config, model.keys, source)
    with explained(source):
        network = model.network(config, source)
        codec = Latent(network, **{"upcast": config["force_upcast"], **scales(config), **options})
    state = renamed(read_weights(folder, variant))
    fill(network, (None, None, None, network.channels), model.slots, state, folder, strict)
    return codec


def save(codec: Latent | Autoencoder, folder: str | Path) -> None:
    """Writes a folder for `from_pretrained` of the diffusers class.

    Args:
        codec: a `codecs.Latent`, or an autoencoder, whose latents have scale 1.
        folder: to write to; files of the same names are replaced.

    Raises:
        ValueError: if diffusers does not support this autoencoder.
    """
    codec = codec if isinstance(codec, Latent) else Latent(codec)
    network = codec.autoencoder
    if type(network) not in CLASSES or not network.built or len(network.get_build_config()["input_shape"]) != 4:
        raise ValueError(
            f"{network.name}: only a built {' or '.join(one.__name__ for one in CLASSES)} of images can be saved for "
            f"diffusers; received: {network!r}"
        )
    name = CLASSES[type(network)]
    keys = KINDS[name].keys
    config = {"_class_name": name, **KINDS[name].config(network), **config_of_scales(codec, keys)}
    config |= {"force_upcast": codec.upcast} if name != "AutoencoderTiny" else {}
    config |= {"sample_size": codec.tiles or 512} if "sample_size" in keys else {}
    write_json(Path(folder) / "config.json", config)
    state = export(KINDS[name].slots(network))
    write_safetensors(Path(folder) / "diffusion_pytorch_model.safetensors", state)


def image_shape(codec: Latent, shape: tuple) -> tuple:
    """The shape of a batch of images, from that of their latents."""
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

    All sizes are inferred from the weights. From a full checkpoint only "first_stage_model." is read; from a training
    checkpoint of an autoencoder, the networks of its loss are skipped.

    Args:
        source: a `.safetensors`, `.npz` or `.pt` file (`.pt` needs PyTorch, and only its tensors are read); or a
            mapping of arrays.
        scale, shift: of the codec, which such a file does not contain.
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
    """As `original`, from a state dict; `name` is that of its source, for errors."""
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
    """The network with the sizes of the weights."""
    levels = _numbers(state, r"encoder\.down\.(\d+)\.block\.")
    needed = {"encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"}
    missing = sorted(key for key in needed if np.ndim(state.get(key)) != 4)
    if missing or levels != list(range(len(levels))) or not levels:
        raise ValueError(
            f"no autoencoder in the layout of latent diffusion: {missing or 'encoder.down'} is missing; it has: "
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
