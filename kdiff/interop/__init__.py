"""Foreign checkpoints: `diffusers.load(folder)`, `diffusers.save(model, folder)`; `single_files.load(file)` for Stable
Diffusion in one file, `keras_cv.load(*files)` for KerasCV's and `keras_hub.load(preset)` for KerasHub's; `lora`,
`inversions` and `ip_adapters` for additions to them; `original` for the papers' own."""

from kdiff.interop import (
    autoencoders,
    diffusers,
    inversions,
    ip_adapters,
    keras_cv,
    keras_hub,
    lora,
    original,
    single_files,
)

__all__ = [
    "autoencoders",
    "diffusers",
    "inversions",
    "ip_adapters",
    "keras_cv",
    "keras_hub",
    "lora",
    "original",
    "single_files",
]
