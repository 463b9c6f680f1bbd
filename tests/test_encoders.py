"""Encoders of text and images: what holds for each. test_encoders_reference.py compares them with transformers'."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend
from kdiff.encoders import CLIPText, CLIPVision, T5Text
from kdiff.encoders.base import ratio_of
from kdiff.encoders.t5 import RelativePositionBias, buckets_of
from tests.toys import draw_weights, mostly_once, numpy

SMALL = {"width": 12, "depth": 2, "heads": 3, "hidden": 20}
IDS = np.array([[8, 3, 5, 9, 9, 9], [8, 1, 9, 9, 9, 9], [8, 2, 3, 4, 5, 9]], "int32")
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
PIXELS = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype("float32")
CASES = {
    "clip": (CLIPText(10, 6, **SMALL), (IDS,)),
    "clip_projected": (CLIPText(10, 6, **SMALL, projection=7, end=9, skip=1, activation="gelu"), (IDS,)),
    "clip_plain": (CLIPText(10, 6, **SMALL, skip=1, normalized=False), (IDS, MASK)),
    "t5": (T5Text(10, **SMALL, head_width=5, buckets=8, furthest=6), (IDS, MASK)),
    "t5_first": (T5Text(10, **SMALL, head_width=4, activation="relu", glu=False), (IDS,)),
    "vision": (CLIPVision(6, 3, **SMALL, projection=7), (PIXELS,)),
}


def made(name, **changes):
    encoder, inputs = CASES[name]
    encoder = encoder.clone(**changes)
    encoder.build((None, *inputs[0].shape[1:]))
    return draw_weights(encoder), inputs


def outputs(encoder, *inputs):
    """What is given, by name, from the compiled encoder."""

    def call(*inputs):
        return {name: y for name, y in encoder(*inputs)._asdict().items() if y is not None and name != "mask"}

    found = backend.compiled(call, encoder)(*inputs)
    return {name: numpy(ops.cast(y, "float32")) for name, y in found.items()}


@pytest.mark.once
@pytest.mark.parametrize("name", CASES)
def test_compiled_or_not(name):
    encoder, inputs = made(name)
    plain = encoder(*inputs)
    for part, y in outputs(encoder, *inputs).items():
        np.testing.assert_allclose(numpy(ops.stop_gradient(getattr(plain, part))), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", mostly_once(CASES, ("clip_projected", "t5", "vision")))
def test_encoder(name, tmp_path):
    encoder, inputs = made(name)
    expected = outputs(encoder, *inputs)
    symbols = [keras.KerasTensor(x.shape, x.dtype.name) for x in inputs]
    spec = encoder.compute_output_spec(*symbols)
    for part, y in expected.items():
        assert y.shape == getattr(spec, part).shape
        assert np.isfinite(y).all()
    encoder.save(tmp_path / "encoder.keras")
    loaded = outputs(keras.saving.load_model(tmp_path / "encoder.keras"), *inputs)
    lower, _ = made(name, dtype="mixed_bfloat16")
    lower.set_weights(encoder.get_weights())
    assert lower.compute_output_spec(*symbols).tokens.dtype == "bfloat16"
    lower = outputs(lower, *inputs)
    for part, y in expected.items():
        np.testing.assert_allclose(loaded[part], y, rtol=1e-5, atol=1e-5)
        # Each rounding to bfloat16 errs by up to 2^-9; some ten follow one another, and weights of 0.2 enlarge them.
        assert np.sqrt(np.mean((lower[part] - y) ** 2)) < 0.04 * np.sqrt(np.mean(y**2))


def test_a_text_does_not_see_what_follows():
    encoder, _ = made("clip")
    y = outputs(encoder, np.array([[8, 3, 5, 9, 9, 9], [8, 3, 5, 1, 9, 9]], "int32"))["tokens"]
    np.testing.assert_allclose(y[0, :3], y[1, :3], atol=1e-5)
    assert np.abs(y[0, 3:] - y[1, 3:]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("name", ["t5", "clip_plain"])
def test_what_is_masked_changes_nothing(name):
    encoder, _ = made(name)
    changed = np.where(MASK, IDS, 7).astype("int32")
    one, other = (outputs(encoder, ids, MASK)["tokens"] for ids in (IDS, changed))
    np.testing.assert_allclose(one[MASK], other[MASK], atol=1e-5)


def test_the_vector_is_of_the_end():
    """The first `end`, or the largest token; the same with CLIP's vocabulary, where the end is the largest."""
    encoder, _ = made("clip_projected", projection=None, skip=0)
    ids = np.array([[8, 3, 9, 9, 9, 9], [8, 9, 1, 9, 3, 3]], "int32")
    y = outputs(encoder, ids)
    np.testing.assert_allclose(y["vector"], y["tokens"][[0, 1], [2, 1]], atol=1e-6)
    by_end, _ = made("clip_projected", projection=None, skip=0, end=3)
    by_end.set_weights(encoder.get_weights())
    y = outputs(by_end, ids)
    np.testing.assert_allclose(y["vector"], y["tokens"][[0, 1], [1, 4]], atol=1e-6)


def test_t5_hears_distance_by_the_table():
    layer = RelativePositionBias(2, buckets=4, furthest=2)
    layer.build((None, 3, 8))
    layer.table.table.assign(np.arange(8.0).reshape(4, 2))
    y = numpy(ops.stop_gradient(layer(np.zeros((1, 3, 8), "float32"))))
    # Of four buckets, 0 and 1 are for keys at or before the query, 2 and 3 for those after it.
    np.testing.assert_array_equal(y[0, 0] / 2, [[0, 3, 3], [1, 0, 3], [1, 1, 0]])
    np.testing.assert_array_equal(y[0, 1], y[0, 0] + 1)


@pytest.mark.once
def test_buckets_of_t5():
    """32 of them, by the paper's numbers: 8 exact distances either way, one bucket from 128 on."""
    assert buckets_of(np.array([0, -1, -7, -8, -11, -12, -127, -128, -999]), 32, 128).tolist() == [
        *(0, 1, 7, 8, 8, 9),
        *(15, 15, 15),
    ]
    np.testing.assert_array_equal(buckets_of(np.arange(1, 300), 32, 128), 16 + buckets_of(-np.arange(1, 300), 32, 128))


# As transformers' models have them, built on PyTorch's device without memory.
PUBLISHED = {
    "clip_l": (CLIPText(), (None, 77), 123_060_480),
    "openclip_h": (CLIPText(width=1024, depth=23, heads=16, hidden=4096, activation="gelu"), (None, 77), 340_387_840),
    "openclip_bigg": (
        CLIPText(width=1280, depth=32, heads=20, hidden=5120, activation="gelu", projection=1280),
        (None, 77),
        694_659_840,
    ),
    "t5_xxl": (T5Text(), (None, None), 4_762_310_656),
    "t5_small": (T5Text(width=512, depth=8, heads=6, hidden=1024), (None, None), 35_332_800),
    "vision_l": (CLIPVision(projection=768), (None, 224, 224, 3), 303_966_208),
}


@pytest.mark.once
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    encoder, shape, count = PUBLISHED[name]
    with backend.unallocated():
        encoder = encoder.clone()
        encoder.build(shape)
    assert sum(int(np.prod(weight.shape)) for weight in encoder.weights) == count


@pytest.mark.once
def test_hidden_widths_are_exact():
    assert all(int(ratio_of(h, w) * w) == h for w in range(1, 80) for h in range(1, 300))


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPText(skip=13), "`skip` must be at most the number of blocks, 12; received: 13"),
        (lambda: CLIPText(depth=0), "`depth` must be a whole number of at least 1; received: 0"),
        (lambda: CLIPText(10, 6, **SMALL)(IDS[:, :5]), r"tokens must have the shape \(batch, 6\); received"),
        (lambda: T5Text(10, **SMALL)(IDS[0]), r"tokens must have the shape \(batch, length\); received"),
        (lambda: CLIPVision(6, 4), "`patch` must divide the size of the image, 6; received: 4"),
        (lambda: CLIPVision(6, 3, **SMALL)(PIXELS[:, :3]), r"must have the shape \(batch, 6, 6, 3\); received"),
        (lambda: RelativePositionBias(2, 32, 8), "`furthest` must be a whole number of at least 9; received: 8"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
