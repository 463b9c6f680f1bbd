from functools import partial

import keras
import numpy as np
import pytest

from kdiff import Sampler, random, schedules
from kdiff.denoisers import Given
from kdiff.guidance import Inpaint
from kdiff.sampling import dpm_fast
from kdiff.solvers import DDIM, DDPM, DPMSolverPP, DPMSolverPPSinglestepSDE, Solver
from kdiff.times import Jumps, Linspace, Times
from tests.toys import EAGER, GAUSSIAN, exact_denoiser, numpy

SCHEDULE = schedules.CosineBeta()


def sample(sampler, shape=(4, 3), **options):
    return numpy(sampler(exact_denoiser(), SCHEDULE, shape, **options))


def test_a_run_can_be_watched():
    steps = list(Sampler(DDPM(), steps=5).steps_of(exact_denoiser(), SCHEDULE, (4, 3)))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert {step.total for step in steps} == {5}
    assert np.all(np.diff([step.t for step in steps]) < 0)
    assert steps[-1].t == 0
    assert all(numpy(step.x).shape == numpy(step.x_hat).shape == (4, 3) for step in steps)
    np.testing.assert_array_equal(numpy(steps[-1].x), sample(Sampler(DDPM(), steps=5)))


ENDS = [schedules.VarianceExploding(), schedules.Rectified(), SCHEDULE]


@pytest.mark.once
@pytest.mark.parametrize("schedule", ENDS, ids=repr)
@pytest.mark.parametrize("solver", ["ddim", "heun", "tcd"])
def test_a_run_ends_without_noise(schedule, solver):
    """Where all is known the result is that, on EDM's schedule too, which ends at a sigma of 0.002."""
    image = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)).astype("float32")
    sampler = Sampler(solver, steps=4, guidance=Inpaint(image, np.zeros((4, 4))))
    np.testing.assert_allclose(numpy(sampler(exact_denoiser(), schedule, image.shape)), image, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("solver", ["lms", "uni_pc", DPMSolverPP(3)], ids=repr)
def test_multistep_solvers_make_any_number_of_steps(solver):
    """Of lower order, as at the start of every run; with one step and one point of data, that point."""
    for sampler, strength in ((Sampler(solver, steps=1), 1.0), (Sampler(solver, steps=20), 0.04)):
        times = sampler.times(SCHEDULE, strength)
        assert len(times) == 2
        *_, step = sampler.steps_of(exact_denoiser(0.25, 0.0), SCHEDULE, (2, 3), times=times)
        np.testing.assert_allclose(numpy(step.x), 0.25, atol=1e-5)


@pytest.mark.once
def test_a_run_may_begin_and_end_anywhere():
    """In place of the nearest time of the grid; the two halves are the whole."""
    sampler = Sampler(grid=Times([1.0, 0.7, 0.4, 0.2, 0.0]), steps=4)
    for strength, stop, expected in (
        (1.0, 0.0, [1.0, 0.7, 0.4, 0.2, 0.0]),
        (0.72, 0.0, [0.72, 0.4, 0.2, 0.0]),
        (0.66, 0.0, [0.66, 0.4, 0.2, 0.0]),
        (0.15, 0.0, [0.15, 0.0]),
        (1.0, 0.65, [1.0, 0.65]),
        (1.0, 0.35, [1.0, 0.7, 0.35]),
        (0.72, 0.1, [0.72, 0.4, 0.1]),
        (0.0, 0.0, [0.0]),
    ):
        np.testing.assert_allclose(sampler.times(schedules.Cosine(), strength, stop), expected, err_msg=str(strength))


@pytest.mark.once
@pytest.mark.parametrize("solver", list(Solver.names()))
def test_a_strength_of_zero_has_no_step(solver):
    """Nor a share of churn for each."""
    solver = Solver.get(solver)
    sampler = Sampler(solver.clone(s_churn=2.0) if hasattr(solver, "s_churn") else solver, steps=5)
    times = sampler.times(SCHEDULE, 0.0)
    assert not list(sampler.steps_of(exact_denoiser(0.0, 1.0), SCHEDULE, (2, 3), times=times))


@pytest.mark.once
def test_a_rise_draws_from_the_forward_process():
    """q(x_then | x_now), of DDPM eq. 2: with the steps between two times of a table its betas say both numbers."""
    schedule = schedules.LinearBeta(10, 0.02, 0.3)
    advance = partial(pytest.fail, "no step falls")
    noise = np.random.default_rng(0).standard_normal((2, 3)).astype("float32")
    x = np.ones((2, 3), "float32")
    run = Sampler("ddim").steps_from(
        x, np.array([0.3, 0.6, 0.2]), advance, schedule, Given(), noise=lambda step, shape: noise
    )
    kept = np.prod(1.0 - schedule.betas[3:6])
    np.testing.assert_allclose(numpy(next(run).x), np.sqrt(kept) * x + np.sqrt(1.0 - kept) * noise, rtol=1e-5)


def test_a_run_does_not_depend_on_those_before_it():
    sampler = Sampler("ddpm", steps=5)
    before = sample(sampler)
    sample(Sampler("ddpm", steps=9))
    np.testing.assert_array_equal(sample(sampler), before)


def test_the_seed_names_the_samples():
    sampler = Sampler("ddpm", steps=5)
    np.testing.assert_array_equal(sample(sampler, seed=3), sample(sampler, seed=3))
    assert not np.any(sample(sampler, seed=3) == sample(sampler, seed=4))


KNOWN = [kind for kind in Solver.names().values() if kind.__module__.startswith("kdiff.")]
STOCHASTIC = [kind() for kind in KNOWN if kind().stochastic]


@pytest.mark.once
@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_all_noise_of_a_run_is_fresh(solver, monkeypatch):
    """That of its beginning, of each step, and of each draw within a step: no two share a number."""
    drawn, normal = [], random.normal

    def watched(*arguments):
        drawn.append(normal(*arguments))
        return drawn[-1]

    monkeypatch.setattr(random, "normal", watched)
    sample(Sampler(solver, steps=4))
    twice = isinstance(solver, DPMSolverPPSinglestepSDE)
    assert len(drawn) == 1 + 4 * (2 if twice else 1)
    assert len(np.unique([numpy(noise) for noise in drawn])) == sum(numpy(noise).size for noise in drawn)


@pytest.mark.skipif(not EAGER, reason="operations that are executed one by one")
@pytest.mark.parametrize(("solver", "most"), [("ddim", 45), ("dpm_solver_pp", 75)])
def test_a_step_has_few_operations_beside_the_network(solver, most):
    """Each takes some microseconds, and on a GPU an eager network waits for as many launches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for steps in (10, 20):
        with Counting() as counting:
            Sampler(solver, steps=steps)(lambda x, m: x, schedules.Cosine(), (4, 3))
        counts.append(counting.count)
    assert (counts[1] - counts[0]) / 10 <= most


def test_batches_continue_one_another():
    def last(first, count):
        *_, step = Sampler("ddpm", steps=5).steps_of(exact_denoiser(), SCHEDULE, (count, 3), seed=1, first=first)
        return numpy(step.x)

    np.testing.assert_allclose(np.concatenate([last(0, 3), last(3, 2)]), last(0, 5), rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_defaults_and_names():
    assert len(Sampler().times(SCHEDULE)) == 51
    assert len(Sampler(grid="all").times(schedules.LinearBeta(30))) == 31
    sampler = Sampler("ddpm", "linspace", 7)
    assert sampler == Sampler(DDPM(), Linspace(), 7)
    assert repr(sampler) == "Sampler(solver=DDPM(), grid=Linspace(), steps=7)"


@pytest.mark.once
@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps"):
        Sampler(steps=steps)


@pytest.mark.once
def test_more_steps_than_there_are():
    with pytest.raises(ValueError, match="at most 10"):
        Sampler(steps=11).times(schedules.LinearBeta(10))


def test_noise_may_be_given():
    """That of the seed, in its place; a step at a time."""
    key, asked = random.key_of(0), []

    def noise(step, shape):
        asked.append((step, shape))
        return numpy(random.normal(random.fold_in(key, np.int32(step), random.STEPS), shape, np.int32(0)))

    sampler = Sampler("ddpm", steps=5)
    np.testing.assert_array_equal(sample(sampler, noise=noise), sample(sampler))
    assert asked == [(step, (4, 3)) for step in range(5)]
    quiet = sample(sampler, noise=lambda step, shape: np.zeros(shape))
    assert np.abs(quiet - sample(sampler)).max() > 0.01
    with pytest.raises(ValueError, match=r"`noise\(0, \(4, 3\)\)` must have that shape; it has \(3,\)"):
        sample(sampler, noise=lambda step, shape: np.zeros(3))


def fast(denoise, x, evaluations, low, high):
    """DPM-Solver-fast as k-diffusion has it, where t = -log(sigma) and eps = (x - denoise) / sigma, in float64."""
    count = evaluations // 3 + 1
    ts = np.linspace(-np.log(high), -np.log(low), count + 1)
    orders = [3] * (count - 2) + [2, 1] if evaluations % 3 == 0 else [3] * (count - 1) + [evaluations % 3]

    def eps(x, t):
        return (x - denoise(x, np.exp(-t))) / np.exp(-t)

    for order, t, then in zip(orders, ts, ts[1:], strict=False):
        h, e = then - t, eps(x, t)
        end = np.exp(-then)
        if order == 1:
            x = x - end * np.expm1(h) * e
            continue
        r = 1 / 2 if order == 2 else 1 / 3
        s = t + r * h
        e_1 = eps(x - np.exp(-s) * np.expm1(r * h) * e, s)
        if order == 2:
            x = x - end * np.expm1(h) * e - end / (2 * r) * np.expm1(h) * (e_1 - e)
            continue
        q = 2 / 3
        s = t + q * h
        bend = np.exp(-s) * (q / r) * (np.expm1(q * h) / (q * h) - 1) * (e_1 - e)
        e_2 = eps(x - np.exp(-s) * np.expm1(q * h) * e - bend, s)
        x = x - end * np.expm1(h) * e - end / q * (np.expm1(h) / h - 1) * (e_2 - e)
    return x


@pytest.mark.once
@pytest.mark.parametrize("evaluations", [2, 6, 7, 20])
def test_dpm_fast(evaluations):
    """As k-diffusion's `sample_dpm_fast`, in as many calls."""
    schedule, calls = schedules.VarianceExploding(0.01, 20.0), []

    def denoise(x, m):
        calls.append(m)
        return exact_denoiser()(x, m)

    def plain(x, sigma, mean=GAUSSIAN["mean"], std=GAUSSIAN["std"]):
        return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    x = 20.0 * np.random.default_rng(0).normal(size=(3, 4))
    given = numpy(dpm_fast(evaluations, 0.02, 20.0)(denoise, schedule, x.shape, x=x))
    np.testing.assert_allclose(given, fast(plain, x, evaluations, 0.02, 20.0), rtol=1e-4, atol=2e-4)
    if keras.backend.backend() != "jax":  # there a condition that is not compiled traces both sides
        assert len(calls) == evaluations


@pytest.mark.once
def test_a_solver_is_told_how_many_steps_each_descent_has():
    """It begins anew after each jump to more noise; all but the last descent end at the next jump."""

    class Recording(DDIM):
        named = False

        def init(self, x, steps):
            descents.append([steps, 0])
            return ()

        def step(self, *arguments):
            descents[-1][1] += 1
            return super().step(*arguments)

    descents = []
    grid = Jumps("trailing", length=3, repeats=3)
    Sampler(Recording(), grid, steps=7)(exact_denoiser(0.0, 0.5), schedules.Cosine(), (2, 1))
    assert descents == [[4, 4], [3, 3], [6, 6], [3, 3], [3, 3]]
