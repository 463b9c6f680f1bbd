"""Keras layers from which networks are composed, each usable alone in any Keras model."""

from kdiff import deprecated as _deprecated
from kdiff.blocks.attention import CrossAttention, MultiHeadAttention, SelfAttention
from kdiff.blocks.base import Block, Chain, Tokens
from kdiff.blocks.beside_context import DecoupledAttention, PerceiverResampler
from kdiff.blocks.concat import Concat
from kdiff.blocks.conditions import Condition, Encoded, Input, Joint, OptionalCondition, VectorAndTokens
from kdiff.blocks.context_attention import AttentionPool, ContextAttention
from kdiff.blocks.convolution import ConvBlock, ConvNeXtBlock, ResidualBlock, SimpleBlock
from kdiff.blocks.embedded import ImageEmbedding, MaskedTokens, NoisedEmbedding
from kdiff.blocks.embeddings import (
    FourierEmbedding,
    GuidanceEmbedding,
    MLPEmbedding,
    SinusoidalEmbedding,
    SizeEmbedding,
)
from kdiff.blocks.interval import Interval
from kdiff.blocks.joint import JointBlock
from kdiff.blocks.layers import Conv2D, Dense, DepthwiseConv2D
from kdiff.blocks.lookup import LabelEmbedding, LearnedEmbedding
from kdiff.blocks.magnitude import (
    MagnitudePreservingBlock,
    MPConv,
    MPDense,
    MPFourierEmbedding,
    UnitMagnitude,
    mp_concatenate,
    mp_silu,
    mp_sum,
)
from kdiff.blocks.normalization import AdaptiveNorm, GroupNorm, LayerNorm, RMSNorm, SpatialNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.patterns import Causal, Global, Linear, Neighborhood, Pattern, Window
from kdiff.blocks.positions import PositionTable, RelativePositions, Rotary, SinCos2D
from kdiff.blocks.resampling import Downsample, FIRDownsample, FIRUpsample, Upsample
from kdiff.blocks.text import EncodedText, TextEncoder
from kdiff.blocks.transformer import FeedForward, SpatialTransformer, TransformerBlock, adaptive_block

__all__ = [
    "AdaptiveNorm",
    "AttentionPool",
    "Block",
    "Causal",
    "Chain",
    "Concat",
    "Condition",
    "ContextAttention",
    "Conv2D",
    "ConvBlock",
    "ConvNeXtBlock",
    "CrossAttention",
    "DecoupledAttention",
    "Dense",
    "DepthwiseConv2D",
    "Downsample",
    "Encoded",
    "EncodedText",
    "FIRDownsample",
    "FIRUpsample",
    "FeedForward",
    "FourierEmbedding",
    "Global",
    "GroupNorm",
    "GuidanceEmbedding",
    "ImageEmbedding",
    "Input",
    "Interval",
    "Joint",
    "JointBlock",
    "LabelEmbedding",
    "LayerNorm",
    "LearnedEmbedding",
    "Linear",
    "MLPEmbedding",
    "MPConv",
    "MPDense",
    "MPFourierEmbedding",
    "MagnitudePreservingBlock",
    "MaskedTokens",
    "MultiHeadAttention",
    "Neighborhood",
    "NoisedEmbedding",
    "OptionalCondition",
    "Patchify",
    "Pattern",
    "PerceiverResampler",
    "PositionTable",
    "RMSNorm",
    "RelativePositions",
    "ResidualBlock",
    "Rotary",
    "SelfAttention",
    "SimpleBlock",
    "SinCos2D",
    "SinusoidalEmbedding",
    "SizeEmbedding",
    "SpatialNorm",
    "SpatialTransformer",
    "TextEncoder",
    "Tokens",
    "TransformerBlock",
    "UnitMagnitude",
    "Unpatchify",
    "Upsample",
    "VectorAndTokens",
    "Window",
    "adaptive_block",
    "mp_concatenate",
    "mp_silu",
    "mp_sum",
]

__getattr__ = _deprecated.names(
    __name__,
    Beside="Concat",
    Resampler="PerceiverResampler",
    SizeWaves="SizeEmbedding",
    SteeredEmbedding="GuidanceEmbedding",
)
