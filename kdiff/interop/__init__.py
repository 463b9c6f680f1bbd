"""Foreign checkpoints: `diffusers.load(folder)` and `diffusers.save(model, folder)`; `single_files.load(file)` for
Stable Diffusion in one file; `keras_cv.load(*files)` and `keras_hub.load(preset)` for KerasCV and KerasHub; `lora`,
`inversions` and `ip_adapters` for additions to models; `original` for the checkpoints of papers."""

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
