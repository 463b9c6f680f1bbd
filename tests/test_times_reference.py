"""Times against diffusers' schedulers."""

import numpy as np
import pytest
from scipy import stats

from kdiff import random, schedules, times
from tests.toys import numpy

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.reference, pytest.mark.once]

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = schedules.ScaledLinearBeta()


def euler(steps, **options):
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def sigmas(t):
    return np.exp(-0.5 * numpy(SCHEDULE.log_snr(t.astype("float32"))).astype("float64"))


@pytest.mark.parametrize("steps", [7, 20, 50])
@pytest.mark.parametrize(
    ("grid", "spacing", "offset"),
    [(times.Leading(), "leading", 0), (times.Leading(1), "leading", 1), (times.Trailing(), "trailing", 0)],
)
def test_spacings_by_index(grid, spacing, offset, steps):
    scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(grid(SCHEDULE, steps)[:-1] * 1000 - 1, scheduler.timesteps.numpy(), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_linspace(steps):
    """DDIM rounds to a step, as here. (With one step diffusers begins at i = 0, at the data, and not at T - 1.)"""
    scheduler = diffusers.DDIMScheduler(**TABLE, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    theirs = list(scheduler.timesteps.numpy())
    assert steps > 1 or theirs == [0]
    ours = times.Linspace()(SCHEDULE, steps)[:-1] * 1000 - 1
    np.testing.assert_allclose(ours, theirs if steps > 1 else [999], atol=1e-6)


@pytest.mark.parametrize("steps", [2, 10, 30])
@pytest.mark.parametrize(
    ("grid", "option"),
    [
        (times.Karras(), "use_karras_sigmas"),
        (times.Exponential(), "use_exponential_sigmas"),
        (times.UniformLogSNR(), "use_exponential_sigmas"),
        (times.Polyexponential(), "use_exponential_sigmas"),
    ],
)
def test_sigmas(grid, option, steps):
    """From the first to the last sigma of the table. Times are found in a table in float32 there, and here too."""
    scheduler = euler(steps, **{option: True})
    t = grid(SCHEDULE, steps)
    np.testing.assert_allclose(sigmas(t[:-1]), scheduler.sigmas.numpy()[:-1], rtol=1e-4)
    # Its time between two steps is linear in log(sigma), ours in log(alpha / sigma), which is the same.
    np.testing.assert_allclose(t[:-1] * 1000 - 1, scheduler.timesteps.numpy(), atol=2e-3)


@pytest.mark.parametrize("steps", [10, 15])
def test_rounded_sigmas(steps):
    """DPM-Solver rounds these grids to steps; it then keeps the sigmas that were not rounded, which we do not."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    t = times.Rounded("karras")(SCHEDULE, steps)
    np.testing.assert_allclose(t[:-1] * 1000 - 1, scheduler.timesteps.numpy(), atol=1e-6)
    places = np.round(scheduler.sigmas.numpy()[:-1], 3)
    assert np.abs(sigmas(t[:-1]) - places).max() > 1e-3  # what it solves with is not at the time that it tells


@pytest.mark.parametrize("steps", [2, 8, 25])
def test_beta_sigmas(steps):
    """The same quantiles. diffusers takes them between sigmas, where the paper, as here, takes them between times."""
    found = euler(steps, use_beta_sigmas=True).sigmas.numpy()[:-1].astype("float64")
    expected = (found - sigmas(np.array([0.001]))) / (sigmas(np.array([1.0])) - sigmas(np.array([0.001])))
    quantiles = (times.BetaQuantile()(SCHEDULE, steps)[:-1] - 0.001) / 0.999
    np.testing.assert_allclose(quantiles, expected, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_shift(shift, steps):
    """With sigmas given. Without, diffusers begins at shifted sigmas, and shifts them again: see below."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 1.0 / steps, steps)))
    t = times.FlowShift(shift)(schedules.Rectified(), steps)
    np.testing.assert_allclose(t, scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(t[:-1] * 1000, scheduler.timesteps.numpy(), rtol=1e-5)


def test_flow_shift_is_not_applied_twice():
    """Its default grid goes from 1 to the shifted 1 / T, and all of it is shifted once more."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    once = 3.0 * 0.001 / (1.0 + 2.0 * 0.001)
    grid = np.linspace(1.0, once, 10)
    np.testing.assert_allclose(scheduler.sigmas.numpy()[:-1], 3.0 * grid / (1.0 + 2.0 * grid), atol=1e-6)
    assert np.abs(scheduler.sigmas.numpy() - times.FlowShift(3.0)(schedules.Rectified(), 10)).max() > 0.02


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_shift(tokens):
    """Flux: mu is linear in the tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = np.interp(tokens, [256, 4096], [0.5, 1.15])
    scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 0.05, 20)), mu=mu)
    t = times.FlowShift.for_tokens(tokens)(schedules.Rectified(), 20)
    np.testing.assert_allclose(t, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (times.LogitNormal(0.3, 0.8), {"weighting_scheme": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8}),
        (times.Mode(1.29), {"weighting_scheme": "mode", "mode_scale": 1.29}),
    ],
    ids=repr,
)
def test_distributions_of_stable_diffusion_3(sampler, options):
    """Two samples of 4,000, by Kolmogorov and Smirnov at a level of 1e-3."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling(
        batch_size=4000, generator=torch.Generator().manual_seed(0), **options
    )
    ours = numpy(sampler(schedules.Rectified(), 4000, random.key_of(1)))
    assert stats.ks_2samp(ours, theirs.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", times.DEEPFLOYD)
def test_the_lists_of_deepfloyd(name):
    from diffusers.pipelines.deepfloyd_if import timesteps

    grid, table = times.Sections.deepfloyd(name), schedules.CosineBeta(1000)
    steps = getattr(timesteps, f"{name}_timesteps")
    np.testing.assert_allclose(1000 * grid(table, len(steps)) - 1, [*steps, -1], atol=1e-6)
