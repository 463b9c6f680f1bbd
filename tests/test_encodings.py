"""Conditions are encoded once per sampling run, unless their layers depend on the time or on x_t."""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import backend, guidance, networks
from kdiff.blocks import Concat, Joint, LabelEmbedding, OptionalCondition
from kdiff.schedules import Cosine
from tests.toys import draw_weights, mostly_once

ROWS = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
STEPS = 20  # of the run in which encodings are counted


class Counted(keras.layers.Layer):
    """A dense layer that counts its runs, also in compiled code; times `embed`, or plus the mean of `image`."""

    def __init__(self, uses=(), width=32, **kwargs):
        super().__init__(**kwargs)
        self.uses, self.dense, self.runs, self.width = uses, keras.layers.Dense(width), [], width

    def build(self, x_shape, embed_shape=None):
        self.dense.build(x_shape)

    def call(self, x, embed=None, image=None):
        def counted(array):
            self.runs.append(len(array))
            return array

        y = self.dense(backend.by_numpy(counted, x, x.shape[1:]) if backend.has_numbers(x) else x)
        if "embed" in self.uses:
            y = y * embed
        return y + ops.mean(image, axis=(1, 2)) if "image" in self.uses else y

    def compute_output_shape(self, x_shape, embed_shape=None, image_shape=None):
        return (*x_shape[:-1], self.width)


def made(layers, shapes):
    """A model with these conditions, its weights drawn."""
    network = networks.DiT(32, 1, 2, conditions=layers)
    model = kdiff.DiffusionModel(network, ema=None)
    model.build({"image": (None, 4, 4, 1), **{name: (None, *shape) for name, shape in shapes.items()}})
    draw_weights(network)
    return model


def both(model, monkeypatch, steps=4, **options):
    """The samples, and those of a run in which everything is encoded in every step."""
    samples = model.sample(3, steps=steps, **options)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_encoding", lambda *arguments: None)
        plain = model.sample(3, steps=steps, **options)
    return samples, plain


def text():
    """A condition with a null, of which tokens are what is encoded."""
    return OptionalCondition(Counted(), absent=np.ones(4, "float32"), dropout=0.1)


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"guidance": 2.0}, [1, 3]),
        ({"guidance": guidance.ClassifierFree(2.0, lowest=0.5, highest=2.0)}, [1, 3]),
        pytest.param({}, [3], marks=pytest.mark.once),
        pytest.param({"guidance": guidance.ClassifierFree(2.0, {"text": -ROWS[0]})}, [1, 3, 3], marks=pytest.mark.once),
    ],
    ids=["guided", "interval", "plain", "negative"],
)
def test_a_condition_is_encoded_once(options, runs, monkeypatch):
    """By rows: those given, the null condition as one row, and negative ones."""
    layer = text()
    model = made({"text": layer}, {"text": (4,)})
    samples, plain = both(model, monkeypatch, STEPS, text=ROWS, **options)
    counts = layer.layer.runs
    assert sorted(counts[: len(runs)]) == runs
    assert len(counts) == len(runs) + STEPS
    np.testing.assert_allclose(samples, plain, atol=1e-5)
    other = model.sample(3, steps=STEPS, text=2 * ROWS, **options)  # a run does not remember the one before
    assert np.abs(other - samples).max() > 1e-3
    assert len(counts) == 2 * len(runs) + STEPS


@pytest.mark.parametrize(
    ("uses", "scale"), [("embed", 2.0), ("image", 1.0), pytest.param("embed", 1.0, marks=pytest.mark.once)]
)
def test_what_depends_on_time_or_image_is_encoded_in_every_step(uses, scale, monkeypatch):
    counted = Counted((uses,))
    layer = counted if uses == "image" else OptionalCondition(counted, absent=np.ones(4, "float32"), dropout=0.1)
    model = made({"text": layer}, {"text": (4,)})
    runs = counted.runs if uses == "image" else layer.layer.runs
    runs.clear()
    samples, plain = both(model, monkeypatch, steps=4, text=ROWS, guidance=scale)
    tries = 1 + (scale != 1.0)  # before the first step, until the time is asked for, and then with a time
    assert 4 <= len(runs) - 4 <= 4 + 2 * tries
    np.testing.assert_allclose(samples, plain, atol=1e-5)


def test_an_error_of_a_layer_is_not_taken_for_its_need_of_the_time():
    class Several(Counted):
        def call(self, x, embed=None, image=None):
            if x.shape[0] == 1:
                raise ValueError("more than one row, please")
            return super().call(x)

    model = made({"text": OptionalCondition(Several(), absent=np.ones(4, "float32"), dropout=0.1)}, {"text": (4,)})
    with pytest.raises(ValueError, match="more than one row, please"):
        model.sample(3, steps=2, text=ROWS, guidance=2.0)
    assert model.sample(3, steps=2, text=ROWS).shape == (3, 4, 4, 1)


@pytest.mark.parametrize("guided", mostly_once([True, False]))
def test_noised_maps_and_labels(guided, monkeypatch):
    """The noise of a map belongs to the row of a batch, so a map is not encoded apart from the batch."""
    layers = {"low": Concat(noise=Cosine(), dropout=0.1), "plain": Concat(), "label": LabelEmbedding(3, dropout=0.1)}
    model = made(layers, {"low": (2, 2, 1), "plain": (4, 4, 1), "label": ()})
    given = {"low": np.random.default_rng(1).uniform(-1, 1, (3, 2, 2, 1)).astype("float32"), "label": [0, 1, 2]}
    given["plain"] = np.tile(given["low"], (1, 2, 2, 1))
    options = {"guidance": guidance.ClassifierFree([1.0, 2.0, 3.0])} if guided else {}
    samples, plain = both(model, monkeypatch, **given, **options)
    np.testing.assert_allclose(samples, plain, atol=1e-5)


def test_guidance_that_changes_conditions(monkeypatch):
    """A rule that mixes conditions differently in each step is not given those of the first."""

    class Mixed(guidance.Guidance):
        def guide(self, denoise, x, m, here):
            rows = m.t * denoise.conditions["text"]
            mixed = denoise.given._replace(conditions={"text": rows})
            other = kdiff.denoisers.Denoiser(denoise.answer, mixed, denoise.nulls)(x, m)
            return other.guided(0.5 * (denoise(x, m).x_hat + other.x_hat))

    layer = text()
    model = made({"text": layer}, {"text": (4,)})
    samples, plain = both(model, monkeypatch, text=ROWS, guidance=Mixed())
    assert len(layer.layer.runs) == (1 + 1 + 4) + 2 * 4
    np.testing.assert_allclose(samples, plain, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("drop", [("a",), ("b",), None])
def test_some_inputs_of_a_layer_are_dropped(drop, monkeypatch):
    """What was encoded for all of them dropped is not taken for some of them dropped."""
    parts = {name: OptionalCondition(absent=np.full(4, value, "float32")) for name, value in (("a", 1), ("b", -1))}
    counted = Counted()
    model = made({"joint": Joint(parts, counted)}, {"a": (4,), "b": (4,)})
    counted.runs.clear()
    rule = guidance.ClassifierFree(2.0, drop=drop)
    samples, plain = both(model, monkeypatch, a=ROWS, b=-ROWS, guidance=rule)
    assert counted.runs == [3, 1, *[6] * (4 if drop else 0), *[6] * 4]
    np.testing.assert_allclose(samples, plain, atol=1e-5)
