"""Schedules against diffusers."""

import numpy as np
import pytest

from kdiff import schedules
from tests.toys import numpy

pytestmark = [pytest.mark.reference, pytest.mark.once]
pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def theirs(name, **options):
    return diffusers.DDPMScheduler(beta_schedule=name, **options)


TABLES = [
    (schedules.LinearBeta(), "linear", {}),
    (schedules.LinearBeta(200, 1e-3, 0.1), "linear", {"num_train_timesteps": 200, "beta_start": 1e-3, "beta_end": 0.1}),
    (schedules.ScaledLinearBeta(), "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    (schedules.CosineBeta(), "squaredcos_cap_v2", {}),
    (schedules.SigmoidBeta(), "sigmoid", {}),
    (schedules.SigmoidBeta(100, 1e-4, 0.05), "sigmoid", {"num_train_timesteps": 100, "beta_end": 0.05}),
]
every_table = pytest.mark.parametrize(("schedule", "name", "options"), TABLES, ids=lambda v: str(v))


@every_table
def test_betas(schedule, name, options):
    """Theirs are float32: of sqrt(beta)^2, and of a sigmoid, a few units in the last place."""
    np.testing.assert_allclose(schedule.betas, theirs(name, **options).betas.numpy(), rtol=3e-6)


@every_table
def test_alpha_bars(schedule, name, options):
    """Theirs are a product of up to 1,000 float32 numbers, each rounded to 6e-8."""
    alpha = numpy(schedule.at(np.arange(1, schedule.num_steps + 1) / schedule.num_steps).alpha)
    np.testing.assert_allclose(alpha**2, theirs(name, **options).alphas_cumprod.numpy(), rtol=6e-5)


@pytest.mark.parametrize("case", [0, 2, 4], ids=["linear", "scaled linear", "sigmoid"])
def test_zero_terminal_snr(case):
    """`rescale_betas_zero_snr`. They go through betas in float32 again, which costs digits near the end: alpha_bar is
    compared to 1e-6 in all, and relatively where it is above 1e-3.
    """
    schedule, name, options = TABLES[case]
    expected = theirs(name, rescale_betas_zero_snr=True, **options).alphas_cumprod.numpy()
    bar = numpy(schedules.ZeroTerminalSNR(schedule).at(np.arange(1, 1001) / 1000).alpha) ** 2
    np.testing.assert_allclose(bar, expected, atol=1e-6, rtol=3e-5)
    assert bar[-1] < 1e-17


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_shift_of_sd3(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = schedules.Shifted.by_factor(schedules.Rectified(1e-8), shift)
    sigma = numpy(ours.at(np.arange(1000, 0, -1) / 1000).sigma)
    np.testing.assert_allclose(sigma, scheduler.sigmas.numpy()[:1000], rtol=1e-5)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_shift_of_flux(tokens):
    """mu is in the pipeline of Flux, which needs the package transformers: here on the straight line by NumPy."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = np.linspace(1.0, 0.05, 20)
    scheduler.set_timesteps(sigmas=t, mu=np.interp(tokens, [256, 4096], [0.5, 1.15]))
    ours = schedules.Shifted.for_tokens(schedules.Rectified(1e-8), tokens)
    np.testing.assert_allclose(numpy(ours.at(t).sigma), scheduler.sigmas.numpy()[:-1], rtol=1e-5)
