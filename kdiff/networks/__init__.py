"""Keras models composed of blocks: `network({"image": ..., "time": ..., **conditions})` gives an image."""

from kdiff.networks.unet import Level, UNet

__all__ = ["Level", "UNet"]
