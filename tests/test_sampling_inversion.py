"""The way back: from data to the noise that a deterministic solver makes it from."""

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, analytic, schedules
from kdiff.guidance import DPS, CFGPlusPlus, CFGZeroStar
from kdiff.solvers import DDIM, DDPM, EulerAncestral
from kdiff.solvers.ancestral import DDIMInversion
from kdiff.solvers.consistency import TCD
from kdiff.solvers.sa import SASolver
from kdiff.solvers.unipc import UniPC
from tests.toys import MIXTURE, numpy

SCHEDULES = [schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()]
DATA = analytic.Gaussian([0.3, -0.5], [[0.5, 0.3], [0.3, 0.4]])


def there_and_back(solver, schedule, steps, data=MIXTURE, iterations=1):
    """The root mean square error of what the sampler makes of the inverted noise, over 32 samples of the data."""
    x, sampler = data.sample(32), Sampler(solver, steps=steps)
    noise = sampler.invert(data, schedule, x, iterations=iterations)
    return np.sqrt(np.mean((numpy(sampler(data, schedule, x.shape, x=noise)) - x) ** 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_sampler_undoes_its_inversion(schedule):
    """The error falls with the steps and, faster, with the iterations; to 1e-5, which Rectified's x at t = 0 is off."""
    few, many = (there_and_back(DDIM(), schedule, steps) for steps in (10, 40))
    assert many < few / 2 < 0.05
    errors = [there_and_back(DDIM(), schedule, 10, iterations=iterations) for iterations in (1, 2, 8)]
    assert errors[0] == pytest.approx(few, rel=1e-5)
    assert errors[1] < errors[0] / 3
    assert errors[2] < 2e-5


@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.LinearBeta()], ids=repr)
def test_iterations_do_no_harm_where_they_do_not_converge(schedule):
    """With an estimate that changes too fast for the steps: without going back, 8 iterations are worse than one."""
    x, sampler, errors = MIXTURE.sample(64), Sampler(DDIM(), steps=10), []

    def steep(x, m):
        return 0.9 * ops.sin(2.0 * x * (1.0 - 0.5 * m.t))

    for iterations in (1, 8):
        noise = sampler.invert(steep, schedule, x, iterations=iterations)
        errors.append(np.sqrt(np.mean((numpy(sampler(steep, schedule, x.shape, x=noise)) - x) ** 2)))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.once
@pytest.mark.parametrize(("schedule", "iterations"), [*((schedule, 1) for schedule in SCHEDULES), (SCHEDULES[0], 4)])
def test_the_inversion_follows_the_flow(schedule, iterations):
    """Of a Gaussian the noise is known: the flow keeps the standard score. The error falls as 1 / steps."""
    x, errors = DATA.sample(32), []
    for steps in (10, 40):
        sampler = Sampler(DDIM(), steps=steps)
        exact = DATA.flow(x, schedule, 0.0, float(sampler.times(schedule)[0]))
        errors.append(np.sqrt(np.mean((numpy(sampler.invert(DATA, schedule, x, iterations=iterations)) - exact) ** 2)))
    # Two doublings of the steps: two orders. Some terms of the second order are left, hence 0.35.
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]) / 2, 1.0, atol=0.35)
    assert errors[1] < 0.1


@pytest.mark.once
def test_it_is_undone_on_every_grid():
    """ "leading" and a run that ends above t = 0 too."""
    schedule, x = schedules.LinearBeta(), MIXTURE.sample(8)
    # Euler without churn, and EulerAncestral without noise, are DDIM, and have its inversion.
    samplers = [Sampler("ddim", "leading", 10), Sampler("euler", "leading", 10), Sampler(EulerAncestral(0.0), steps=10)]
    for sampler in (*samplers, Sampler("ddim", "linspace", 10, to_zero=False)):
        noise = sampler.invert(MIXTURE, schedule, x, iterations=8)
        end = float(schedule.at(np.float32(sampler.times(schedule)[-1])).alpha)
        np.testing.assert_allclose(numpy(sampler(MIXTURE, schedule, x.shape, x=noise)), end * x, atol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("rule", [CFGPlusPlus(0.6), CFGZeroStar(1.0, zero_steps=2), DPS("grey", [0.3], 0.02)], ids=repr)
def test_guidance_sees_the_step_that_is_inverted(rule):
    """Of rules that depend on the step: its length, with the sign of the way to data, and its place in the run."""
    data = MIXTURE.conditional(np.arange(16) % 3)
    x, sampler = MIXTURE.sample(16), Sampler(DDIM(), steps=10, guidance=rule)
    noise = sampler.invert(data, schedules.Cosine(), x, iterations=40)
    again = numpy(sampler(data, schedules.Cosine(), x.shape, x=noise))
    np.testing.assert_allclose(again, x, atol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("solver", [DDPM(), DDIM(0.5), DDIM(1.0), SASolver(), TCD()], ids=repr)
def test_a_stochastic_solver_has_no_inversion(solver):
    """The message says why, and what has one."""
    with pytest.raises(ValueError, match=r"no inverse: it is stochastic.*DDIM\(eta=0.0\)"):
        Sampler(solver, steps=3).invert(MIXTURE, schedules.Cosine(), np.zeros((1, 2)))


@pytest.mark.once
def test_who_inverts_whom():
    assert DDIM().inverse() == DDIMInversion()
    assert DDIMInversion(3).inverse() == DDIM()
    assert DDIMInversion(3).evaluations == 3
    with pytest.raises(ValueError, match=r"UniPC.*no inverse.*DDIM"):
        UniPC().inverse()
    with pytest.raises(ValueError, match=r"iterations.*0"):
        DDIMInversion(0)
