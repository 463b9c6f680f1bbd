"""Schedulers of diffusers, without it: files alone, what they say there and back, and what is refused."""

import json

import numpy as np
import pytest

from kdiff import DiffusionModel, Sampler, schedules, times
from kdiff.interop import diffusers, grids, schedulers
from kdiff.interop.scheduler_saving import scheduler_config
from tests.toys import exact_denoiser, images, numpy, tiny_network

pytestmark = pytest.mark.once


def of(name, **options):
    return {"_class_name": f"{name}Scheduler", **options}


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CONFIGS = [
    of("DDPM", timestep_spacing="trailing", variance_type="fixed_large"),
    of("DDPM", beta_schedule="laplace", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    of("HeunDiscrete", beta_schedule="exp"),
    of("DDIM", timestep_spacing="linspace", thresholding=True, clip_sample=False, sample_max_value=0.5),
    of("PNDM", prediction_type="v_prediction", skip_prk_steps=True),
    of("DPMSolverMultistep", solver_order=3, use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    of("DPMSolverMultistep", euler_at_final=True, use_lu_lambdas=True, final_sigmas_type="sigma_min", solver_order=3),
    of("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", use_beta_sigmas=True, solver_order=3),
    of("DPMSolverMultistep", lambda_min_clipped=-3.1, beta_schedule="squaredcos_cap_v2"),
    of("DPMSolverMultistep", **FLOW),
    of("DPMSolverMultistep", **FLOW, final_sigmas_type="sigma_min"),
    of("UniPCMultistep", disable_corrector=[0, 2], use_karras_sigmas=True, sigma_min=0.05, sigma_max=12.0),
    of("UniPCMultistep", **FLOW, shift_terminal=0.1, solver_order=3),
    of("DEISMultistep", use_exponential_sigmas=True, solver_order=3),
    of("EulerDiscrete", use_karras_sigmas=True, sigma_min=0.05),
    of("EulerDiscrete", timestep_type="continuous", prediction_type="v_prediction", timestep_spacing="leading"),
    of("HeunDiscrete", clip_sample=True),
    of("LCM", original_inference_steps=100, timestep_scaling=1.0),
    of("TCD", prediction_type="v_prediction"),
    of("DPMSolverSinglestep", solver_order=3, solver_type="heun", algorithm_type="sde-dpmsolver++"),
    of("DPMSolverSDE", use_karras_sigmas=True),
    of("SASolver", predictor_order=3),
    of("DDIMInverse", clip_sample_range=2.0, set_alpha_to_one=False),
    of("DPMSolverMultistepInverse", solver_order=3, timestep_spacing="leading", steps_offset=1),
    of("DPMSolverMultistepInverse", lambda_min_clipped=-3.1, beta_schedule="squaredcos_cap_v2"),
    of("EDMEuler", sigma_max=20.0, rho=5.0, prediction_type="v_prediction"),
    of("EDMDPMSolverMultistep", sigma_schedule="exponential", solver_order=3, final_sigmas_type="sigma_min"),
    of("CMStochasticIterative", num_train_timesteps=18, clip_denoised=False),
    of("FlowMatchEulerDiscrete", shift=3.0, stochastic_sampling=True),
    of("FlowMatchEulerDiscrete", shift_terminal=0.1, use_karras_sigmas=True),
    of("FlowMatchHeunDiscrete", shift=2.0),
    of("IPNDM"),
    of("ScoreSdeVp", beta_max=15.0, num_train_timesteps=1000),
    of("UnCLIP", clip_sample_range=5.0),
    of("DDPMWuerstchen", scaler=2.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["_class_name"].removesuffix("Scheduler"))
def test_there_and_back(config, tmp_path):
    """By a file; what is read is what was written, and samples without an error."""
    process = schedulers.process(config, "file")
    diffusers.save_scheduler(process, tmp_path)
    again = diffusers.load_scheduler(tmp_path)
    assert again._replace(sampler=None) == process._replace(sampler=None)
    assert again.sampler.clone(steps=None) == process.sampler.clone(steps=None)
    x = again.sampler.clone(steps=5)(exact_denoiser(), again.schedule, (2, 3))
    assert np.all(np.isfinite(numpy(x)))


def test_every_class_is_tried():
    """But for aliases, and those that other tests save (test_interop)."""
    tried = {config["_class_name"].removesuffix("Scheduler") for config in CONFIGS}
    known = {name.removesuffix("Scheduler") for name in schedulers.KINDS}
    assert known - tried == {
        *("EulerAncestralDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DDIMParallel", "DDPMParallel", "ScoreSdeVe", "FlowMatchLCM"),
    }


def test_a_file_a_folder_and_a_pipeline(tmp_path):
    config = of("EulerDiscrete", timestep_spacing="trailing")
    wanted = schedulers.process(config, "file")
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config))
    for path in (file, file.parent, str(tmp_path)):
        assert diffusers.load_scheduler(path) == wanted
    diffusers.save_scheduler(wanted, tmp_path / "mine.json")
    assert diffusers.load_scheduler(tmp_path / "mine.json") == wanted
    with pytest.raises(ValueError, match="nothing: no such file"):
        diffusers.load_scheduler(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"`_class_name` must be one of .*LCMScheduler.*received: 'MyScheduler'"):
        schedulers.process({"_class_name": "MyScheduler"}, "file")
    with pytest.raises(ValueError, match=r"file: kdiff does not support RePaintScheduler: .*guidance\.Inpaint"):
        schedulers.process({"_class_name": "RePaintScheduler"}, "file")
    beyond = of("EulerDiscrete", use_karras_sigmas=True, sigma_max=700.0)
    with pytest.raises(ValueError, match=r"file: Karras: .* must lie in"):
        schedulers.process(beyond, "file")


def test_the_scheduler_of_a_model(tmp_path):
    model = DiffusionModel(
        tiny_network(), "linear_beta", "noise", time_label="index", sampler="dpm_solver_pp", ema=None
    )
    model.sampler = Sampler("dpm_solver_pp", grids.WithoutLast(times.Linspace()))
    diffusers.save_scheduler(model, tmp_path)
    again = diffusers.load_scheduler(tmp_path)
    assert (again.schedule, again.sampler) == (schedules.LinearBeta(), model.sampler)
    model.sampler = Sampler("adaptive")
    with pytest.raises(ValueError, match="diffusers has no scheduler with LinearBeta"):
        diffusers.save_scheduler(model, tmp_path)


def test_the_inverse_of_ddim_is_diffusers():
    """Data -> noise -> data, of a denoiser: first-order in the step both ways."""
    process = schedulers.process(of("DDIMInverse", clip_sample=False, timestep_spacing="trailing"), "file")
    sampler, x = process.sampler.clone(steps=200), np.float32([[0.3, -0.2], [0.7, 0.1]])
    noise = sampler.invert(exact_denoiser(), process.schedule, x)
    again = sampler(exact_denoiser(), process.schedule, (2, 2), x=noise)
    np.testing.assert_allclose(numpy(again), x, atol=0.02)


def test_the_inverse_of_dpm_solver_is_more_accurate():
    """Data -> noise -> data by orders 1 and 2, with the same times both ways; with noise there is none."""
    x, error = images(2, (4, 4, 1)), []
    for order in (1, 2):
        config = of("DPMSolverMultistepInverse", solver_order=order, beta_end=0.03)
        process = schedulers.process(config, "file")
        sampler = process.sampler.clone(steps=120)
        noise = sampler.invert(exact_denoiser(), process.schedule, x)
        again = sampler(exact_denoiser(), process.schedule, x.shape, x=noise)
        error.append(np.abs(numpy(again) - x).max())
    assert error[1] < 0.3 * error[0]
    with pytest.raises(ValueError, match=r"`algorithm_type` must be one of .*received: 'sde-dpmsolver\+\+'"):
        schedulers.process(of("DPMSolverMultistepInverse", algorithm_type="sde-dpmsolver++"), "file")


def test_labels_say_how_they_are_rounded():
    for key, rounding in {"use_karras_sigmas": "nearest", "use_exponential_sigmas": "down"}.items():
        label = schedulers.process(of("DPMSolverMultistep", **{key: True}), "file").time_label
        assert label == times.RoundedLabel("index", rounding)
        assert schedulers.process(of("EulerDiscrete", **{key: True}), "file").time_label == times.Index()


def test_orders_that_fall_do_not_depend_on_what_a_solver_ran_before():
    """Twice in a row, with other numbers of steps."""
    process = schedulers.process(of("DPMSolverMultistep", solver_order=3, lower_order_final=False), "file")
    first = [numpy(process.sampler.clone(steps=n)(exact_denoiser(), process.schedule, (2, 3))) for n in (6, 20, 6)]
    np.testing.assert_array_equal(first[0], first[2])


def test_configuration_that_is_written_is_short():
    process = schedulers.process(of("IPNDM"), "file")
    assert scheduler_config(process) == {"_class_name": "IPNDMScheduler"}
