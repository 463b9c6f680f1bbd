"""Keras layers from which networks are composed, each usable alone in any Keras model."""

from kdiff.blocks.attention import CrossAttention, MultiHeadAttention, SelfAttention
from kdiff.blocks.base import Block, Chain
from kdiff.blocks.convolution import ConvBlock, ResidualBlock
from kdiff.blocks.embeddings import (
    FourierEmbedding,
    LabelEmbedding,
    LearnedEmbedding,
    MLPEmbedding,
    SinusoidalEmbedding,
)
from kdiff.blocks.normalization import AdaptiveNorm, GroupNorm, LayerNorm, RMSNorm
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.blocks.transformer import FeedForward, TransformerBlock

__all__ = [
    "AdaptiveNorm",
    "Block",
    "Chain",
    "ConvBlock",
    "CrossAttention",
    "Downsample",
    "FeedForward",
    "FourierEmbedding",
    "GroupNorm",
    "LabelEmbedding",
    "LayerNorm",
    "LearnedEmbedding",
    "MLPEmbedding",
    "MultiHeadAttention",
    "RMSNorm",
    "ResidualBlock",
    "SelfAttention",
    "SinusoidalEmbedding",
    "TransformerBlock",
    "Upsample",
]
