"""Each scheduler that is loaded makes of the same noise what diffusers makes, at 10, 15, 25 and 50 steps.

The network is a function, of data that is one of two Gaussians in each pixel: it knows its noise level by the label
alone, so that a label that is another one shows.
"""

import ast
import importlib
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from kdiff.denoisers import Denoiser
from kdiff.interop import schedulers
from kdiff.interop.multistep import BothWays
from kdiff.interop.solvers import DDIMInverted
from tests.toys import EAGER, mostly_once, numpy

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # and warns of its own names
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 4, 3)
STEPS = (10, 15, 25, 50) if EAGER else (10, 15)  # elsewhere each operation is compiled
TOLERANCE = 1e-4  # of float32, after 50 steps with noise; what rounding a label does is 1e-3


def normal(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype("float32")


def posterior(x, m, centre=0.6, std=0.25):
    """E[x | x_t]."""
    variance = (m.alpha * std) ** 2 + m.sigma**2
    tilt = ops.tanh(m.alpha * centre * x / variance)
    return (m.alpha * std**2 * x + m.sigma**2 * centre * tilt) / variance


def network(process, x, label):
    """The output for this input and label."""
    prediction = process.prediction
    m = marginal_of(process, ops.convert_to_tensor(label, "float32"))
    x = x / prediction.input_scale(m)
    x_hat = posterior(x, m)
    a, b = prediction.coefficients(m)
    return a * x_hat + b * (x - m.alpha * x_hat) / m.sigma


def marginal_of(process, label):
    """What the network takes a label for: the inverse of the time label."""
    schedule, kind = process.schedule, process.time_label
    kind = getattr(kind, "label", kind)
    if hasattr(kind, "scale") and type(kind).__name__ == "LogSNR":
        return schedule.at_log_snr(label / kind.scale)
    t = label / kind.scale if hasattr(kind, "scale") else (label + 1.0) / schedule.num_steps
    return schedule.at(ops.clip(t, 0.0, 1.0))


def theirs(scheduler, process, x, steps, noises, options):
    """diffusers' own loop; and by how much more than a normal one its first x is."""
    given = iter(noises)
    module = sys.modules[type(scheduler).__module__]

    def randn(shape, **_):
        return torch.tensor(next(given).transpose(0, 3, 1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", randn, raising=False)
        scheduler.set_timesteps(steps, **options)
        start = float(getattr(scheduler, "init_noise_sigma", 1.0))
        x = torch.tensor(x.transpose(0, 3, 1, 2)) * start
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = numpy(network(process, ops.convert_to_tensor(seen.numpy().transpose(0, 2, 3, 1)), float(t)))
            told = told_of(scheduler, t)
            x = scheduler.step(torch.tensor(output.transpose(0, 3, 1, 2)), t, x, **told)[0]
    return x.numpy().transpose(0, 2, 3, 1), start


def told_of(scheduler, t):
    """What pipelines tell a scheduler besides."""
    if isinstance(scheduler, diffusers.UnCLIPScheduler):
        later = scheduler.timesteps[scheduler.timesteps < t]
        return {"return_dict": False, "prev_timestep": later[0] if len(later) else None}
    return {"return_dict": False}


def ours(process, x, steps, noises, start):
    """kdiff's solver on kdiff's grid, from diffusers' beginning."""
    given, schedule, sampler = iter(noises), process.schedule, process.sampler.clone(steps=steps)
    times = sampler.times(schedule).astype("float32")
    if isinstance(sampler.solver, (BothWays, DDIMInverted)):
        sampler, times = sampler.inverse(), times[::-1]
    marginals = [schedule.sampled_at(t) for t in times]
    on_its_scale = float(marginals[0].alpha) if start > 1.0 else 1.0

    def denoise(x, m):
        label = process.time_label(schedule, m)
        output = network(process, x * process.prediction.input_scale(m), label)
        return process.prediction.denoise(output, x, m)

    denoise = Denoiser.of(denoise)
    for guidance in sampler.guidance:
        denoise = guidance(denoise)
    x = ops.convert_to_tensor((x * start * on_its_scale).astype("float32"))
    state = sampler.solver.init(x, len(marginals) - 1)
    for now, then in itertools.pairwise(marginals):
        x, _, state = sampler.solver.step(
            denoise, schedule, x, now, then, lambda: ops.convert_to_tensor(next(given)), state
        )
    return numpy(x) / (float(marginals[-1].alpha) if start > 1.0 else 1.0), len(marginals) - 1


def compare(config, steps, noise=1.0, **options):
    """The largest difference of the two, of their size, and how many steps ours took."""
    arguments = {name: value for name, value in config.items() if name != "_class_name"}
    scheduler = getattr(diffusers, config["_class_name"])(**arguments)
    process = schedulers.process(config, "file", tokens=options.pop("tokens", None))
    noises = [noise * normal(10 + i) for i in range(2 * steps + 2)]
    wanted, start = theirs(scheduler, process, normal(0), steps, noises, options)
    given, made = ours(process, normal(0), steps, noises, start)
    return np.abs(given - wanted).max() / max(1.0, np.abs(wanted).max()), made


def of(name, **options):
    """A configuration, and how it is called in the list of tests."""
    return {"_class_name": f"{name}Scheduler", **options}


def cases(*configs, everywhere=1):
    return pytest.mark.parametrize("config", mostly_once(list(configs), everywhere), ids=_words)


def _words(config):
    shown = {name: value for name, value in config.items() if name not in ("_class_name", *TABLE)}
    return "-".join([config["_class_name"].removesuffix("Scheduler"), *(f"{k}={v}" for k, v in shown.items())])


def check(config, steps=STEPS, tolerance=TOLERANCE, **options):
    for count in steps:
        difference, made = compare(config, count, **options)
        assert difference < tolerance, (count, difference)
        assert made == count


TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SKIP = {**TABLE, "skip_prk_steps": True}


@cases(
    of("DDIM", timestep_spacing="linspace"),
    of("DDIM", timestep_spacing="trailing"),
    of("DDIM", timestep_spacing="linspace", clip_sample=False, set_alpha_to_one=False),
    of("DDIM", set_alpha_to_one=False),  # its last step is of length 0, and clips
    of("DDIM", thresholding=True, clip_sample=False, sample_max_value=0.5),
)
def test_ddim_goes_even_steps_whatever_the_grid(config):
    check(config)


@pytest.mark.once
@cases(
    of("PNDM", prediction_type="v_prediction", **SKIP, steps_offset=1),
    of("PNDM", prediction_type="v_prediction"),
    of("PNDM", timestep_spacing="linspace", **SKIP),
    of("PNDM", timestep_spacing="linspace", prediction_type="v_prediction"),
    of("PNDM", timestep_spacing="trailing", **SKIP),
    of("PNDM", **SKIP),
    of("PNDM"),
)
def test_pndm_combines_outputs(config):
    check(config)


@pytest.mark.once
@cases(
    of("DDPM", timestep_spacing="trailing", variance_type="fixed_large"),
    of("DDPM", steps_offset=1, variance_type="fixed_large"),
    of("DDPM", timestep_spacing="linspace", variance_type="fixed_large"),
    of("DDPM", timestep_spacing="trailing", variance_type="fixed_small_log"),
)
def test_ddpm_adds_noise_in_its_last_step(config):
    check(config)


@pytest.mark.once
@cases(
    of("DDPM", beta_schedule="laplace"),
    of("DDPM", beta_schedule="laplace", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    of("DDPMParallel", beta_schedule="laplace", variance_type="fixed_large"),
    of("HeunDiscrete", beta_schedule="exp"),
)
def test_tables_of_a_few_classes(config):
    check(config)


ABOVE = {"final_sigmas_type": "sigma_min"}
KARRAS, EXPONENTIAL, LU, BETA = (
    {f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "lu_lambdas", "beta_sigmas")
)


@pytest.mark.once
@cases(
    of("DPMSolverMultistep", **TABLE, solver_order=3, lower_order_final=False),
    of("DPMSolverMultistep", **TABLE, **ABOVE, lower_order_final=False),
    of("DPMSolverMultistep", **TABLE, **ABOVE, solver_order=3),
    of("DPMSolverMultistep", **TABLE, **ABOVE, euler_at_final=True, solver_type="heun"),
    of("DPMSolverMultistep", **TABLE, **ABOVE, solver_order=3, euler_at_final=True, lower_order_final=False),
    of("DPMSolverMultistep", **TABLE, algorithm_type="sde-dpmsolver++", solver_order=3),
    of("DPMSolverMultistep", **TABLE, **ABOVE, algorithm_type="sde-dpmsolver", solver_order=2),
    of("DPMSolverMultistep", **TABLE, **ABOVE, algorithm_type="dpmsolver", solver_order=3, lower_order_final=False),
    of(
        "DPMSolverMultistep", **TABLE, **ABOVE, algorithm_type="deis", solver_type="logrho", variance_type="fixed_small"
    ),
    of("DEISMultistep", **TABLE, solver_order=3),
    of("DEISMultistep", **TABLE, solver_order=3, lower_order_final=False, solver_type="midpoint"),
    of("UniPCMultistep", **TABLE, disable_corrector=[0, 1, 4], solver_type="heun"),
    of("UniPCMultistep", **TABLE, **ABOVE, solver_order=3, lower_order_final=False),
)
def test_orders_at_the_end(config):
    check(config)


@pytest.mark.once
@cases(
    of("DPMSolverMultistep", **TABLE, **KARRAS),
    of("DPMSolverMultistep", **TABLE, **KARRAS, **ABOVE),
    of("DPMSolverMultistep", **TABLE, **EXPONENTIAL, solver_order=3),
    of("DPMSolverMultistep", **TABLE, **LU, **ABOVE, euler_at_final=True),
    of("UniPCMultistep", **TABLE, **KARRAS, **ABOVE),
    of("UniPCMultistep", **TABLE, **EXPONENTIAL, **ABOVE, solver_order=3),
    of("UniPCMultistep", **TABLE, **KARRAS, sigma_min=0.05, sigma_max=12.0),
    of("DEISMultistep", **TABLE, **KARRAS),
    of("DEISMultistep", **TABLE, **EXPONENTIAL),
    of("EulerDiscrete", **TABLE, **KARRAS, **ABOVE),
    of("EulerDiscrete", **TABLE, **EXPONENTIAL, sigma_min=0.05, sigma_max=12.0),
    of("EulerDiscrete", **TABLE, **BETA),
    of("HeunDiscrete", **KARRAS, clip_sample=True),
    everywhere=2,
)
def test_noise_levels_and_how_their_labels_are_rounded(config):
    check(config)


@pytest.mark.once
@cases(
    of("DPMSolverMultistep", **TABLE, **BETA),
    of("UniPCMultistep", **TABLE, **BETA, **ABOVE),
)
def test_quantiles_of_a_beta_distribution(config):
    """With 50 steps diffusers has two of them at one time step, and fails."""
    check(config, (10, 15, 25))


@pytest.mark.once
@cases(
    *(
        of("DPMSolverMultistep", lambda_min_clipped=-3.1, beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
        for spacing in ("linspace", "leading", "trailing")
    )
)
def test_the_noisiest_steps_left_out(config):
    """On "trailing" those of them are left out that are beyond, and the run is shorter."""
    for steps in STEPS:
        difference, made = compare(config, steps)
        assert difference < TOLERANCE
        assert made == steps - (config["timestep_spacing"] == "trailing" and steps == 50)


@pytest.mark.once
def test_a_last_step_of_length_zero_adds_noise_of_a_hair():
    """Of the noise, which goes as the root of the length: 2e-4, where diffusers adds none."""
    check(of("DPMSolverMultistep", **TABLE, **KARRAS, **ABOVE, algorithm_type="sde-dpmsolver"), (10,), 3e-4)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["KDPM2Discrete", "KDPM2AncestralDiscrete"])
def test_labels_of_dpm2(kind):
    """diffusers rounds the labels of Karras' times, not of those between. Here none is rounded: 1e-3 at most."""
    check(of(kind), (10, 25))
    check(of(kind, **KARRAS), (10, 25), 1e-3)


# --- classes


@pytest.mark.once
def test_each_class_loads_or_is_refused_with_its_reason():
    files = Path(diffusers.schedulers.__file__).parent.rglob("scheduling_*.py")
    nodes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    names = {node.name for node in nodes if node.name.endswith("Scheduler")}
    assert names - schedulers.KINDS.keys() == schedulers.REFUSED.keys()
    with pytest.raises(ValueError, match="kdiff does not support SCMScheduler: it is for Sana"):
        schedulers.process({"_class_name": "SCMScheduler"}, "file")


FEW = (1, 4, *STEPS)


@pytest.mark.once
@cases(
    of("LCM"),
    of("TCD"),
    of("LCM", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    of("LCM", clip_sample=True, timestep_scaling=0.01, original_inference_steps=100),
    of("TCD", prediction_type="v_prediction", clip_sample=True),
    everywhere=2,
)
def test_distilled(config):
    check(config, FEW)


@pytest.mark.once
@cases(
    of("DPMSolverSinglestep", **TABLE),
    of("DPMSolverSinglestep", **TABLE, **KARRAS, solver_order=3),
    of("DPMSolverSinglestep", **TABLE, **ABOVE, solver_type="heun", solver_order=3),
    of("DPMSolverSinglestep", **TABLE, **ABOVE, solver_type="heun"),
    of("DPMSolverSinglestep", **TABLE, **ABOVE, algorithm_type="dpmsolver", solver_order=3),
    of("DPMSolverSinglestep", **TABLE, algorithm_type="sde-dpmsolver++", solver_order=3),
    of("DPMSolverSinglestep", **TABLE, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun"),
    of("DPMSolverSinglestep", lambda_min_clipped=-3.1, beta_schedule="squaredcos_cap_v2"),
    of("DPMSolverSinglestep", **TABLE, solver_order=1),
)
def test_singlestep(config):
    check(config)


@pytest.mark.once
@cases(
    of("EDMEuler"),
    of("EDMEuler", sigma_schedule="exponential", prediction_type="v_prediction", sigma_max=20.0, **ABOVE),
    of("EDMDPMSolverMultistep"),
    of("EDMDPMSolverMultistep", sigma_schedule="exponential", solver_order=3, lower_order_final=False),
    of("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"),
    of("EulerDiscrete", **TABLE, **KARRAS, timestep_type="continuous", prediction_type="v_prediction"),
    of(
        "EulerDiscrete",
        **KARRAS,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        prediction_type="v_prediction",
    ),
)
def test_labels_by_the_noise_level(config):
    check(config)


@pytest.mark.once
@cases(of("CMStochasticIterative"), of("CMStochasticIterative", clip_denoised=False, sigma_max=20.0))
def test_consistency_models(config):
    check(config, (1, 2, 10, 15, 25, 40))


SHIFTED = {"shift": 3.0}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@cases(
    of("FlowMatchEulerDiscrete", **SHIFTED),
    of("FlowMatchHeunDiscrete", **SHIFTED),
    of("FlowMatchEulerDiscrete", **SHIFTED, **KARRAS),
    of("FlowMatchEulerDiscrete", **SHIFTED, **EXPONENTIAL),
    of("FlowMatchEulerDiscrete", **SHIFTED, **BETA),
    of("FlowMatchEulerDiscrete", shift_terminal=0.1),
    of("DPMSolverMultistep", **FLOW),
    of("DPMSolverMultistep", **FLOW, **ABOVE, solver_order=3),
    of("UniPCMultistep", **FLOW),
    of("UniPCMultistep", **FLOW, **ABOVE, solver_order=3),
    of("UniPCMultistep", **FLOW, shift_terminal=0.1),
    of("DEISMultistep", **FLOW),
    of("DPMSolverSinglestep", **FLOW),
    of("DPMSolverMultistep", use_flow_sigmas=True, flow_shift=2.0),
    everywhere=2,
)
def test_rectified_flow(config):
    check(config)


@pytest.mark.once
@cases(
    of("FlowMatchEulerDiscrete", stochastic_sampling=True),
    of("SASolver", **FLOW),
    of("FlowMatchLCM", shift=3.0, shift_terminal=0.1),
)
def test_rectified_flow_with_noise(config):
    """kdiff draws the schedule 1e-5 short at its ends, which the first estimate of the data feels."""
    check(config, tolerance=1e-3)


@pytest.mark.once
@cases(
    of("FlowMatchEulerDiscrete", use_dynamic_shifting=True),
    of("FlowMatchEulerDiscrete", use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.4),
    of("UniPCMultistep", **FLOW, use_dynamic_shifting=True),
    of("DPMSolverMultistep", **FLOW, use_dynamic_shifting=True),
)
def test_the_shift_is_by_the_number_of_tokens(config):
    mu = float(np.interp(1024, [256, 4096], [config.get("base_shift", 0.5), 1.15]))
    check(config, tokens=1024, mu=mu)


@pytest.mark.once
@cases(
    of("SASolver", **TABLE),
    of("SASolver", **TABLE, **KARRAS),
    of("SASolver", **TABLE, predictor_order=3, corrector_order=3, lower_order_final=False),
    of("SASolver", num_train_timesteps=100, beta_end=0.2),
    of("IPNDM"),
    of("DDIMInverse", clip_sample=False),
    of("DDIMInverse", prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1),
    of("DDIMInverse", timestep_spacing="trailing", prediction_type="v_prediction", set_alpha_to_zero=False),
    of("DDIMParallel"),
    of("DDPMParallel", variance_type="fixed_large"),
    everywhere=2,
)
def test_other_classes(config):
    check(config)


@pytest.mark.once
@cases(
    of("DPMSolverMultistepInverse", **TABLE),
    of("DPMSolverMultistepInverse", **TABLE, solver_order=3, euler_at_final=True, lower_order_final=False),
    of("DPMSolverMultistepInverse", **TABLE, solver_type="heun", timestep_spacing="leading", steps_offset=1),
    of("DPMSolverMultistepInverse", **TABLE, algorithm_type="dpmsolver", prediction_type="v_prediction"),
    of("DPMSolverMultistepInverse", lambda_min_clipped=-3.1, beta_schedule="squaredcos_cap_v2"),
    of("DPMSolverMultistepInverse", thresholding=True, solver_order=1, prediction_type="sample", **TABLE),
)
def test_to_noise_by_dpm_solver(config):
    check(config)


@pytest.mark.once
@cases(of("UnCLIP"), of("UnCLIP", prediction_type="sample", clip_sample_range=5.0))
def test_unclip(config):
    """diffusers takes 1 - (1 - r) for an r of 1e-7 in the first step, of which float32 leaves a digit."""
    check(config, tolerance=1e-3)


@pytest.mark.once
@cases(of("DPMSolverSDE"), of("DPMSolverSDE", **KARRAS, prediction_type="v_prediction"))
def test_dpm_solver_sde_but_for_its_noise(config, monkeypatch):
    """diffusers takes it from a Brownian path, by torchsde; kdiff draws it, of the same distribution. Here is none."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_: lambda *_: 0.0)
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", module.DPMSolverSDEScheduler)
    check(config, (10, 25), noise=0.0)


def test_score_sde(monkeypatch):
    """Its own two methods, a corrector's before a predictor's, as its pipeline calls them; no noise after the last."""
    options = {"correct_steps": 2, "snr": 0.1, "sigma_max": 40.0}
    scheduler = diffusers.ScoreSdeVeScheduler(**options)
    process = schedulers.process(of("ScoreSdeVe", **options), "file")
    for steps in (10, 25):
        noises = [normal(10 + i) for i in range(3 * steps)]
        given = iter(noises)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_sde_ve.randn_tensor",
            lambda *_, given=given, **__: torch.tensor(next(given).transpose(0, 3, 1, 2)),
        )

        def score(x, sigma):
            x = ops.convert_to_tensor(x.numpy().transpose(0, 2, 3, 1))
            return torch.tensor(numpy(network(process, x, np.log(float(sigma)))).transpose(0, 3, 1, 2))

        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)
        x = torch.tensor(normal(0).transpose(0, 3, 1, 2)) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            for _ in range(2):
                x = scheduler.step_correct(score(x, scheduler.sigmas[i]), x).prev_sample
            x, mean = scheduler.step_pred(score(x, scheduler.sigmas[i]), t, x, return_dict=False)
        wanted = mean.numpy().transpose(0, 2, 3, 1)
        found, _ = ours(process, normal(0), steps, noises, scheduler.init_noise_sigma)
        assert np.abs(found - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


@pytest.mark.once
def test_score_sde_of_preserved_variance(monkeypatch):
    """As its pipeline called it, whose images are without the last noise; in float64, for of 1 - exp(-B) float32 leaves
    three digits at the end.
    """
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_sde_vp")
    scheduler = module.ScoreSdeVpScheduler(beta_max=15.0)
    process = schedulers.process(of("ScoreSdeVp", beta_max=15.0), "file")
    for steps in STEPS:
        noises = [normal(10 + i) for i in range(steps)]
        given = iter(noises)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, given=given, **__: torch.tensor(next(given)))
        scheduler.set_timesteps(steps)
        x = torch.tensor(normal(0)).double()
        for t in scheduler.timesteps.double():
            output = numpy(network(process, ops.convert_to_tensor(x.numpy().astype("float32")), float(1999.0 * t)))
            x, mean = scheduler.step_pred(torch.tensor(output).double(), x, t)
        found, _ = ours(process, normal(0), steps, noises, 1.0)
        assert np.abs(found - mean.numpy()).max() < TOLERANCE * max(1.0, np.abs(mean.numpy()).max())


@pytest.mark.parametrize("scaler", [1.0, 0.5, 2.0])
@pytest.mark.once
def test_wuerstchen(scaler, monkeypatch):
    config = of("DDPMWuerstchen", scaler=scaler)
    scheduler = diffusers.DDPMWuerstchenScheduler(scaler=scaler)
    process = schedulers.process(config, "file")
    for steps in STEPS:
        noises = [normal(10 + i) for i in range(steps)]
        given = iter(noises)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm_wuerstchen.randn_tensor",
            lambda *_, given=given, **__: torch.tensor(next(given).transpose(0, 3, 1, 2)),
        )
        scheduler.set_timesteps(steps)
        x = torch.tensor(normal(0).transpose(0, 3, 1, 2))
        for t in scheduler.timesteps[:-1]:
            output = numpy(network(process, ops.convert_to_tensor(x.numpy().transpose(0, 2, 3, 1)), float(t)))
            x = scheduler.step(torch.tensor(output.transpose(0, 3, 1, 2)), t.expand(2), x).prev_sample
        made, count = ours(process, normal(0), steps, noises, 1.0)
        assert count == steps
        assert np.abs(made - x.numpy().transpose(0, 2, 3, 1)).max() < TOLERANCE
