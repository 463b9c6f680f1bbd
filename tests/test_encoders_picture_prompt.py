"""A picture as a condition; what is made of it is compared with diffusers in test_interop_diffusers_reference."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff import schedules
from kdiff.blocks import ImageEmbedding, NoisedEmbedding
from kdiff.encoders import CLIPText, CLIPVision, PicturePrompt
from kdiff.encoders.pixels import MEAN, STD
from tests.toys import draw_weights, images, numpy

pytestmark = pytest.mark.eager


def encoder():
    made = CLIPVision(8, 4, width=8, depth=1, heads=2, hidden=16, projection=6)
    made.build((None, 8, 8, 3))
    return draw_weights(made, scale=0.5)


PICTURES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype("uint8")


def test_rows_are_the_encoders_vectors():
    """Of bytes and of numbers in [-1, 1]; of a picture of the encoder's size nothing is resized."""
    prompt = PicturePrompt(encoder())
    small = PICTURES[:, :8, :8]
    wanted = prompt.encoder((small / 255.0 - np.array(MEAN)) / np.array(STD)).vector
    np.testing.assert_allclose(prompt.rows(small), numpy(wanted), atol=1e-5)
    np.testing.assert_allclose(prompt.rows(small / 127.5 - 1.0), numpy(wanted), atol=1e-5)
    np.testing.assert_allclose(prompt.rows(small[0]), numpy(wanted)[0], atol=1e-5)
    rows = prompt.rows(small)
    assert prompt.rows(rows) is rows
    for bad in (small.astype("float32"), np.full_like(small, np.nan, "float32"), small.astype("int32") - 1):
        with pytest.raises(ValueError, match="`picture` "):
            prompt.rows(bad)


@pytest.mark.once
def test_other_sizes_are_cut_to_the_middle():
    """The shorter side counts: what lies beyond the square does not."""
    prompt = PicturePrompt(encoder())
    wide = np.concatenate([PICTURES[:, :, :8], PICTURES, PICTURES[:, :, :8]], axis=2)
    changed = wide.copy()
    changed[:, :, :4] = 0  # and the filter does not reach so far
    np.testing.assert_allclose(prompt.rows(changed), prompt.rows(wide), atol=1e-5)
    assert prompt.rows(PICTURES).shape == (3, 6)


@pytest.mark.once
@pytest.mark.parametrize("layer", [NoisedEmbedding(schedules.Cosine()), ImageEmbedding(8, 2)])
def test_the_vector_through_a_layer(layer, tmp_path):
    """In place of one token: with all the inputs that the layer has beside it, and back from a file."""
    prompt = PicturePrompt(encoder(), layer=layer)
    network = kdiff.networks.UNet.transformer(
        8, levels=1, depth=1, conditions={"a": prompt, "context": keras.layers.Identity()}
    )
    beside = {"picture_level", "picture_noise"} if isinstance(layer, NoisedEmbedding) else set()
    assert set(network.condition_inputs) == {"picture", "context", *beside}
    model = kdiff.DiffusionModel(network, ema=None)
    model.build({"image": (None, 4, 4, 3), "picture": (None, 6), "context": (None, 2, 8)})
    draw_weights(network)
    options = {"steps": 2, "context": np.ones((2, 8), "float32")}
    samples = model.sample(2, picture=PICTURES[0], **options)
    changes = [{"picture": PICTURES[1]}, {"picture": None}, *({one: 0.5} for one in beside - {"picture_noise"})]
    for change in changes:
        assert np.abs(model.sample(2, **{"picture": PICTURES[0], **options, **change}) - samples).max() > 1e-4
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_allclose(again.sample(2, picture=PICTURES[0], **options), samples, atol=1e-5)


@pytest.mark.once
def test_it_trains_and_is_saved_with_the_model(tmp_path):
    """The encoder is not trained, nothing is a picture of zeros, and a loaded model makes the same images."""
    prompt = PicturePrompt(encoder(), dropout=0.5)
    network = kdiff.networks.UNet.transformer(8, levels=1, depth=1, conditions={"context": prompt})
    model = kdiff.DiffusionModel(network, ema=None)
    model.build({"image": (None, 4, 4, 3), "picture": (None, 6)})
    draw_weights(network)
    model.compile(keras.optimizers.Adam(1e-2))
    before = numpy(prompt.encoder.weights[0]).copy()
    model.fit({"image": images(4, (4, 4, 3)), "picture": PICTURES[[0, 1, 2, 0]]}, epochs=1, verbose=0)
    np.testing.assert_array_equal(numpy(prompt.encoder.weights[0]), before)
    options = {"steps": 2, "guidance": 3.0}
    samples = model.sample(2, picture=PICTURES[0], **options)
    assert np.abs(samples - model.sample(2, picture=PICTURES[1], **options)).max() > 1e-5
    assert np.isfinite(model.sample(2, picture=None, steps=1)).all()
    model.save(tmp_path / "a.keras")
    again = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_allclose(again.sample(2, picture=PICTURES[0], **options), samples, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PicturePrompt(CLIPText(10, 4, 8, 1, 2, 16)), TypeError, "must be a CLIPVision"),
        (lambda: PicturePrompt(CLIPVision(8, 4, width=8, depth=1, heads=2, hidden=16)), ValueError, "a `projection`"),
        (lambda: PicturePrompt(encoder(), mean=(0.5,)), ValueError, "must be 3 numbers"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
