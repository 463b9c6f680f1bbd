"""Foreign checkpoints: `diffusers.load(folder)`, `diffusers.save(model, folder)`; `single_files.load(file)` for Stable
Diffusion in one file, `keras_cv.load(*files)` for KerasCV's; `lora`, `inversions` and `ip_adapters` for additions to
them; `original` for the papers' own."""

from kdiff.interop import autoencoders, diffusers, inversions, ip_adapters, keras_cv, lora, original, single_files

__all__ = [
    "autoencoders",
    "diffusers",
    "inversions",
    "ip_adapters",
    "keras_cv",
    "lora",
    "original",
    "single_files",
]
