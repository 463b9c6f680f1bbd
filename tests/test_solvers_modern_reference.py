"""UniPC, SA-Solver, LCM, TCD and consistency sampling, step by step against diffusers: same grid, noise and denoiser.

Where diffusers is wrong, or does something of no use, the test that shows it says so. (diffusers 0.42.)
"""

import numpy as np
import pytest
from keras import ops

from kdiff import predictions, schedules
from kdiff.guidance import Clip, DynamicThreshold
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers import DDIM
from kdiff.solvers.base import noise_of
from kdiff.solvers.consistency import LCM, TCD, Consistency
from kdiff.solvers.sa import SASolver, Within
from kdiff.solvers.unipc import UniPC
from tests.toys import MIXTURE, numpy, walk

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.reference, pytest.mark.once]

PREDICTIONS = {
    "epsilon": predictions.Noise(),
    "sample": predictions.Data(),
    "v_prediction": predictions.Velocity(),
    "flow_prediction": predictions.Flow(),
}
START = np.random.default_rng(3).normal(size=(6, 2)).astype("float32")
NOISES = np.random.default_rng(4).normal(size=(60, 6, 2)).astype("float32")


class Exploding(NoiseSchedule):
    """x_t = x + s noise, with log s linear in t; for this file."""

    def log_snr(self, t):
        return -2.0 * (np.log(0.002) + ops.convert_to_tensor(t, "float32") * np.log(80.0 / 0.002))

    def time(self, log_snr):
        return (-0.5 * ops.convert_to_tensor(log_snr, "float32") - np.log(0.002)) / np.log(80.0 / 0.002)

    def scales(self, log_snr):
        return ops.ones_like(log_snr), ops.exp(-0.5 * log_snr)


def at_sigmas(schedule, sigmas, flow=False):
    """The marginals at diffusers' sigmas, sigma / alpha, or sigma of rectified flow; where it is 0, t = 0."""
    sigmas = np.asarray(sigmas, "float64")
    ratios = sigmas / (1 - sigmas) if flow else sigmas
    return [schedule.at(0.0) if r == 0 else schedule.at_log_snr(np.float32(-2 * np.log(r))) for r in ratios]


def at_indices(schedule, timesteps, last=0.0):
    """The marginals at the indices of a discrete process, t = (i + 1) / T, and then at `last`."""
    times = (np.asarray(timesteps, "float64") + 1) / schedule.num_steps
    return [schedule.at(np.float32(t)) for t in (*times, last)]


def drawn():
    """A function that draws `NOISES` one after the other."""
    noises = iter(NOISES)
    return lambda: ops.convert_to_tensor(next(noises))


def ours(solver, schedule, marginals, denoise=MIXTURE, steps=None):
    """x after each step, from `START`; of a run of `steps` steps if more than there are."""
    for x, _ in walk(solver, schedule, marginals, START, denoise, drawn(), steps):
        yield numpy(x)


def theirs(scheduler, marginals, monkeypatch=None, denoise=MIXTURE, **options):
    """x after each step of diffusers' scheduler in float64, whose network has the same denoiser inside."""
    if monkeypatch is not None:
        noises = iter(NOISES[..., None].astype("float64"))
        module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(next(noises)))
    for name in {"sigmas", "alphas_cumprod"} & vars(scheduler).keys():
        setattr(scheduler, name, getattr(scheduler, name).double())
    prediction = PREDICTIONS[scheduler.config.get("prediction_type", "sample")]
    x = START.astype("float64")
    for m, timestep in zip(marginals, scheduler.timesteps, strict=False):
        x_hat = numpy(denoise(ops.convert_to_tensor(x, "float32"), m)).astype("float64")
        m = Marginal(*(numpy(v).astype("float64") for v in m))
        a, b = prediction.coefficients(m)
        output = torch.tensor(a * x_hat + b * noise_of(x, x_hat, m))[..., None]
        x = scheduler.step(output, timestep, torch.tensor(x)[..., None], **options).prev_sample.numpy()[..., 0]
        yield x


def difference(a, b):
    """The largest difference at any step, relative to the largest number of that step."""
    pairs = list(zip(a, b, strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in pairs])


# UniPC

ALL = list(range(20))
UNIPC = [
    (1, {}),
    (2, {}),
    (3, {}),
    (3, {"timestep_spacing": "leading", "steps_offset": 1}),
    (3, {"timestep_spacing": "trailing"}),
    (3, {"prediction_type": "sample", "use_karras_sigmas": True}),
    (2, {"prediction_type": "v_prediction", "use_exponential_sigmas": True}),
    (3, {"prediction_type": "v_prediction", "use_beta_sigmas": True}),
    (2, {"disable_corrector": ALL}),
    (3, {"disable_corrector": ALL, "use_karras_sigmas": True}),
    (3, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]
ABOVE_ZERO = [
    (2, {"solver_type": "bh1"}),
    (3, {"solver_type": "bh1", "timestep_spacing": "leading", "steps_offset": 1}),
    (2, {"solver_type": "bh1", "disable_corrector": ALL}),
    (1, {"predict_x0": False}),
    (3, {"predict_x0": False}),
    (2, {"predict_x0": False, "solver_type": "bh1", "prediction_type": "sample"}),
    (3, {"lower_order_final": False}),
    (2, {"lower_order_final": False, "predict_x0": False}),
]


def unipc_pair(order, options, steps, denoise=MIXTURE, guide=None):
    """(ours, theirs): x after each step."""
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=order, **options)
    scheduler.set_timesteps(steps)
    solver = UniPC(
        order,
        options.get("solver_type", "bh2"),
        "disable_corrector" not in options,
        "data" if options.get("predict_x0", True) else "noise",
        options.get("lower_order_final", True),
    )
    flow = options.get("use_flow_sigmas", False)
    schedule = schedules.Rectified(1e-8) if flow else schedules.LinearBeta()
    marginals = at_sigmas(schedule, scheduler.sigmas, flow)
    guided = guide(denoise) if guide else denoise
    return list(ours(solver, schedule, marginals, guided)), list(theirs(scheduler, marginals, denoise=denoise))


@pytest.mark.parametrize(("order", "options"), UNIPC, ids=repr)
@pytest.mark.parametrize("steps", [1, 8])
def test_unipc(order, options, steps):
    assert difference(*unipc_pair(order, options, steps)) < 1e-4


@pytest.mark.parametrize(("order", "options"), ABOVE_ZERO, ids=repr)
def test_unipc_that_ends_above_zero(order, options):
    assert difference(*unipc_pair(order, {**options, "final_sigmas_type": "sigma_min"}, 8)) < 1e-4


@pytest.mark.parametrize(
    "options", [{"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}], ids=repr
)
def test_unipc_that_ends_at_zero(options):
    """There diffusers' x is NaN or infinite: its log-SNR is infinite at sigma = 0. Ours is 40.

    It happens in its last step of order 1 too: with bh1 B = h, with noise prediction e^h, are infinite, times 0.
    """
    a, b = unipc_pair(2, options, 8)
    assert difference(a[:-1], b[:-1]) < 1e-4
    assert not np.any(np.isfinite(b[-1]))
    # A polynomial of order 2 is extrapolated over all of the last step, which is why the order falls by default.
    assert np.abs(a[-1]).max() < (3.0 if options.get("lower_order_final", True) else 30.0)


def test_unipc_with_dynamic_thresholding():
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.4, "sample_max_value": 5.0}
    pair = unipc_pair(3, options, 6, lambda x, m: 3.0 * MIXTURE(x, m), DynamicThreshold(0.4, 5.0))
    assert difference(*pair) < 1e-4


# SA-Solver

SA = [
    (2, 2, 1.0, {}),
    (1, 1, 1.0, {}),
    (3, 3, 0.0, {}),
    (3, 3, 1.0, {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    (2, 3, 0.6, {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1}),
    (3, 1, 0.3, {"lower_order_final": False}),
    (3, 3, Within(1.0, 0.2005, 0.8015), {}),
    (3, 3, 0.5, {"use_karras_sigmas": True}),
    (2, 3, 1.0, {"use_exponential_sigmas": True, "lower_order_final": False}),
]


def sa_pair(predictor, corrector, tau, options, steps, monkeypatch):
    """Their tau is a function of the index i; theirs by default is 1 for 200 <= i <= 800, and t = (i + 1) / 1000.

    Their last step under Karras' sigmas and their like has length 0: it asks the network and throws the answer away,
    and the sample keeps noise of size sigma_min. It is left out.
    """
    function = None if isinstance(tau, Within) else lambda _: tau
    scheduler = diffusers.SASolverScheduler(
        predictor_order=predictor, corrector_order=corrector, tau_func=function, **options
    )
    scheduler.set_timesteps(steps)
    solver = SASolver(tau, predictor, corrector, options.get("lower_order_final", True), "bh1")
    schedule = schedules.LinearBeta()
    marginals = at_sigmas(schedule, scheduler.sigmas)
    if scheduler.sigmas[-1] == scheduler.sigmas[-2]:
        marginals = marginals[:-1]
    a = ours(solver, schedule, marginals, steps=steps)
    return difference(a, theirs(scheduler, marginals[:-1], monkeypatch))


@pytest.mark.parametrize(("predictor", "corrector", "tau", "options"), SA, ids=repr)
@pytest.mark.parametrize("steps", [2, 8])
def test_sa_solver(predictor, corrector, tau, options, steps, monkeypatch):
    assert sa_pair(predictor, corrector, tau, options, steps, monkeypatch) < 1e-4


# Distilled networks


def lcm_pair(options, steps, monkeypatch, guide=None):
    scheduler = diffusers.LCMScheduler(**options)
    scheduler.set_timesteps(steps)
    schedule = schedules.ScaledLinearBeta()
    marginals = at_indices(schedule, scheduler.timesteps)
    solver = LCM(scaling=options.get("timestep_scaling", 10.0))
    a = ours(solver, schedule, marginals, guide(MIXTURE) if guide else MIXTURE)
    return difference(a, theirs(scheduler, marginals, monkeypatch))


@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}, {"timestep_scaling": 0.01}], ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_lcm(options, steps, monkeypatch):
    assert lcm_pair(options, steps, monkeypatch) < 1e-4


def test_lcm_clips(monkeypatch):
    assert lcm_pair({"clip_sample": True, "clip_sample_range": 0.4}, 4, monkeypatch, Clip(0.4)) < 1e-4


def tcd_pair(gamma, options, steps, monkeypatch):
    """Their s is floor((1 - gamma) i), ours (1 - gamma) t: the same where (1 - gamma) (i + 1) is whole and gamma < 1.

    So it is on their default grid, whose i + 1 are multiples of 20. Their last step goes to i = 0, not to t = 0, and
    so leaves noise of size 0.03.
    """
    scheduler = diffusers.TCDScheduler(**options)
    scheduler.set_timesteps(steps)
    schedule = schedules.ScaledLinearBeta()
    marginals = at_indices(schedule, scheduler.timesteps, 1 / schedule.num_steps)
    # The last step begins and ends at whole indices; where s is 0 in theirs, it is i = 0.
    a = list(ours(TCD(gamma), schedule, marginals))[:-1]
    a += list(ours_last(schedule, marginals, a))
    return difference(a, theirs(scheduler, marginals, monkeypatch, eta=gamma))


def ours_last(schedule, marginals, before):
    """The last step, from the x before it: DDIM's, to where their `s` and `then` are both i = 0."""
    ((x, _),) = walk(DDIM(), schedule, marginals[-2:], before[-1] if before else START)
    yield numpy(x)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}], ids=repr)
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_tcd(gamma, options, steps, monkeypatch):
    assert tcd_pair(gamma, options, steps, monkeypatch) < 1e-4


def consistency_pair(steps, monkeypatch):
    """Theirs applies the paper's boundary scalings to the network's raw output, and clips: both are in our denoiser."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(steps)
    scheduler.is_scale_input_called = True
    schedule = Exploding()
    marginals = at_sigmas(schedule, scheduler.sigmas)

    def function(x, m):
        c_skip = 0.25 / ((m.sigma - 0.002) ** 2 + 0.25)
        c_out = 0.5 * (m.sigma - 0.002) / ops.sqrt(m.sigma**2 + 0.25)
        return c_skip * x + c_out * MIXTURE(x, m)

    a = ours(Consistency(0.002), schedule, marginals, Clip(1.0)(function))
    return difference(a, theirs(scheduler, marginals, monkeypatch))


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_consistency(steps, monkeypatch):
    assert consistency_pair(steps, monkeypatch) < 1e-4
