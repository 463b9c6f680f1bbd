"""Foreign checkpoints: `diffusers.load(folder)`, `diffusers.save(model, folder)`; `single_files.load(file)` for Stable
Diffusion in one file, `keras_hub` for its presets, `lora` for its additions; `original` for the papers' own."""

from kdiff.interop import autoencoders, diffusers, keras_hub, lora, original, single_files

__all__ = ["autoencoders", "diffusers", "keras_hub", "lora", "original", "single_files"]
