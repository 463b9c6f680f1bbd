"""Foreign checkpoints: `diffusers.load(folder)` and `diffusers.save(model, folder)`; `original` for the papers' own."""

from kdiff.interop import diffusers, original

__all__ = ["diffusers", "original"]
