"""Pipelines of diffusers, made and saved by it, give the same image in kdiff from the same noise."""

import ast
import importlib
import inspect
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel
from kdiff.denoisers import Denoiser, Given
from kdiff.interop import diffusers as interop
from kdiff.interop import schedulers, transformers
from kdiff.interop.files import read_json, write_json
from kdiff.interop.foreign import FOREIGN
from kdiff.interop.unet_keys import UNET_2D, UNET_2D_CONDITION
from tests.test_interop_networks_reference import DDPM, SIZE, SMALL, SMALL_DIT, normal, one_thread, perturbed  # noqa: F401
from tests.toys import walk

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers mixes NumPy 2 and tensors
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-3
STEPS = 10
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LATENT = {**TABLE, "clip_sample": False, "set_alpha_to_one": False}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_trailing": ("DDIMScheduler", {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}),
    "ddim_latents": ("DDIMScheduler", LATENT),
    "ddim_velocity": ("DDIMScheduler", {**LATENT, "prediction_type": "v_prediction"}),
    "ddim_data": ("DDIMScheduler", {"prediction_type": "sample"}),
    "ddim_zero_snr": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "ddim_threshold": ("DDIMScheduler", {"thresholding": True, "clip_sample": False, "sample_max_value": 2.0}),
    "ddpm": ("DDPMScheduler", {}),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample_range": 2.0}),
    "ddpm_sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid", "timestep_spacing": "trailing"}),
    "pndm": ("PNDMScheduler", {**TABLE, "skip_prk_steps": True}),
    "dpm": ("DPMSolverMultistepScheduler", {**TABLE, "timestep_spacing": "leading"}),
    "dpm_linspace": ("DPMSolverMultistepScheduler", {}),
    "dpm_trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "solver_type": "heun"}),
    "dpm_noise": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpm_zero_snr": (
        "DPMSolverMultistepScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "dpm_order_3_long": ("DPMSolverMultistepScheduler", {**TABLE, "solver_order": 3}),
    "dpm_noise_long": (
        "DPMSolverMultistepScheduler",
        {**TABLE, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "unipc": ("UniPCMultistepScheduler", TABLE),
    "deis": ("DEISMultistepScheduler", TABLE),
    "euler": ("EulerDiscreteScheduler", {**TABLE, "timestep_spacing": "leading"}),
    "euler_linspace": ("EulerDiscreteScheduler", TABLE),
    "euler_few": ("EulerDiscreteScheduler", {"num_train_timesteps": 25, "beta_end": 0.5}),
    "euler_karras": ("EulerDiscreteScheduler", {**TABLE, "use_karras_sigmas": True}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {**TABLE, "timestep_spacing": "trailing"}),
    "heun": ("HeunDiscreteScheduler", {**TABLE, "timestep_spacing": "trailing"}),
    "lms": ("LMSDiscreteScheduler", {**TABLE, "timestep_spacing": "trailing"}),
    "flow_matching": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


def run_theirs(network, scheduler, x, steps=STEPS, **arguments):
    """diffusers' own loop."""
    scheduler.set_timesteps(steps)
    x = torch.tensor(x.transpose(0, 3, 1, 2)) * start_of(scheduler)
    channels = x.shape[1]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        with torch.no_grad():
            output = network(scaled, t.expand(len(x)), **arguments).sample
        if "variance_type" not in scheduler.config or scheduler.config.variance_type != "learned_range":
            output = output[:, :channels]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x.numpy().transpose(0, 2, 3, 1)


def start_of(scheduler):
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) if "shift" not in scheduler.config else 1.0


def run_ours(model, scheduler, x, noises, steps=STEPS, **conditions):
    """kdiff's loop, with the noise of diffusers' calls; x begins on kdiff's scale."""
    sampler = model.sampler.clone(steps=steps)
    times = sampler.times(model.schedule).astype("float32")
    start = model.schedule.at(times[0])
    sigma = start_of(scheduler)
    on_its_scale = float(ops.convert_to_numpy(start.alpha)) if sigma > 1.0 else 1.0
    x = ops.convert_to_tensor((x * sigma * on_its_scale).astype("float32"))

    answer = partial(model._answer, True, model.schedule)
    denoise = Denoiser(answer, Given({name: ops.convert_to_tensor(rows) for name, rows in conditions.items()}))
    for guidance in sampler.guidance:
        denoise = guidance(denoise)
    marginals, draws = [model.schedule.at(t) for t in times], map(ops.convert_to_tensor, noises)
    *_, (x, _) = walk(sampler.solver, model.schedule, marginals, x, denoise, lambda: next(draws))
    return ops.convert_to_numpy(x) / (float(ops.convert_to_numpy(marginals[-1].alpha)) if sigma > 1.0 else 1.0)


def draws_of(monkeypatch, noises):
    """diffusers draws these, call after call."""
    given = iter(noises)

    def randn(shape, **options):
        return torch.tensor(next(given).transpose(0, 3, 1, 2))

    for name in ("ddpm", "ddim", "euler_ancestral_discrete", "euler_discrete", "flow_match_euler_discrete"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", randn, raising=False)
    for name in ("ddpm", "ddim"):
        module = importlib.import_module(f"diffusers.pipelines.{name}.pipeline_{name}")
        monkeypatch.setattr(module, "randn_tensor", randn)


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """diffusers' network and ours."""
    folder = tmp_path_factory.mktemp("unet")
    unet = perturbed(diffusers.UNet2DModel(**SMALL, **DDPM))
    unet.save_pretrained(folder)
    return unet, interop.load(folder)


def check(request, given, wanted):
    difference = np.abs(given - wanted).max() / max(1.0, np.abs(wanted).max())
    print(f"DIFFERENCE {request.node.name} {difference:.1e} of {np.abs(wanted).max():.1f}")
    assert difference < TOLERANCE


# Of what other tests run on every backend: a grid, orders, an end.
ONCE = ("dpm_zero_snr", "dpm_order_3_long", "dpm_noise_long", "euler_few")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.once] * (n in ONCE)) for n in SCHEDULERS])
def test_scheduler(request, name, unets, tmp_path, monkeypatch):
    kind, config = SCHEDULERS[name]
    theirs, ours = unets
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.save_pretrained(tmp_path)
    process = schedulers.process(read_json(tmp_path / "scheduler_config.json"), tmp_path)
    model = DiffusionModel(ours, **process._asdict(), ema=None)
    model.build((None, SIZE, SIZE, 3))
    x, noises = normal(2, SIZE, SIZE, 3), [normal(2, SIZE, SIZE, 3, seed=10 + i) for i in range(2 * STEPS)]
    draws_of(monkeypatch, noises)
    steps = 16 if name.endswith("long") else STEPS  # from 15 on diffusers does not lower the order at the end
    wanted = run_theirs(theirs, scheduler, x, steps)
    check(request, run_ours(model, scheduler, x, noises, steps), wanted)


CLASSES = {**{name: kind.keys for name, kind in schedulers.KINDS.items()}, "UNet2DModel": UNET_2D}
CLASSES |= {"UNet2DConditionModel": UNET_2D_CONDITION, "DiTTransformer2DModel": transformers.DIT}
CLASSES |= {"Transformer2DModel": transformers.OLD_DIT}


@pytest.mark.once
@pytest.mark.parametrize("name", CLASSES)
def test_keys_and_defaults_are_those_of_diffusers(name, monkeypatch):
    if name == "DPMSolverSDEScheduler":  # which has no signature where torchsde is missing
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
        monkeypatch.setattr(diffusers, name, module.DPMSolverSDEScheduler)
    kind = getattr(diffusers, name, None) or getattr(diffusers.schedulers.deprecated, name)
    arguments = list(inspect.signature(kind.__init__).parameters.values())[1:]
    theirs = {argument.name: argument.default for argument in arguments if argument.name != "kwargs"}
    ours = {key: CLASSES[name][key].default for key in CLASSES[name] if key != "set_alpha_to_zero"}  # one of `kwargs`
    assert ours == {key: theirs[key] for key in ours}
    assert name == "Transformer2DModel" or ours.keys() == theirs.keys()


@pytest.mark.once
def test_keys_of_all_schedulers_are_known():
    names = set()
    for file in Path(diffusers.schedulers.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
                made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
                names |= {argument.arg for one in made for argument in one.args.args[1:]}
    assert names <= FOREIGN


@pytest.mark.once
@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_pipeline(request, kind, tmp_path, monkeypatch):
    """Of pixels, as it is saved, against its own `__call__`, which clips; then back to diffusers."""
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=40)
    pipeline = getattr(diffusers, f"{kind}Pipeline")
    theirs = pipeline(perturbed(diffusers.UNet2DModel(**SMALL, **DDPM)), scheduler)
    theirs.save_pretrained(tmp_path / "theirs")
    model = interop.load(tmp_path / "theirs")
    wanted = images_of(theirs, monkeypatch)
    x, noises = normal(2, SIZE, SIZE, 3), [normal(2, SIZE, SIZE, 3, seed=10 + i) for i in range(STEPS)]
    check(request, np.clip(run_ours(model, scheduler, x, noises), -1, 1), wanted)
    interop.save(model, tmp_path / "ours")
    check(request, images_of(pipeline.from_pretrained(tmp_path / "ours"), monkeypatch), wanted)


def images_of(pipeline, monkeypatch):
    """In [-1, 1], of the noise that `test_pipeline` has."""
    pipeline.set_progress_bar_config(disable=True)
    noises = [normal(2, SIZE, SIZE, 3), *(normal(2, SIZE, SIZE, 3, seed=10 + i) for i in range(STEPS))]
    draws_of(monkeypatch, noises)
    return 2.0 * pipeline(batch_size=2, num_inference_steps=STEPS, output_type="np").images - 1.0


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_dit(request, kind, tmp_path, monkeypatch):
    """Of latents with a class and a learned variance, which DDIM has no use for."""
    config = {"num_train_timesteps": 1000, "clip_sample": False}
    config |= {"variance_type": "learned_range"} if kind == "DDPMScheduler" else {}
    scheduler = getattr(diffusers, kind)(**config)
    transformer = perturbed(diffusers.DiTTransformer2DModel(**SMALL_DIT))
    transformer.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    names = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", kind], "vae": []}
    write_json(tmp_path / "model_index.json", {"_class_name": "DiTPipeline", **names})
    model = interop.load(tmp_path)
    x, labels = normal(2, SIZE, SIZE, 4), np.array([1, 10])
    noises = [normal(2, SIZE, SIZE, 4, seed=10 + i) for i in range(STEPS)]
    draws_of(monkeypatch, noises)
    wanted = run_theirs(transformer, scheduler, x, class_labels=torch.tensor(labels))
    check(request, run_ours(model, scheduler, x, noises, label=labels), wanted)
    assert model.sample(2, steps=2, label=labels).shape == (2, SIZE, SIZE, 4)
