"""Foreign checkpoints: `diffusers.load(folder)`, `diffusers.save(model, folder)`; `original` and `lora` for files."""

from kdiff.interop import autoencoders, diffusers, lora, original

__all__ = ["autoencoders", "diffusers", "lora", "original"]
