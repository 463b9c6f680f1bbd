"""LoRA files: low-rank changes of the kernels of a network and of its text encoders.

    change = load(model, "style.safetensors")                     # the kernels become W + alpha / rank up down
    change = load(model, ("style.safetensors", 0.8), ("face.safetensors", 0.5))
    images = model.sample(4, text="a red circle")
    change.remove()                                               # restores the kernels exactly

The names of diffusers, PEFT and kohya are read (see `kdiff.interop.lora_names`), for dense layers and convolutions,
including LoCon. `save` writes a LoRA that `kdiff.lora.enable` added and `fit` trained.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kdiff import deprecated, lora
from kdiff.interop import lora_names, prompts
from kdiff.interop.arrays import State, array_of
from kdiff.interop.configs import shown
from kdiff.interop.files import read_metadata, read_state, write_safetensors
from kdiff.interop.weights import LISTED, Slot, export_layout, read_slot

__all__ = ["FILE", "Change", "Factors", "Source", "load", "read", "save"]

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
Source = str | Path | Mapping[str, Any]


class Factors(NamedTuple):
    """The change of one layer, `scale up down`, in the layout of PyTorch: outputs first.

    Attributes:
        down: (rank, inputs, *size).
        up: (outputs, rank), or (outputs, rank, 1, 1).
        scale: alpha / rank.
        middle: (rank, rank, *size) between the two, for a convolution whose `down` has size 1; else None.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float = 1.0
    middle: np.ndarray | None = None

    def product(self) -> np.ndarray:
        """(outputs, inputs, *size)."""
        up = self.up.reshape(self.up.shape[:2])
        if self.middle is None:
            y = up @ self.down.reshape(len(self.down), -1)
            size = self.down.shape[1:]
        else:
            down = self.down.reshape(self.down.shape[:2])
            y = np.einsum("or,rs...,si->oi...", up, self.middle, down)
            size = y.shape[1:]
        return np.float32(self.scale) * y.reshape(-1, *size)


class Change:
    """The result of `load`, which can be undone.

    Attributes:
        names: the names of the layers that were changed, by part: "unet", "text_encoder".
    """

    def __init__(self, model: keras.layers.Layer, names: dict[str, list[str]]):
        self.names = names
        self._prompt = prompts.prompt_of(lora_names.network_of(model))
        self._kept: list[tuple[Any, np.ndarray, int]] = []  # (variable, values before, checksum after)

    def _add(self, variable: Any, change: np.ndarray) -> None:
        before = ops.convert_to_numpy(variable).copy()
        variable.assign(before.astype("float32") + change)
        self._kept.append((variable, before, _checksum(variable)))

    def remove(self) -> None:
        """Restores the previous values of the kernels.

        Raises:
            ValueError: if kernels have changed since, by training or another LoRA, which must be removed first; then
                nothing is changed.
        """
        if any(_checksum(variable) != after for variable, _, after in self._kept):
            raise ValueError(
                "Change.remove: kernels have changed since, by training or by another LoRA, which must be removed first"
            )
        for variable, before, _ in self._kept:
            variable.assign(before)
        self._kept = []
        self._forget()

    def _forget(self) -> None:
        if self._prompt is not None:
            self._prompt.changed()

    def __repr__(self) -> str:
        return f"Change({ ({part: len(names) for part, names in self.names.items()}) })"


def load(model: keras.layers.Layer, *sources: Source | tuple[Source, float], strict: bool = True) -> Change:
    """Adds LoRAs to the kernels of a model, at no cost in sampling. Averages receive the same change.

    Args:
        model: a `DiffusionModel` or its network, built: a UNet or DiT, with its text encoders, if any.
        sources: files, folders with `pytorch_lora_weights.safetensors`, or state dicts, each alone or as a pair
            (source, weight).
        strict: whether parts of a file without a matching layer are an error; otherwise they are skipped.

    Raises:
        ValueError: if a file is missing, damaged, or not a LoRA; if its names or shapes do not match the model. In
            these cases nothing is changed.
    """
    network = lora_names.network_of(model)
    if not sources:
        raise ValueError("lora.load: at least one file is required; received none")
    parts = lora_names.parts_of(model)
    known = lora_names.normalised(network, parts)
    changes: dict[tuple[str, str], list[tuple[Factors, float]]] = {}
    for source, weight in map(_weighted, sources):
        for place, factors in _placed(source, parts, known, strict).items():
            changes.setdefault(place, []).append((factors, weight))
    names = {part: sorted(name for one, name in changes if one == part) for part in parts}
    change = Change(model, {part: found for part, found in names.items() if found})
    averages = lora.ema_of(model)
    for (part, name), several in changes.items():
        whole = sum(np.float32(weight) * factors.product() for factors, weight in several)
        for slot in parts[part][name]:
            ours = read_slot(slot, whole)
            kernel = slot.layer._kernel
            change._add(kernel, ours)
            if id(kernel) in averages:
                change._add(averages[id(kernel)], ours)
    change._forget()
    return change


def read(source: Source) -> dict[str, Factors]:
    """The changes in a file, by its names of layers.

    Raises:
        ValueError: if it has other content, or inconsistent shapes.
    """
    state, about, where = _opened(source)
    entries: dict[str, dict[str, np.ndarray]] = {}
    lost = []
    for key, array in state.items():
        found = lora_names.ENTRY.fullmatch(key)
        if found is None:
            lost.append(key)
            continue
        kind = {"A": "down", "B": "up"}.get(found["kind"], found["kind"]) or "alpha"
        entries.setdefault(found["name"].replace(".processor.", "."), {})[kind] = np.asarray(array)
    if lost or not entries:
        raise ValueError(
            f"{where}: all arrays must be `down`, `up` and `alpha` of a LoRA; received: {_listed(lost or ['none'])}"
        )
    return {name: _factors(name, entry, about, where) for name, entry in entries.items()}


@deprecated.arguments(averages="ema")
def save(model: keras.layers.Layer, path: str | Path, ema: bool = True, convolutions: bool = False) -> None:
    """Writes A and B of a network, and nothing else, with names that diffusers' `load_lora_weights` reads.

    The scale is included in `up`, so that alpha equals the rank, the default of readers if a file has no alpha.

    Args:
        model: a `DiffusionModel` or its network, with `kdiff.lora.enable`.
        path: a file, "mine.safetensors"; or a folder, in which the default name of diffusers is used.
        ema: whether to write the averages of A and B, if the model has averages that have been updated.
        convolutions: whether `proj_in` and `proj_out` of the target network in diffusers are 1x1 convolutions, as in
            Stable Diffusion 1, where `use_linear_projection` is false; those that kdiff saves are dense layers.

    Raises:
        ValueError: if LoRA is not enabled, or a layer has no name there.
    """
    path = Path(path)
    changed = {id(layer) for layer in lora.enabled(model)}
    if not changed:
        raise ValueError("lora.save: the network has no LoRA; add one with `kdiff.lora.enable(model, rank)`")
    averaged = lora.ema_of(model) if ema else {}
    state: State = {}
    for part, layers in lora_names.parts_of(model).items():
        for name, found in layers.items():
            ours = [slot for slot in found if id(slot.layer) in changed]
            changed -= {id(slot.layer) for slot in ours}
            if ours:
                down, up = _written(ours, averaged)
                if convolutions and down.ndim == 2 and re.search(r"attentions\.\d+\.proj_(in|out)$", name):
                    down, up = down[:, :, None, None], up[:, :, None, None]
                name = lora_names.saved(part, name)
                state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    if changed:
        paths = [layer._kernel.path for layer in lora.enabled(model) if id(layer) in changed]
        raise ValueError(f"lora.save: diffusers has no separate names for these layers: {_listed(paths)}")
    write_safetensors(path if path.suffix == ".safetensors" else path / FILE, state)


def _written(found: list[Slot], averaged: Mapping[int, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of one array in the file; the factors of several layers that are rows of it are concatenated."""
    downs, ups = [], []
    for slot in found:
        layer = slot.layer
        a, b = (
            np.asarray(ops.convert_to_numpy(averaged.get(id(one), one)), "float32")
            for one in (layer.lora_kernel_a, layer.lora_kernel_b)
        )
        up = np.float32(layer.lora_alpha / layer.lora_rank) * b.T
        downs.append(export_layout(slot, a))
        ups.append(up if slot.rows is None else slot.rows.put(up, None))
    down, up = np.concatenate(downs), np.concatenate(ups, axis=1)
    return down, up.reshape(*up.shape, *[1] * (down.ndim - 2))


def _weighted(source) -> tuple[Source, float]:
    source, weight = source if isinstance(source, tuple) and len(source) == 2 else (source, 1.0)
    if not isinstance(source, (str, Path, Mapping)) or isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"lora.load: a source must be a file, or (file, weight); received: {source!r}, {weight!r}")
    if not math.isfinite(weight):
        raise ValueError(f"lora.load: a weight must be finite; received: {weight!r}")
    return source, weight


def _opened(source: Source) -> tuple[State, dict[str, Any], str]:
    """(arrays, metadata of the header, the name of the source for errors)."""
    if isinstance(source, Mapping):
        return {name: array_of(array, name, "the state dict") for name, array in source.items()}, {}, "the state dict"
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    state = read_state(path)
    about = read_metadata(path).get("lora_adapter_metadata") if path.suffix == ".safetensors" else None
    try:
        return state, json.loads(about) if about else {}, str(path)
    except ValueError as error:
        raise ValueError(f"{path}: `lora_adapter_metadata` must be JSON: {error}") from error


def _placed(source, parts, known, strict) -> dict[tuple[str, str], Factors]:
    """The changes in a file by (part, name), checked against the layers."""
    factors, where = read(source), "the state dict" if isinstance(source, Mapping) else str(source)
    places = {name: lora_names.place(name, known) for name in factors}
    wrong = [f"not in the model: {name}" for name, place in places.items() if place is None] if strict else []
    found: dict[tuple[str, str], Factors] = {}
    for name, place in places.items():
        if place is None:
            continue
        if place in found:
            wrong.append(f"twice: {name}")
        found[place] = factors[name]
        shape = _shape(factors[name])
        for slot in parts[place[0]][place[1]]:
            if (mode := slot.layer.quantization_mode) is not None:
                wrong.append(f"{mode}: {name} would be added to a quantized kernel; load it before `quantize`")
                continue
            ours = read_slot(slot, np.broadcast_to(np.float32(0.0), shape))
            if ours is None or ours.shape != tuple(slot.layer._kernel.shape):
                wrong.append(f"shape: {name} is of {shape}, which does not make {tuple(slot.layer._kernel.shape)}")
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} changes do not fit the model:\n  {_lines(wrong)}")
    if not found:
        raise ValueError(f"{where}: no change matches a layer of the model; the file has: {_listed(list(factors))}")
    return found


def _shape(factors: Factors) -> tuple[int, ...]:
    size = factors.down.shape[2:] if factors.middle is None else factors.middle.shape[2:]
    return (factors.up.shape[0], factors.down.shape[1], *size)


def _factors(name: str, entry: Mapping[str, np.ndarray], about: Mapping[str, Any], where: str) -> Factors:
    missing = [kind for kind in ("down", "up") if kind not in entry]
    if missing:
        raise ValueError(f"{where}: {name} must have `down` and `up`; missing: {missing}")
    down, up, middle = entry["down"], entry["up"], entry.get("mid")
    rank = len(down) if down.ndim else 0
    plain = down.ndim >= 2 and up.ndim >= 2 and set(up.shape[2:]) <= {1}
    if middle is not None:
        plain = plain and middle.shape[:2] == (up.shape[1], rank) and set(down.shape[2:]) <= {1}
    if not plain or (up.shape[1] != rank and middle is None) or not rank:
        shapes = {kind: array.shape for kind, array in entry.items()}
        raise ValueError(f"{where}: {name} must be (rank, inputs, ...) and (outputs, rank); received: {shapes}")
    for kind, array in entry.items():
        alone = kind == "alpha"  # it may be an integer
        if array.dtype.kind not in ("fiu" if alone else "f") or not np.all(np.isfinite(array)):
            raise ValueError(f"{where}: {name}, {kind}: must be finite floating-point numbers; received: {array.dtype}")
        if alone and array.size != 1:
            raise ValueError(f"{where}: {name}: alpha must be one number; received: {shown(array.tolist())}")
    return Factors(down, up, _scale(name, entry.get("alpha"), rank, about), middle)


def _scale(name: str, alpha: np.ndarray | None, rank: int, about: Mapping[str, Any]) -> float:
    """alpha / rank; 1 if the file has no alpha."""
    if alpha is not None:
        return float(alpha.reshape(())) / rank
    part, _, layer = name.partition(".")
    said = {key.partition(".")[2]: value for key, value in about.items() if key.startswith(f"{part}.")}
    said, layer = (said, layer) if said else (dict(about), name)
    patterns = said.get("alpha_pattern") or {}
    fits = [value for key, value in patterns.items() if layer == key.lstrip("^") or layer.endswith(f".{key}")]
    alpha = (fits or [said.get("lora_alpha", rank)])[0]
    return float(alpha) / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _checksum(variable: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(ops.convert_to_numpy(variable)).view("uint8"))


def _listed(names: Iterable[str]) -> str:
    return shown(list(names)[:LISTED])


def _lines(lines: list[str]) -> str:
    more = [f"{len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n  ".join([*lines[:LISTED], *more])
