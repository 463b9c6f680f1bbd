"""Keras models composed of blocks: `network({"image": ..., "time": ..., **conditions})` gives an image."""

from kdiff.networks.base import Network
from kdiff.networks.unet import Level, UNet

__all__ = ["Level", "Network", "UNet"]
