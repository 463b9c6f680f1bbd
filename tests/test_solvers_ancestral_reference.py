"""DDPM, DDIM and DDIM's inversion, step by step against diffusers: same grid, noise and denoiser.

Where diffusers is wrong the test that shows it says so. (diffusers 0.42.)
"""

import itertools

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, predictions, schedules
from kdiff.denoisers import Denoiser
from kdiff.guidance import Clip, DynamicThreshold
from kdiff.schedules import Marginal
from kdiff.solvers import DDIM, DDPM
from kdiff.solvers.ancestral import DDIMInversion
from kdiff.solvers.base import noise_of
from kdiff.times import Leading, Linspace, Trailing
from tests.toys import MIXTURE, numpy, walk

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.reference, pytest.mark.once]

PREDICTIONS = {"epsilon": predictions.Noise(), "sample": predictions.Data(), "v_prediction": predictions.Velocity()}
GRIDS = {"leading": Leading(), "trailing": Trailing(), "linspace": Linspace()}
SCHEDULE = schedules.LinearBeta()
START = np.random.default_rng(3).normal(size=(6, 2)).astype("float32")
NOISES = np.random.default_rng(4).normal(size=(60, 6, 2)).astype("float32")
SHARE = np.random.default_rng(5).uniform(size=(6, 2)).astype("float32")


def wide(x, m):
    """A denoiser whose x_hat leaves [-1, 1]."""
    return 2.0 * MIXTURE(x, m)


def marginals_of(times):
    return [SCHEDULE.at(np.float32(t)) for t in times]


def ours(solver, times, denoise=MIXTURE):
    """x after each step along these times, from `START`."""
    noises = map(ops.convert_to_tensor, NOISES)
    for x, _ in walk(solver, SCHEDULE, marginals_of(times), START, denoise, lambda: next(noises)):
        yield numpy(x)


def theirs(scheduler, monkeypatch, denoise=MIXTURE, share=None, **options):
    """x after each step of diffusers' scheduler, in float64, whose network has the same denoiser inside."""
    noises = iter(NOISES[..., None].astype("float64"))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(noises)))
    scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - SCHEDULE.betas))
    x = START.astype("float64")
    for timestep in scheduler.timesteps:
        output = network(scheduler, x, int(timestep), denoise)
        if share is not None:
            output = np.concatenate([output, 2 * share - 1], axis=1)
        x = scheduler.step(torch.tensor(output)[..., None], timestep, torch.tensor(x)[..., None], **options)
        x = x.prev_sample.numpy()[..., 0]
        yield x


def network(scheduler, x, index, denoise):
    """What a network of this prediction type would answer, float64."""
    m = SCHEDULE.at(np.float32((index + 1) / SCHEDULE.num_steps))
    x_hat = numpy(denoise(ops.convert_to_tensor(x, "float32"), m)).astype("float64")
    bar = float(scheduler.alphas_cumprod[index])
    m = Marginal(None, np.sqrt(bar), np.sqrt(1 - bar), None)
    a, b = PREDICTIONS[scheduler.config.prediction_type].coefficients(m)
    return a * x_hat + b * noise_of(x, x_hat, m)


def difference(a, b):
    """The largest difference at any step, relative to the largest number of that step."""
    pairs = list(zip(a, b, strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in pairs])


def times_of(scheduler):
    """Their timesteps as our times, and 0."""
    return np.append((scheduler.timesteps.numpy() + 1) / SCHEDULE.num_steps, 0.0)


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("steps", [3, 10, 17])
def test_grids(spacing, steps):
    """Ours are theirs."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(Sampler(grid=GRIDS[spacing], steps=steps).times(SCHEDULE), times_of(scheduler))


# DDPM

VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}


def sharing(denoise, share):
    """The denoiser with an answer that has this share."""
    denoise = Denoiser.of(denoise)
    share = None if share is None else ops.convert_to_tensor(share)
    return Denoiser(lambda given, x, m: denoise(x, m)._replace(share=share))


def ddpm_pair(variance, options, steps, monkeypatch, denoise=MIXTURE, guide=None):
    scheduler = diffusers.DDPMScheduler(variance_type=variance, **{"clip_sample": False, **options})
    scheduler.set_timesteps(steps)
    guided = guide(denoise) if guide else denoise
    share = SHARE if variance == "learned_range" else None
    a = ours(DDPM(VARIANCES[variance]), times_of(scheduler), sharing(guided, share))
    return difference(a, theirs(scheduler, monkeypatch, denoise, share))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    ],
    ids=repr,
)
def test_ddpm(variance, options, monkeypatch):
    assert ddpm_pair(variance, options, 10, monkeypatch) < 1e-4


@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_adds_no_noise_to_its_result(variance, monkeypatch):
    """On a grid that does not end at i = 0 diffusers adds noise in the last step, to t = 0, where it is left in x.

    Of "fixed_small" the noise is 0 there, and they agree; of the others it has the size of sqrt(beta): sigma_now.
    """
    options = {"prediction_type": "sample", "timestep_spacing": "trailing"}
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False, **options)
    scheduler.set_timesteps(10)
    share = SHARE if variance == "learned_range" else None
    a = list(ours(DDPM(VARIANCES[variance]), times_of(scheduler), sharing(MIXTURE, share)))
    b = list(theirs(scheduler, monkeypatch, share=share))
    assert difference(a[:-1], b[:-1]) < 1e-4
    left = difference(a[-1:], b[-1:])
    assert left < 1e-4 if "small" in variance else left > 1e-2


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_clips(variance, monkeypatch):
    options = {"clip_sample": True, "clip_sample_range": 0.7}
    assert ddpm_pair(variance, options, 10, monkeypatch, wide, Clip(0.7)) < 1e-4


def test_ddpm_with_dynamic_thresholding(monkeypatch):
    """`sample_max_value` must be given: at its default, 1, diffusers' threshold is 1 always, which is clipping."""
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.3, "sample_max_value": 4.0}
    assert ddpm_pair("fixed_small", options, 10, monkeypatch, wide, DynamicThreshold(0.3, 4.0)) < 1e-4
    options["sample_max_value"] = 1.0
    assert ddpm_pair("fixed_small", options, 10, monkeypatch, wide, Clip(1.0)) < 1e-4


def test_fixed_large_log_is_not_a_number(monkeypatch):
    """diffusers takes the square root of the logarithm of beta, a negative number. What it means is "large"."""
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large_log", clip_sample=False)
    scheduler.set_timesteps(5)
    first = next(theirs(scheduler, monkeypatch))
    assert np.all(np.isnan(first))
    assert np.all(np.isfinite(next(ours(DDPM("large"), times_of(scheduler)))))


# DDIM


def ddim_pair(eta, options, steps, monkeypatch, denoise=MIXTURE, guide=None, **step_options):
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, **options})
    scheduler.set_timesteps(steps)
    times = times_of(scheduler)
    if not options.get("set_alpha_to_one", True):
        times[-1] = 1 / SCHEDULE.num_steps
        scheduler.final_alpha_cumprod = torch.tensor(1 - SCHEDULE.betas[0])
    a = ours(DDIM(eta), times, guide(denoise) if guide else denoise)
    return difference(a, theirs(scheduler, monkeypatch, denoise, eta=eta, **step_options))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_type": "sample", "steps_offset": 1},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"set_alpha_to_one": False, "steps_offset": 1},
    ],
    ids=repr,
)
def test_ddim(eta, options, monkeypatch):
    assert ddim_pair(eta, options, 10, monkeypatch) < 1e-4


@pytest.mark.parametrize(
    ("options", "guide"),
    [
        ({"clip_sample": True, "clip_sample_range": 0.7}, Clip(0.7)),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.3, "sample_max_value": 4.0},
            DynamicThreshold(0.3, 4.0),
        ),
    ],
    ids=["clip", "dynamic"],
)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_guided(eta, options, guide, monkeypatch):
    """Ours takes the noise that goes with the clipped x_hat, as OpenAI's code does: `use_clipped_model_output=True`.

    diffusers' default keeps the network's noise beside the clipped x_hat: the two no longer sum to x.
    """
    assert ddim_pair(eta, options, 10, monkeypatch, wide, guide, use_clipped_model_output=True) < 1e-4
    assert ddim_pair(eta, options, 10, monkeypatch, wide, guide) > 1e-2


def exact_ddim(indices):
    """x after each step of eq. 12 of the paper with eta = 0, float64, between the neighbours of a list of indices."""
    bars = np.append(np.cumprod(1 - SCHEDULE.betas), 1.0)
    x = START.astype("float64")
    for now, then in itertools.pairwise((*indices, -1)):
        m = SCHEDULE.at(np.float32((now + 1) / SCHEDULE.num_steps))
        x_hat = numpy(MIXTURE(ops.convert_to_tensor(x, "float32"), m)).astype("float64")
        noise = (x - np.sqrt(bars[now]) * x_hat) / np.sqrt(1 - bars[now])
        x = np.sqrt(bars[then]) * x_hat + np.sqrt(1 - bars[then]) * noise
        yield x


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 17), ("leading", 17), ("trailing", 10)])
def test_ddim_goes_to_the_next_time_of_its_grid(spacing, steps, monkeypatch):
    """diffusers' DDIM goes to i - T // steps, whatever its next timestep is.

    Under "linspace", and under "trailing" where steps does not divide T, that is another place than the one its network
    is asked about next. Ours goes to the next time of the grid.
    """
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    exact = list(exact_ddim(scheduler.timesteps.tolist()))
    assert difference(ours(DDIM(), times_of(scheduler)), exact) < 1e-4
    right = spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0)
    wrong = difference(theirs(scheduler, monkeypatch), exact)
    assert wrong < 1e-4 if right else wrong > 1e-2


# Inversion


def test_inversion_solves_their_equation():
    """Where ours has converged, diffusers' DDIMInverseScheduler, given the noise_hat of the x_then found, agrees.

    The equation is the same; its solution is not theirs, since they take noise_hat at (x_now, t_then) for the answer
    and do not iterate. With one iteration we do as well, but with x_hat of the same place beside it, where they have
    the x_hat that would make x_now.
    """
    scheduler = inverse_scheduler()
    times = np.insert((scheduler.timesteps.numpy() + 1) / SCHEDULE.num_steps, 0, 0.0)
    x = START.astype("float64")
    for index, x_then in zip(scheduler.timesteps, ours(DDIMInversion(20), times), strict=True):
        output = torch.tensor(network(scheduler, x_then, int(index), MIXTURE))
        theirs = scheduler.step(output, index, torch.tensor(x)).prev_sample.numpy()
        assert difference([x_then], [theirs]) < 1e-4
        x = x_then.astype("float64")


def inverse_scheduler(steps=10):
    return with_table(diffusers.DDIMInverseScheduler(clip_sample=False), steps)


def with_table(scheduler, steps):
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - SCHEDULE.betas))
    return scheduler


def test_inversion_is_nearer_than_theirs():
    """There and back in 10 and 40 steps on diffusers' own grid, one call of the network a step in both."""
    x = MIXTURE.sample(32)
    for steps in (10, 40):
        times = Sampler(grid=Leading(), steps=steps).times(SCHEDULE)
        there = ops.convert_to_tensor(x)
        for solver, grid in ((DDIMInversion(), times[::-1]), (DDIM(), times)):
            *_, (there, _) = walk(solver, SCHEDULE, marginals_of(grid), there)
        back = x.astype("float64")
        forward = with_table(diffusers.DDIMScheduler(clip_sample=False), steps)
        for scheduler in (inverse_scheduler(steps), forward):
            for index in scheduler.timesteps:
                output = torch.tensor(network(scheduler, back, int(index), MIXTURE))
                back = scheduler.step(output, index, torch.tensor(back)).prev_sample.numpy()
        assert np.mean((numpy(there) - x) ** 2) < np.mean((back - x) ** 2)
