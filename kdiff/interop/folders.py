"""The layout of folders of diffusers and its users: the location of each part, its weights file, and further parts.

model_index.json, unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json
model_index.json, config.json, diffusion_pytorch_model.safetensors, scheduler_config.json           google/ddpm-*
config.json, diffusion_pytorch_model.fp16.safetensors                                               a variant
config.json, model.safetensors; pytorch_model.bin                      the names of Accelerate and transformers
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdiff.interop.arrays import State
from kdiff.interop.files import FOLDER_READERS
from kdiff.interop.unsupported import about_folder, listing

__all__ = [
    "AUTOENCODERS",
    "CONTROLS",
    "EMA_NOTES",
    "HARMLESS",
    "NETWORKS",
    "STEMS",
    "check_parts",
    "config_of",
    "has",
    "read_weights",
    "scheduler_of",
    "variant_of",
    "variants",
]

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
NETWORKS = ("unet", "transformer")
AUTOENCODERS = ("vae", "vqvae", "movq")
CONTROLS = ("ControlNetModel", "MultiControlNetModel")
# Keys that `EMAModel.save_pretrained` adds to those of the network.
EMA_NOTES = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
# Parts of a pipeline before or after its network that do not change it.
HARMLESS = (
    "bert",
    "feature_extractor",
    "image_normalizer",
    "image_processor",
    "prior",
    "prior_prior",
    "safety_checker",
    "watermarker",
)


def has(index: Mapping[str, Any], name: str) -> bool:
    """Whether a pipeline has a part; `[null, null]` means none."""
    entry = index.get(name)
    return isinstance(entry, (list, tuple)) and (len(entry) != 2 or entry[1] is not None)


def check_parts(index: Mapping[str, Any], folder: Path) -> str:
    """The name of the network of a pipeline.

    Raises:
        ValueError: if there is not exactly one; if there is another part that changes the results, such as a
            T2I-Adapter.
    """
    parts = [name for name in NETWORKS if has(index, name)]
    if len(parts) != 1:
        raise ValueError(f"{folder}: must have one of {list(NETWORKS)} in `model_index.json`; it has: {sorted(index)}")
    others = [name for name in index if not name.startswith("_") and has(index, name)]
    lost = {name: index[name][-1] for name in others if name not in parts and not _stands_apart(name, index[name])}
    if lost:
        raise ValueError(
            f"{folder}: the pipeline has {lost}, which kdiff does not load, and which changes its results; its "
            f"network alone is loaded by `load({str(folder / parts[0])!r})`"
        )
    return parts[0]


def _stands_apart(name: str, entry: Any) -> bool:
    library, kind = (str(one) for one in entry) if len(entry) == 2 else ("", "Scheduler")
    return (
        name in (*HARMLESS, *AUTOENCODERS)
        or kind in CONTROLS
        or library == "transformers"
        or kind.endswith("Scheduler")
    )


def config_of(folder: Path, part: str) -> Path:
    """The folder of the network of a pipeline: a subfolder, or the folder of the pipeline."""
    inside = (folder / part / "config.json").is_file() or not (folder / "config.json").is_file()
    return folder / part if inside else folder


def scheduler_of(folder: Path) -> Path:
    """The file of the scheduler of a pipeline."""
    inside, beside = folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"
    return beside if beside.is_file() and not inside.is_file() else inside


def read_weights(folder: Path, variant: str | None = None) -> State:
    """The arrays of the weights file, or of the shards, in the folder of a model.

    Args:
        folder: of a single model.
        variant: such as "fp16" or "non_ema"; None for the file without a variant or, if there is none, for the only
            one.

    Raises:
        ValueError: if the file is missing, or there are several variants and none is requested.
    """
    for name, kind in _names(variant):
        if (folder / name).is_file():
            return FOLDER_READERS[kind](folder / name)
    found = variants(folder)
    if variant is None and len(found) == 1:
        return read_weights(folder, found[0])
    if found:
        raise ValueError(f"{folder}: `variant` must be one of {found}; received: {variant!r}")
    wanted = [name for name, _ in _names(variant)]
    raise ValueError(f"{folder}: no weights; expected one of {wanted}; found: {listing(folder)}{about_folder(folder)}")


def _names(variant: str | None) -> Iterator[tuple[str, str]]:
    """The possible names of the file, in order of preference, each with its kind in `FOLDER_READERS`."""
    for stem in STEMS:
        for kind in FOLDER_READERS:
            file, index, _ = kind.partition(".index.json")
            if variant is None:
                yield f"{stem}{kind}", kind
                continue
            yield f"{stem}.{variant}{kind}", kind
            if index:
                yield f"{stem}{file}.index.{variant}.json", kind


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant, if the part of a pipeline in this folder has it."""
    return variant if variant in variants(folder) else None


_VARIANT = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:\.(?P<file>[^.]+)\.(?:safetensors|bin)(?:\.index\.json)?"
    r"|\.(?:safetensors|bin)\.index\.(?P<index>[^.]+)\.json)"
)


def variants(folder: Path) -> list[str]:
    """The variants of the weights in a folder; for shards, those of the index."""
    found = [_VARIANT.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    names = {one["file"] or one["index"] for one in found if one}
    return sorted(name for name in names if not re.search(r"-\d+-of-\d+$", name))
