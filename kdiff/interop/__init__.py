"""Foreign checkpoints: `diffusers.load(folder)`, `diffusers.save(model, folder)`; `single_files.load(file)` for Stable
Diffusion in one file; `original` for the papers' own."""

from kdiff.interop import autoencoders, diffusers, original, single_files

__all__ = ["autoencoders", "diffusers", "original", "single_files"]
