"""Pipelines of latents: encoded once, drawn in every epoch, mirrored at random; what a model trains on."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff import codecs, networks
from tests.toys import draw_weights, images, numpy

pytest.importorskip("tensorflow")
pytestmark = [pytest.mark.data, pytest.mark.eager]

X = np.round(127.5 * (images(40, (8, 8, 3)) + 1)).astype("uint8")
EXACT = X / 127.5 - 1


class Counted(codecs.Latent):
    """Counts the images that it is asked to encode."""

    named = False
    count = 0

    def moments(self, examples):
        self.count += len(examples)
        return super().moments(examples)


def codec(kind=Counted):
    network = networks.AutoencoderKL((8, 8), 2, 1, attention=False)
    network.build()
    return kind(draw_weights(network), 0.3)


def epochs(dataset, count, key="encoded"):
    return [np.concatenate([np.asarray(batch[key]) for batch in dataset]) for _ in range(count)]


@pytest.mark.once
def test_each_epoch_draws():
    """From the mean and the deviation of the codec, which is asked once; labels stay with their images."""
    one = codec()
    options = {"labels": np.arange(40), "batch_size": 8, "shuffle": False, "codec": one}
    dataset = kdiff.data.images(X, **options)
    drawn = np.stack(epochs(dataset, 40))
    asked = one.count
    assert asked <= 3 * 32  # the first for the shape, and two batches
    mean, std = (numpy(part) for part in one.moments(EXACT))
    assert drawn.shape[1:] == mean.shape
    assert drawn.dtype == np.float32
    error = (drawn - mean) / std
    assert abs(error.mean()) < 0.01
    assert error.std() == pytest.approx(1, abs=0.01)
    assert np.abs(error[0] - error[1]).mean() > 0.5
    np.testing.assert_array_equal(epochs(dataset, 1, "label")[0], np.arange(40))
    again = np.stack(epochs(kdiff.data.images(X, **options), 2))
    np.testing.assert_array_equal(again, drawn[:2])  # one seed, one run


@pytest.mark.once
def test_flips(tmp_path):
    """Either copy, at random, also from a file."""
    one = codec(codecs.Latent)
    mean, std = (numpy(part) for part in one.moments(EXACT))
    mirrored = numpy(one.moments(EXACT[:, :, ::-1])[0])
    dataset = kdiff.data.images(
        X, batch_size=8, shuffle=False, codec=one, flips=True, cache=tmp_path / "latents", seed=None
    )
    for drawn in epochs(dataset, 2):
        plain = np.abs((drawn - mean) / std).mean((1, 2, 3)) < np.abs((drawn - mirrored) / std).mean((1, 2, 3))
        nearer = np.where(plain[:, None, None, None], mean, mirrored)
        assert 8 < plain.sum() < 32
        assert np.abs((drawn - nearer) / std).mean() < 1  # 0.8 for normal noise


def test_a_codec_that_does_not_draw():
    dataset = kdiff.data.images(X, batch_size=8, shuffle=False, codec=codecs.Haar(1))
    expected = numpy(codecs.Haar(1).encode(EXACT.astype("float32")))
    np.testing.assert_allclose(epochs(dataset, 1)[0], expected, atol=2e-3)  # float16 of numbers up to 2


def test_a_model_trains_on_them():
    one = codec(codecs.Latent)
    dataset = kdiff.data.images(X, batch_size=20, codec=one, flips=True)
    model = kdiff.DiffusionModel(networks.UNet.residual(8, levels=1, depth=1), codec=one)
    model.compile(keras.optimizers.Adam(1e-2))
    assert np.isfinite(model.fit(dataset, epochs=1, verbose=0).history["loss"]).all()
    assert model.sample(2, steps=2).shape == (2, 8, 8, 3)


@pytest.mark.once
def test_what_is_wrong():
    with pytest.raises(TypeError, match="`codec` must be a codec"):
        kdiff.data.images(X, codec="pixels")
    with pytest.raises(ValueError, match="`flips` needs a `codec`"):
        kdiff.data.images(X, flips=True)
    with pytest.raises(ValueError, match="before `augment`"):
        kdiff.data.images(X, codec=codecs.Haar(1), augment=keras.layers.RandomFlip())
    one = codec(codecs.Latent)
    one.scale = 1e9
    with pytest.raises(Exception, match="overflow float16"):
        epochs(kdiff.data.images(X, batch_size=8, codec=one), 1)
