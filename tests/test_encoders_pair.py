"""CLIP's two encoders, that have learned already, as what embeds pictures and texts."""

import keras
import numpy as np
import pytest

from kdiff.encoders import CLIPText, Pair, PicturePrompt, Prompt
from kdiff.text import Bytes
from tests.test_encoders_picture_prompt import PICTURES, encoder
from tests.toys import draw_weights, numpy


def text(width=6):
    made = CLIPText(257, 5, 8, 1, 2, 16, projection=width)
    made.build((None, 5))
    return Prompt(draw_weights(made), Bytes(5), masked=True)


def test_vectors(tmp_path):
    """Those of the encoders, and again from a file."""
    pair = Pair(PicturePrompt(encoder()), text())
    words = ["ab", "c"]
    tokens, mask = pair.text.tokenizers[0].masked(words)
    wanted = numpy(pair.text.encoders[0](tokens, mask).vector)
    np.testing.assert_allclose(pair.embed_text(words), wanted, atol=1e-6)
    np.testing.assert_allclose(pair.embed_text("c"), wanted[1:], atol=1e-6)
    np.testing.assert_allclose(pair.embed_image(PICTURES), pair.picture.rows(PICTURES), atol=1e-6)
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Identity()(inputs))
    model.pair = pair
    model.save_weights(tmp_path / "a.weights.h5")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(pair))
    other = keras.Model(inputs, keras.layers.Identity()(inputs))
    other.pair = again
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_allclose(again.embed_text(words), wanted, atol=1e-6)
    np.testing.assert_allclose(again.embed_image(PICTURES), pair.embed_image(PICTURES), atol=1e-6)


@pytest.mark.once
def test_what_it_refuses():
    for parts in ((), (PicturePrompt(encoder()), text(5))):
        with pytest.raises(ValueError, match="both encoders must return vectors of one width"):
            Pair(*parts)
    with pytest.raises(ValueError, match="there is no text encoder"):
        Pair(PicturePrompt(encoder())).embed_text("a")
    with pytest.raises(ValueError, match="there is no image encoder"):
        Pair(text=text()).embed_image(PICTURES)
