"""The classic solvers against diffusers, step by step: the same sigmas, noise and denoiser.

The denoiser is the exact one of a mixture, evaluated by kdiff for both, and its answer is given to diffusers as what
its scheduler is set to expect: noise ("epsilon"), v or data ("sample"). The kdiff grid is the scheduler's own sigmas.
All is compared in z = x / alpha.
"""

import itertools

import numpy as np
import pytest
from keras import ops

from kdiff import backend, schedules
from kdiff.denoisers import Denoiser
from kdiff.interop.scheduler_tabled import WARMUPS
from kdiff.solvers.multistep import DEIS, IPNDM, LMS
from kdiff.solvers.runge_kutta import DPM2, DPM2Ancestral, Euler, EulerAncestral, Heun
from tests.toys import MIXTURE, numpy, walk

pytestmark = [
    pytest.mark.once,
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

VP, FLOW = schedules.ScaledLinearBeta(), schedules.Rectified()
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOLERANCE = 5e-5
GRIDS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]
PREDICTIONS = [{"prediction_type": kind} for kind in ("epsilon", "v_prediction", "sample")]
# Each grid with one prediction, and each prediction with one grid.
SETTINGS = [*GRIDS, *({**GRIDS[2], **prediction} for prediction in PREDICTIONS[1:])]
WITHOUT_SAMPLE = SETTINGS[:-1]  # schedulers that do not know how to be told the data


def name(setting):
    return "-".join(str(value) if isinstance(value, str) else key for key, value in setting.items())


def noise_of_step(step):
    return torch.randn((16, 2), generator=torch.Generator().manual_seed(step))


def start(sigma):
    generator = np.random.default_rng(0)
    return (0.5 * generator.normal(size=(16, 2)) + float(sigma) * generator.normal(size=(16, 2))).astype("float32")


def marginal(schedule, sigma):
    return schedule.at(np.float32(0.0)) if sigma == 0 else schedule.at_log_snr(np.float32(-2 * np.log(float(sigma))))


def x_hat_of(z, sigma, schedule=VP):
    """The denoiser's answer at z = x / alpha, float32."""
    m = marginal(schedule, sigma)
    return numpy(MIXTURE(m.alpha * ops.convert_to_tensor(np.asarray(z, "float32")), m))


def answer(z, sigma, kind="epsilon"):
    """What a network would say: the noise, v or the data, for a variance preserving schedule."""
    z, sigma = np.asarray(z, "float32"), np.float32(sigma)
    x_hat = x_hat_of(z, sigma)
    noise = (z - x_hat) / sigma
    alpha = 1 / np.sqrt(1 + sigma**2)
    return torch.tensor({"epsilon": noise, "v_prediction": alpha * (noise - sigma * x_hat), "sample": x_hat}[kind])


def run(solver, sigmas, z, schedule=VP, steps=None):
    """kdiff's z after every step along these sigmas, which are sigma / alpha; `steps`, if it is to think of more."""
    marginals = [marginal(schedule, sigma) for sigma in sigmas]
    x, draws = marginals[0].alpha * ops.convert_to_tensor(z), map(noise_of_step, itertools.count())

    def noise():
        return ops.convert_to_tensor(next(draws).numpy())

    steps = walk(solver, schedule, marginals, x, noise=noise, steps=steps)
    for (y, _), then in zip(steps, marginals[1:], strict=True):
        yield numpy(y) / float(then.alpha)


def compare(ours, theirs):
    """The largest difference of any step, relative to the largest value there."""
    differences = [
        np.abs(a - np.asarray(b)).max() / np.abs(np.asarray(b)).max() for a, b in zip(ours, theirs, strict=True)
    ]
    assert max(differences) < TOLERANCE, differences


def one_call(scheduler, z, kind, raised=None, random=False, **options):
    """z after every step of a scheduler with one call a step; `raised(z, step)` is where the network is to be asked."""
    z = torch.tensor(z)
    for step, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(z, t)
        at = raised(z, step) if raised else (z, scheduler.sigmas[step])
        generator = {"generator": torch.Generator().manual_seed(step)} if random else {}
        z = scheduler.step(answer(*at, kind), t, z, return_dict=False, **generator, **options)[0]
        yield z.numpy()


def two_calls(scheduler, z, kind, sigma_of, random=False):
    """z after every step of a scheduler with two calls a step, and one in the step to sigma = 0."""
    z = torch.tensor(z)
    for call, t in enumerate(scheduler.timesteps):
        options = {"generator": torch.Generator().manual_seed(call // 2)} if random else {}
        scheduler.scale_model_input(z, t)
        z = scheduler.step(answer(z, sigma_of(call), kind), t, z, return_dict=False, **options)[0]
        if call % 2 or call == len(scheduler.timesteps) - 1:
            yield z.numpy()


def kind_of(setting):
    return setting.get("prediction_type", "epsilon")


def scheduler_of(kind, setting, steps=8, **more):
    scheduler = kind(**TABLE, **setting, **more)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_euler(setting):
    scheduler = scheduler_of(diffusers.EulerDiscreteScheduler, setting)
    z = start(scheduler.sigmas[0])
    compare(run(Euler(), scheduler.sigmas, z), one_call(scheduler, z, kind_of(setting)))


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_euler_with_churn(kind):
    """diffusers asks the network before it raises sigma, and EDM (algorithm 2) after: asked after here, for both.

    With v, diffusers turns the answer into data with the sigma from before as well, and no answer would be right.
    """
    scheduler = scheduler_of(diffusers.EulerDiscreteScheduler, {"prediction_type": kind, "use_karras_sigmas": True})
    churn = {"s_churn": 3.0, "s_min": 0.1, "s_max": 5.0, "s_noise": 1.05}

    def raised(z, step):
        sigma = float(scheduler.sigmas[step])
        gamma = min(3.0 / 8, np.sqrt(2.0) - 1) if 0.1 <= sigma <= 5.0 else 0.0
        up = sigma * (1 + gamma)
        return z + 1.05 * np.sqrt(up**2 - sigma**2) * noise_of_step(step), up

    z = start(scheduler.sigmas[0])
    options = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.05, "random": True}
    compare(run(Euler(**churn), scheduler.sigmas, z), one_call(scheduler, z, kind, raised, **options))


def edm_answer(z, sigma, sigma_data=0.5):
    """F such that x_hat = c_skip z + c_out F (Karras et al. 2022, table 1)."""
    z, sigma = np.asarray(z, "float32"), np.float32(sigma)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    return torch.tensor((x_hat_of(z, sigma) - c_skip * z) / c_out)


@pytest.mark.parametrize("churn", [0.0, 2.0])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_euler(spacing, churn):
    """With churn, the network is asked at the raised sigma, as of `test_euler_with_churn`."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=80.0, sigma_schedule=spacing)
    scheduler.set_timesteps(10)
    first = start(scheduler.sigmas[0])

    def theirs():
        z = torch.tensor(first)
        for step, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(z, t)
            sigma = float(scheduler.sigmas[step])
            up = sigma * (1 + min(churn / 10, np.sqrt(2.0) - 1))
            raised = z + np.sqrt(up**2 - sigma**2) * noise_of_step(step)
            generator = torch.Generator().manual_seed(step)
            options = {"s_churn": churn, "generator": generator, "return_dict": False}
            z = scheduler.step(edm_answer(raised, up), t, z, **options)[0]
            yield z.numpy()

    compare(run(Euler(s_churn=churn), scheduler.sigmas, first), theirs())


@pytest.mark.parametrize("setting", [s for s in WITHOUT_SAMPLE if "timestep_spacing" in s], ids=name)
def test_euler_ancestral(setting):
    """The scheduler has no Karras or exponential sigmas."""
    scheduler = scheduler_of(diffusers.EulerAncestralDiscreteScheduler, setting)
    z = start(scheduler.sigmas[0])
    theirs = one_call(scheduler, z, kind_of(setting), random=True)
    compare(run(EulerAncestral(), scheduler.sigmas, z), theirs)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_heun(setting):
    scheduler = scheduler_of(diffusers.HeunDiscreteScheduler, setting)
    z, sigmas = start(scheduler.sigmas[0]), _once(scheduler.sigmas)
    theirs = two_calls(scheduler, z, kind_of(setting), lambda call: scheduler.sigmas[call])
    compare(run(Heun("ratio"), sigmas, z), theirs)


def _once(sigmas):
    """Without the repetitions that count calls."""
    return [sigma for sigma, _ in itertools.groupby(np.asarray(sigmas))]


@pytest.mark.parametrize("setting", WITHOUT_SAMPLE, ids=name)
def test_dpm2(setting):
    scheduler = scheduler_of(diffusers.KDPM2DiscreteScheduler, setting)
    z, sigmas = start(scheduler.sigmas[0]), _once(scheduler.sigmas)

    def sigma_of(call):
        return (scheduler.sigmas_interpol if call % 2 else scheduler.sigmas)[call]

    compare(run(DPM2("ratio"), sigmas, z), two_calls(scheduler, z, kind_of(setting), sigma_of))


@pytest.mark.parametrize("setting", WITHOUT_SAMPLE, ids=name)
def test_dpm2_ancestral(setting):
    scheduler = scheduler_of(diffusers.KDPM2AncestralDiscreteScheduler, setting)
    z, sigmas = start(scheduler.sigmas[0]), _once(scheduler.sigmas)

    def sigma_of(call):
        return scheduler.sigmas_interpol[call - 1] if call % 2 else scheduler.sigmas[call]

    theirs = two_calls(scheduler, z, kind_of(setting), sigma_of, random=True)
    compare(run(DPM2Ancestral(), sigmas, z), theirs)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_lms(setting):
    scheduler = scheduler_of(diffusers.LMSDiscreteScheduler, setting)
    z = start(scheduler.sigmas[0])
    compare(run(LMS(), scheduler.sigmas, z), one_call(scheduler, z, kind_of(setting)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_of_lower_order(order):
    scheduler = scheduler_of(diffusers.LMSDiscreteScheduler, GRIDS[2])
    z = start(scheduler.sigmas[0])
    theirs = one_call(scheduler, z, "epsilon", order=order)
    compare(run(LMS(order), scheduler.sigmas, z), theirs)


def deis(setting, order, steps, lower_final, solver):
    """(kdiff's, diffusers') steps. diffusers' x is on the schedule's scale, and its run ends at its first sigma."""
    scheduler = scheduler_of(
        diffusers.DEISMultistepScheduler, setting, steps, solver_order=order, lower_order_final=lower_final
    )
    sigmas = scheduler.sigmas.numpy()
    z = start(sigmas[0])
    # On a Karras or exponential grid the last sigma is there twice, and the last step goes nowhere.
    count = steps if sigmas[-1] < sigmas[-2] else steps - 1

    def theirs():
        x = torch.tensor(z / np.sqrt(1 + sigmas[0] ** 2))
        for step, t in enumerate(scheduler.timesteps[:count]):
            output = answer(x.numpy() * np.sqrt(1 + sigmas[step] ** 2), sigmas[step], kind_of(setting))
            x = scheduler.step(output, t, x, return_dict=False)[0]
            yield x.numpy() * np.sqrt(1 + sigmas[step + 1] ** 2)

    return run(solver, sigmas[: count + 1], z, steps=steps), theirs()


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_deis(setting):
    compare(*deis(setting, 3, 8, True, DEIS()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_of_every_order(order):
    """Without the lower order at the end; diffusers has no order 4."""
    compare(*deis(GRIDS[2], order, 8, False, DEIS(order, lower_final=False)))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("warmup", ["prk", "plms"])
def test_pndm(warmup, spacing):
    """With noise as the network's answer.

    With v, diffusers combines past answers v and turns the combination into noise with the present x; the paper (eq.
    12) combines past noises, and so does kdiff.
    """
    steps, span = 10, 100
    scheduler = diffusers.PNDMScheduler(
        **TABLE, skip_prk_steps=warmup == "plms", set_alpha_to_one=True, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    bar = scheduler.alphas_cumprod.numpy().astype("float64")
    times = np.arange(steps)[::-1] * span + (span - 1 if spacing == "trailing" else 0)
    sigmas = np.append(np.sqrt(1 / bar[times] - 1), 0.0)
    if spacing == "trailing":
        # diffusers subtracts `span` from the last time, 99, finds -1, and takes alpha = 1 there: t = 0, as is right.
        assert scheduler.timesteps[-1] == span - 1
    z = start(sigmas[0])
    first = z / np.sqrt(1 + sigmas[0] ** 2)

    def theirs():
        x = torch.tensor(first.astype("float32"))
        calls = 0
        # How many calls each step has: PRK has four in each of three steps, PLMS two in the first.
        counts = [4, 4, 4] if warmup == "prk" else [2]
        counts += [1] * (steps - len(counts))
        for step, count in enumerate(counts):
            for _ in range(count):
                t = scheduler.timesteps[calls]
                sigma = np.sqrt(1 / bar[int(t)] - 1)
                x = scheduler.step(answer(x.numpy() * np.sqrt(1 + sigma**2), sigma), t, x, return_dict=False)[0]
                calls += 1
            yield x.numpy() * np.sqrt(1 + sigmas[step + 1] ** 2)
        assert calls == len(scheduler.timesteps)

    # The middle of a step is in t, so the grid must be of times.
    marginals = [VP.at(np.float32((i + 1) / 1000)) for i in times] + [VP.at(np.float32(0.0))]

    def ours():
        solver = WARMUPS[warmup == "plms"]
        x = ops.convert_to_tensor(first.astype("float32"))
        state = solver.init(x, steps)
        # Op by op JAX would compile the condition in every step anew.
        denoise = Denoiser.of(MIXTURE)
        step = backend.fused(lambda x, now, then, state: solver.step(denoise, VP, x, now, then, None, state))
        for now, then in itertools.pairwise(marginals):
            x, _, state = step(x, now, then, state)
            yield numpy(x) / float(then.alpha)

    compare(ours(), theirs())


def test_ipndm():
    """diffusers' has a schedule of its own, sigma = `trained_betas`, variance preserving, and takes v.

    By default it begins at alpha = 0, where there is no log-SNR; here its sigma is a hair less than 1.
    """
    sigma = np.append(np.sin(np.linspace(0.97, 0.0, 11)[:-1] * np.pi / 2) ** 2, 0.0)
    scheduler = diffusers.IPNDMScheduler(trained_betas=sigma)
    scheduler.set_timesteps(10)
    alpha = np.sqrt(1 - sigma**2)
    sigmas = sigma / alpha
    z = start(sigmas[0])

    def theirs():
        x = torch.tensor((z * alpha[0]).astype("float32"))
        for step, t in enumerate(scheduler.timesteps):
            x = scheduler.step(answer(x.numpy() / alpha[step], sigmas[step], "v_prediction"), t, x).prev_sample
            yield x.numpy() / alpha[step + 1]

    compare(run(IPNDM(), sigmas, z), theirs())


def flow_answer(x, sigma):
    """noise - x_hat on the straight line, x = (1 - sigma) x_hat + sigma noise."""
    x_hat = x_hat_of(x / (1 - sigma), sigma / (1 - sigma), FLOW)
    return torch.tensor((x - x_hat) / np.float32(sigma))


@pytest.mark.parametrize("grid", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}], ids=name)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift, grid):
    """The sigmas are given.

    diffusers makes its own from a last sigma that is shifted already, and shifts again: with shift 3 and its 1,000
    steps a run ends at 9 / 1008 rather than 3 / 1002. That is of its grid, which kdiff's does not follow; given sigmas
    are shifted once.
    """
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **grid)
    scheduler.set_timesteps(sigmas=np.linspace(0.98, 0.1, 8))
    sigmas = scheduler.sigmas.numpy()
    if not grid:
        once = shift * 0.1 / (1 + (shift - 1) * 0.1)
        np.testing.assert_allclose(sigmas[-2], once, rtol=1e-5)
    x = (1 - sigmas[0]) * start(sigmas[0] / (1 - sigmas[0]))

    def theirs():
        y = torch.tensor(x)
        for step, t in enumerate(scheduler.timesteps):
            y = scheduler.step(flow_answer(y.numpy(), sigmas[step]), t, y, return_dict=False)[0]
            yield y.numpy() / (1 - sigmas[step + 1])

    ours = run(Euler(), sigmas / (1 - sigmas), x / (1 - sigmas[0]), FLOW)
    compare(ours, theirs())


def test_flow_match_heun():
    """Heun's in s = sigma / alpha is not Heun's in t, in which diffusers solves: they differ by a term of order 3.

    A step of either is the mean of two slopes; in t they are noise - x_hat. Written in x, with x_2 Euler's result,

        in t:  x_then = x + (t_then - t) (v + v_2) / 2,    in s:  z_then = z + (s_then - s) (n + n_2) / 2.

    On the same grid the difference falls as the square of the steps, as do the errors; the step to t = 0 is Euler's.
    """
    differences = []
    for steps in (20, 40):
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.sigma_max, scheduler.sigma_min = 0.9, 0.1  # its own begin at 1, where alpha is 0
        scheduler.set_timesteps(steps)
        sigmas = np.array(_once(scheduler.sigmas))
        x = (1 - sigmas[0]) * start(sigmas[0] / (1 - sigmas[0]))
        y = torch.tensor(x)
        for call, t in enumerate(scheduler.timesteps):
            y = scheduler.step(flow_answer(y.numpy(), scheduler.sigmas[call].numpy()), t, y, return_dict=False)[0]
        *_, z = run(Heun("ratio"), sigmas / (1 - sigmas), x / (1 - sigmas[0]), FLOW)
        differences.append(np.sqrt(np.mean((z - y.numpy()) ** 2)))
    assert differences[-1] < 4e-3
    np.testing.assert_allclose(np.log2(differences[-2] / differences[-1]), 2.0, atol=0.3)
