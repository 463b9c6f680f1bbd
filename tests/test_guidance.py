"""Guidance: denoisers made from denoisers."""

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, guidance, schedules
from tests.toys import SCHEDULES, numpy


def wide(x, m):
    return 3.0 * x


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_clip_bounds_every_estimate(solver):
    run = list(Sampler(solver, steps=4, guidance="clip").steps_of(wide, schedules.Cosine(), (4, 4)))
    assert all(np.abs(numpy(step.x_hat)).max() <= 1 for step in run)
    free = list(Sampler(solver, steps=4).steps_of(wide, schedules.Cosine(), (4, 4)))
    assert np.abs(numpy(free[0].x_hat)).max() > 1


def test_dynamic_threshold_is_its_formula():
    x_hat = np.random.default_rng(0).normal(0, 2, (3, 50)).astype("float32")
    x_hat[2] /= 100  # an example within [-1, 1] stays as it is
    for quantile, highest in ((0.9, float("inf")), (0.5, 1.5)):
        guided = guidance.DynamicThreshold(quantile, highest)(lambda x, m: x)
        s = np.clip(np.quantile(np.abs(x_hat), quantile, axis=-1), 1.0, highest)[:, None]
        received = numpy(guided(ops.convert_to_tensor(x_hat), None))
        np.testing.assert_allclose(received, np.clip(x_hat, -s, s) / s, atol=1e-5)


def test_a_learned_variance_passes_through():
    guided = guidance.Clip(0.5)(lambda x, m: (x, "variance"))
    x_hat, share = guided(ops.ones((2, 2)), None)
    np.testing.assert_array_equal(numpy(x_hat), 0.5)
    assert share == "variance"


def test_guidance_is_applied_in_order():
    both = Sampler(guidance=[guidance.Clip(2.0), "dynamic_threshold"])
    assert both == Sampler(guidance=(guidance.Clip(2.0), guidance.DynamicThreshold()))
    assert repr(Sampler(guidance="clip")).endswith("guidance=(Clip(),))")
    (step,) = Sampler(steps=1, guidance=[guidance.Clip(2.0), guidance.DynamicThreshold(1.0)]).steps_of(
        wide, SCHEDULES[0], (4, 4)
    )
    assert np.abs(numpy(step.x_hat)).max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: guidance.Clip(-1.0), "limit"),
        (lambda: guidance.DynamicThreshold(1.5), "quantile"),
        (lambda: guidance.DynamicThreshold(highest=0.5), "highest"),
        (lambda: Sampler(guidance="clap"), "Did you mean 'clip'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
