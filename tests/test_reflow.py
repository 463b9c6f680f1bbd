"""Reflow: pairs of noise and data, made, stored and learned."""

import keras
import numpy as np
import pytest

import kdiff
from kdiff import reflow
from tests.helpers_taught import LABELS, MEAN, RECTIFIED, C, X, exact_model


def test_reflow_pairs_are_where_the_flow_leads(tmp_path):
    model = exact_model(RECTIFIED, "flow")
    made = reflow.pairs(model, 50, sampler="heun", steps=40, seed=3, batch_size=20)
    s = float(RECTIFIED.sampled_at(np.float32(1.0)).sigma / RECTIFIED.sampled_at(np.float32(1.0)).alpha)
    z = made["noise"] * s
    np.testing.assert_allclose(made["encoded"], MEAN + (z - MEAN) * C / np.sqrt(C**2 + s**2), atol=5e-3)
    assert made["noise"].std() == pytest.approx(1.0, abs=0.15)
    for sampler in ("ddpm", kdiff.Sampler("ddim", kdiff.times.Jumps("trailing", 2, 2), 4)):
        with pytest.raises(ValueError, match="pairs: the sampler must be deterministic"):
            reflow.pairs(model, 4, sampler=sampler)
    with pytest.raises(ValueError, match="pairs: the sampler must end with data"):
        reflow.pairs(model, 4, sampler=kdiff.Sampler("ddim", steps=4, to_zero=False))


def test_reflow_learns_with_the_noise_that_is_given():
    """On pairs of the line x = noise, with any t, the velocity is 0: a network that answers 0 has no loss."""
    model = exact_model(RECTIFIED, "flow", "reflow")
    model.network.gain.assign([-1.0, -1.0])
    model.compile(keras.optimizers.SGD(0.0))
    assert model.evaluate({"encoded": X, "noise": X}, verbose=0) < 1e-10
    assert model.evaluate(X, verbose=0) > 0.5
    with pytest.raises(ValueError, match="'noise' must have the shape of encoded data"):
        model.evaluate({"encoded": X, "noise": X[:, :1]}, verbose=0)
    other = exact_model(RECTIFIED, "flow")
    other.compile("sgd")
    with pytest.raises(ValueError, match="takes no \\['noise'\\]"):
        other.fit({"encoded": X, "noise": X})


@pytest.mark.data
def test_pairs_are_written_and_read(tmp_path):
    made = {"encoded": X, "noise": X + 1, "label": LABELS}
    kdiff.data.save_pairs(made, tmp_path / "pairs")
    read = list(kdiff.data.load_pairs(tmp_path / "pairs", 16, shuffle=None))
    for name, value in made.items():
        np.testing.assert_array_equal(np.concatenate([np.asarray(batch[name]) for batch in read]), value)
    shuffled = np.concatenate([np.asarray(batch["label"]) for batch in kdiff.data.load_pairs(tmp_path / "pairs", 16)])
    assert sorted(shuffled) == sorted(LABELS)
    assert (shuffled != LABELS).any()
    with pytest.raises(ValueError, match="`batch_size` is 100, but there are only 64"):
        kdiff.data.load_pairs(tmp_path / "pairs", 100)
    with pytest.raises(ValueError, match="the same number of rows"):
        kdiff.data.save_pairs({"encoded": X, "noise": X[:3]}, tmp_path / "other")
