"""Foreign checkpoints: `diffusers.load(folder)` and `diffusers.save(model, folder)`; `original` for the papers' own."""

from kdiff.interop import autoencoders, diffusers, original

__all__ = ["autoencoders", "diffusers", "original"]
