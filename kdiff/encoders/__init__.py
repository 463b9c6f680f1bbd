"""Encoders that have learned already, of text and of images: the transformers of CLIP and T5, of kdiff's own blocks.

`kdiff.interop.encoders` reads them from folders of transformers, `kdiff.interop.tokenizers` their tokenizers.
"""

from kdiff.encoders.clip import CLIPText, CLIPVision
from kdiff.encoders.image_prompt import ImagePrompt
from kdiff.encoders.prompt import Prompt, PromptVector
from kdiff.encoders.t5 import T5Text
from kdiff.encoders.tokenizers import JSONTokenizer, SentencePiece

__all__ = [
    "CLIPText",
    "CLIPVision",
    "ImagePrompt",
    "JSONTokenizer",
    "Prompt",
    "PromptVector",
    "SentencePiece",
    "T5Text",
]
