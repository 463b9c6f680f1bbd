"""The names of layers in LoRA files.

unet.down_blocks.0. ... .attn1.to_q.lora_A.weight            PEFT and diffusers; also lora.down, lora_linear_layer.down
unet.down_blocks.0. ... .attn1.processor.to_q_lora.down.weight     older diffusers
lora_unet_down_blocks_0_ ... _attn1_to_q.lora_down.weight    kohya; lora_te_, lora_te1_, lora_te2_ for text encoders
lora_unet_input_blocks_1_1_ ... _attn1_to_q.lora_down.weight     the same, with the names of a single file (SDXL)
"""

import collections
import re
from collections.abc import Iterator
from typing import Any

import keras

from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.layers import LowRank
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.interop import encoders, mmdit, prompts, transformers, unet_names
from kdiff.interop.weights import Slot, slots
from kdiff.networks.control import Controlled
from kdiff.networks.dit import DiT
from kdiff.networks.mmdit import MMDiT
from kdiff.networks.unet import UNet

__all__ = ["ALIASES", "ENTRY", "Layers", "layers_of", "network_of", "normalised", "parts_of", "place", "saved"]

Layers = dict[str, list[Slot]]  # the kernels that are parts of the array of this name

# The prefixes of the names of a part; kohya writes "_" for dots. Names without a prefix belong to the network.
ALIASES = {
    "unet": ("unet.", "lora_unet_"),
    "transformer": ("transformer.", "lora_transformer_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_"),
}
ENTRY = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+?)(?:(?:[._]lora(?:_linear_layer)?)?\.(?P<alpha>alpha)"
    r"|[._]lora(?:_linear_layer)?[._](?P<kind>A|B|down|up|mid)(?:\.\w+)?\.weight)"
)
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Inner names in a single file, where they differ.
_ONE_FILE = {
    **unet_names.NAMES,
    ResidualBlock: {
        "in_layers.2": "first",
        "emb_layers.1": ["projection", "second_normalization.projection"],
        "out_layers.3": "second",
        "skip_connection": "shortcut",
    },
    Downsample: {"op": "convolution"},
    Upsample: {"conv": "last"},
}


def network_of(model: keras.layers.Layer) -> keras.layers.Layer:
    """The network of a model, without its ControlNets, if any."""
    network = getattr(model, "network", model)
    return network.network if isinstance(network, Controlled) else network


def parts_of(model: keras.layers.Layer) -> dict[str, Layers]:
    """The layers of each part of a model or network, by their names in diffusers.

    Raises:
        ValueError: if its network has no names there.
    """
    network, parts = network_of(model), {}
    if isinstance(network, UNet):
        parts["unet"] = layers_of(unet_names.unet_slots(network))
    elif isinstance(network, MMDiT):
        parts["transformer"] = layers_of(mmdit.mmdit_slots(network))
    elif isinstance(network, DiT):
        parts["transformer"] = layers_of(transformers.dit_slots(network))
    else:
        raise ValueError(
            "LoRA: only the layers of a UNet, a DiT and an MMDiT have names of diffusers; received: "
            f"{type(network).__name__}"
        )
    prompt = prompts.prompt_of(network)
    for name, encoder in prompts.encoders_of(prompt).items() if prompt else ():
        kinds = (kind for kind in encoders.ENCODERS.values() if isinstance(encoder, kind.made))
        parts[name] = layers_of(next(kinds).slots(encoder))
    return parts


def layers_of(wanted: Iterator[Slot]) -> Layers:
    """The kernels of dense layers and convolutions by name, without ".weight"; layers with several are omitted."""
    found = [slot for slot in wanted if isinstance(slot.layer, LowRank) and slot.name.endswith(".weight")]
    count = collections.Counter(id(slot.layer) for slot in found)
    layers: Layers = {}
    for slot in found:
        if count[id(slot.layer)] == 1:
            layers.setdefault(slot.name.removesuffix(".weight"), []).append(slot)
    return layers


def normalised(network: Any, parts: dict[str, Layers]) -> dict[str, tuple[str, str]]:
    """(part, name) by every name used in files, with "_" for every dot."""
    known = {}
    for part, layers in parts.items():
        for name in layers:
            for alias in ALIASES[part]:
                known[_flat(alias + name)] = known[_flat(f"{alias}text_model.{name}")] = (part, name)
            if part in ("unet", "transformer"):
                known[_flat(name)] = (part, name)
    if isinstance(network, UNet) and "unet" in parts:
        names = {id(found[0].layer): name for name, found in parts["unet"].items()}
        for slot in _one_file(network):
            if id(slot.layer) in names and slot.name.endswith(".weight"):
                known[_flat(f"lora_unet_{slot.name.removesuffix('.weight')}")] = ("unet", names[id(slot.layer)])
    return known


def place(name: str, known: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    """(part, name) of the layer of this name in a file, without "processor"; None if there is none."""
    old, _, last = name.rpartition(".")
    for one in (name, f"{name}.0", f"{old}.{_OLD_TEXT.get(last, last)}"):
        if _flat(one) in known:
            return known[_flat(one)]
    return None


def saved(part: str, name: str) -> str:
    """The name of a layer in a file of diffusers, where encoders of CLIP always have a prefix."""
    return f"{part}.text_model.{name}" if name.startswith("encoder.layers.") else f"{part}.{name}"


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _one_file(network: UNet) -> Iterator[Slot]:
    """The slots of a U-Net by the names of a single file, those of the original code of latent diffusion."""
    names = {**_ONE_FILE, type(network.embedding): {"0": "hidden", "2": "output_layer"}}
    layers = {"time_embed": network.embedding, "input_blocks.0.0": network.stem, "out.2": network.head}
    if "added" in network.conditions:
        layers["label_emb.0"] = network.conditions["added"].layer
    for way, chains, first in (("input_blocks", network.down, 1), ("output_blocks", network.up, 0)):
        for i, chain in enumerate(chains):
            layers |= {f"{way}.{first + i}.{j}": layer for j, layer in enumerate(chain.layers)}
    layers |= {f"middle_block.{i}": layer for i, layer in enumerate(network.bridge.layers)}
    for name, layer in layers.items():
        yield from slots(layer, name, names)
