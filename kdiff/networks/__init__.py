"""Keras models composed of blocks: `network({"image": ..., "time": ..., **conditions})` returns an image."""

from kdiff import deprecated as _deprecated
from kdiff.blocks.transformer import adaptive_block
from kdiff.networks import published
from kdiff.networks.autoencoder import VQ, Autoencoder, AutoencoderKL
from kdiff.networks.autoencoder_tiny import AutoencoderTiny
from kdiff.networks.base import Network
from kdiff.networks.control import Controlled, ControlNet, Hint
from kdiff.networks.counting import flops, parameters, summary
from kdiff.networks.dit import DiT
from kdiff.networks.hybrid import Hybrid
from kdiff.networks.layouts import layout_map
from kdiff.networks.levels import Level
from kdiff.networks.mlp import MLP
from kdiff.networks.mmdit import MMDiT
from kdiff.networks.ncsnpp import InputResidual, InputSkip, NCSNpp, OutputSkip
from kdiff.networks.prior_transformer import PriorTransformer
from kdiff.networks.simple_unet import SimpleUNet
from kdiff.networks.unet import UNet
from kdiff.networks.uvit import UViT

__all__ = [
    "MLP",
    "VQ",
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNet",
    "Controlled",
    "DiT",
    "Hint",
    "Hybrid",
    "InputResidual",
    "InputSkip",
    "Level",
    "MMDiT",
    "NCSNpp",
    "Network",
    "OutputSkip",
    "PriorTransformer",
    "SimpleUNet",
    "UNet",
    "UViT",
    "adaptive_block",
    "flops",
    "layout_map",
    "parameters",
    "published",
    "summary",
]


__getattr__ = _deprecated.names(__name__, Tiny="AutoencoderTiny")
