import keras
import numpy as np
import pytest
from keras import layers

from kdiff import evaluation
from kdiff.encoders import CLIPVision
from kdiff.evaluation import Extractor, FrechetDistance, Images
from tests.toys import draw_weights, numpy


def pictures(count=5, size=(9, 11), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), "uint8")


def classifier():
    inputs = layers.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D(name="pooled")(layers.Conv2D(4, 3, activation="relu", name="maps")(inputs))
    return draw_weights(keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(x)), name="classifier"))


def test_features_are_those_of_the_network_in_batches_of_one_size():
    network, sizes = classifier(), set()

    def prepare(batch):
        sizes.add(len(batch))
        return Images(8)(batch)

    found = Extractor(network, prepare, batch_size=3)(pictures(7))
    assert sizes == {3}
    assert found.dtype == "float32"
    expected = numpy(network(Images(8)(pictures(7)), training=False))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_features_of_half_precision_are_float32():
    network = classifier()
    half = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu", dtype="mixed_bfloat16")])
    half.add(layers.GlobalAveragePooling2D(dtype="bfloat16"))
    half.layers[0].set_weights(network.get_layer("maps").get_weights())
    found = Extractor(half, Images(8))(pictures())
    assert found.dtype == "float32"
    expected = Extractor(network, Images(8), layer="pooled")(pictures())
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_a_layer_of_a_classifier_is_taken():
    network = classifier()
    found = Extractor(network, Images(8), layer="pooled")
    assert found(pictures()).shape == (5, 4)
    weights = network.get_layer("maps").get_weights()
    before = found(pictures())
    network.get_layer("maps").set_weights([2 * weight for weight in weights])
    assert np.abs(found(pictures()) - before).max() > 1e-3  # the weights of now
    with pytest.raises(ValueError, match=r"\(batch, features\).*received: \(5, 6, 6, 4\)"):
        Extractor(network, Images(8), layer="maps")(pictures())


@pytest.mark.once
def test_any_function_will_do_and_the_report_names_it():
    def mean(batch):
        return batch.mean((1, 2))

    found = Extractor(mean, Images(None, 0.5, 0.5))
    np.testing.assert_allclose(found(pictures()), pictures().mean((1, 2)) / 127.5 - 1, atol=1e-5)
    metric = FrechetDistance(found, pictures(20))
    metric.update_state(pictures(10, seed=1))
    assert str(metric.report()).endswith("features: mean of Images()")


@pytest.mark.parametrize("size", [(9, 11), (5, 4), (20, 6)])
def test_resizing_is_pillows_of_floating_point_numbers(size):
    """As clean-fid has it: each channel as an image of 32-bit floats, bicubic, clipped."""
    image = pytest.importorskip("PIL.Image", reason="the extra `plot` is not installed")
    x = pictures()
    found = 255 * Images(size, 0.0, 1.0)(x)
    for one, made in zip(x, found, strict=True):
        for channel in range(3):
            whole = image.fromarray(one[..., channel].astype("float32"), "F")
            expected = np.asarray(whole.resize(size[::-1], image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(made[..., channel], expected, atol=2e-3)


@pytest.mark.once
def test_samples_are_read_as_their_files_would_be():
    levels = np.array([-1.2, -1.0, 0.1, 0.999, 1.0], "float32").reshape(1, 1, 5, 1)
    whole = np.array([0, 0, 140, 255, 255]) / 255
    np.testing.assert_allclose(Images(None, 0.0, 1.0)(levels)[0, 0, :, 2], whole, atol=1e-6)
    kept = Images(None, 0.0, 1.0, rounded=False, channels=1)(levels)[0, 0, :, 0]
    np.testing.assert_allclose(kept, [0, 0, 0.55, 0.9995, 1], atol=1e-6)
    normalised = Images(None, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))(np.full((1, 1, 1, 3), 255, "uint8"))
    np.testing.assert_allclose(normalised[0, 0, 0], [0.9, 0.4, 0.175], atol=1e-6)
    assert Images(7, interpolation="area").clone(mean=0.0) == Images(7, 0.0, interpolation="area")


def test_a_bare_model_is_made_an_extractor_that_wants_one_range():
    network, samples = classifier(), pictures(6, (8, 8)) / np.float32(127.5) - 1
    metric = FrechetDistance(network, samples)
    metric.update_state(samples)
    assert metric.result() == pytest.approx(0, abs=1e-6)
    assert metric.report().features == "classifier"
    np.testing.assert_allclose(metric.reference.features, numpy(network(samples, training=False)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="some examples are uint8"):
        metric.update_state(pictures(6, (8, 8)))


def test_batches_of_any_kind_are_a_reference():
    x = pictures(8, (8, 8))
    network = Extractor(classifier(), Images(8), batch_size=4)
    whole = FrechetDistance(network, x).reference.features
    for batches in ([x[:4], x[4:]], [(x[:4], 1), (x[4:], 2)], [{"image": x[:4]}, {"image": x[4:]}]):
        np.testing.assert_allclose(FrechetDistance(network, iter(batches)).reference.features, whole, rtol=1e-6)


def test_clip_gives_its_vector():
    encoder = CLIPVision(8, 4, 3, 16, 2, 2, 32, projection=6)
    encoder.build((None, 8, 8, 3))
    draw_weights(encoder)
    found = evaluation.clip_vision(encoder)(pictures())
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    expected = encoder(Images(8, mean, std)(pictures())).vector
    np.testing.assert_allclose(found, numpy(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.reference
@pytest.mark.data  # KerasHub imports TensorFlow
def test_dinov2_of_a_folder_is_that_of_transformers(tmp_path):
    pytest.importorskip("keras_hub", reason="the extra `hub` is not installed")
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, num_channels=3
    )
    torch.manual_seed(0)
    model = Dinov2Model(config).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    x = pictures(3, (28, 28))
    found = evaluation.dinov2(tmp_path, size=28)(x)
    prepared = torch.tensor(Images(28, *evaluation.extractors.IMAGENET)(x).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = model(prepared).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no such folder"):
        evaluation.dinov2(tmp_path / "other")


BAD = [
    (lambda: Extractor("inception"), TypeError, "`network` must be a function"),
    (lambda: Extractor(abs, 3), TypeError, "`prepare` must be a function"),
    (lambda: Extractor(abs, batch_size=0), ValueError, "`batch_size`"),
    (lambda: Extractor(abs, layer="x"), ValueError, "`layer` needs a functional"),
    (lambda: Extractor(abs)(np.zeros((0, 3))), ValueError, "at least one example"),
    (lambda: Images(interpolation="lanczos"), ValueError, "`interpolation` must be one of"),
    (lambda: Images(channels=2), ValueError, "`channels` must be one of"),
    (lambda: Images((3, 0)), ValueError, "`size`"),
    (lambda: Images()(np.zeros((3, 3, 3))), ValueError, r"received: \(3, 3, 3\)"),
    (lambda: Images()(np.full((1, 3, 3, 3), np.inf)), ValueError, "must be finite"),
    (lambda: Images()(np.arange(255.0).reshape(1, 17, 5, 3)), ValueError, r"in \[-1, 1\]; received 0 to 254"),
    (lambda: Images()(np.full((1, 3, 3, 3), 300)), ValueError, r"in 0\.\.255; received 300"),
    (lambda: Images()(np.ones((1, 3, 3, 3), bool)), ValueError, "received bool"),
    (lambda: Images()(np.zeros((1, 3, 3, 2))), ValueError, "must have 3 channels; received: 2"),
]


@pytest.mark.once
@pytest.mark.parametrize(("mistake", "error", "message"), BAD)
def test_mistakes_are_named(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()
