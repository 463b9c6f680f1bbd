"""Pretrained encoders of text and images: CLIP, T5 and that of latent diffusion, composed of kdiff's blocks.

`kdiff.interop.encoders` reads them from folders of transformers, `kdiff.interop.tokenizers` their tokenizers.
"""

from kdiff.encoders.clip import CLIPText, CLIPVision
from kdiff.encoders.image_prompt import ImagePrompt
from kdiff.encoders.joint_prompt import JointPrompt
from kdiff.encoders.ldm import LDMText
from kdiff.encoders.pair import Pair
from kdiff.encoders.picture_prompt import PicturePrompt
from kdiff.encoders.prompt import Prompt, PromptVector
from kdiff.encoders.t5 import T5Text
from kdiff.encoders.tokenizers import JSONTokenizer, SentencePiece

__all__ = [
    "CLIPText",
    "CLIPVision",
    "ImagePrompt",
    "JSONTokenizer",
    "JointPrompt",
    "LDMText",
    "Pair",
    "PicturePrompt",
    "Prompt",
    "PromptVector",
    "SentencePiece",
    "T5Text",
]
