"""Solvers as diffusers has them, compiled: the same as step by step, whatever the backend."""

import numpy as np
import pytest

from kdiff.interop import schedulers
from kdiff.interop.multistep import DiffusersSinglestepPP
from tests.toys import compiled_run, exact_denoiser, numpy

CONFIGS = {
    "DDIMScheduler": {"timestep_spacing": "linspace"},
    "PNDMScheduler": {"prediction_type": "v_prediction"},
    "DPMSolverMultistepScheduler": {"solver_order": 3, "final_sigmas_type": "sigma_min", "euler_at_final": True},
    "UniPCMultistepScheduler": {"disable_corrector": [1]},
    "DPMSolverSinglestepScheduler": {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    "TCDScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_step_is_the_step(name):
    process = schedulers.process({"_class_name": name, **CONFIGS[name]}, "file")
    sampler, denoise = process.sampler.clone(steps=5), exact_denoiser()
    given = numpy(compiled_run(sampler, process.schedule, (2, 3), denoise))
    np.testing.assert_allclose(given, numpy(sampler(denoise, process.schedule, (2, 3))), atol=2e-5)


@pytest.mark.once
def test_orders_of_a_singlestep_run():
    """As in Lu et al. 2022, arXiv:2206.00927, section 3.4, and the authors' code: the calls come out even."""
    orders = {order: DiffusersSinglestepPP(order).orders for order in (1, 2, 3)}
    assert orders[1](4) == [1, 1, 1, 1]
    assert orders[2](5) == [1, 2, 1, 2, 1]
    assert orders[2](6) == [1, 2, 1, 2, 1, 1]
    assert orders[3](6) == [1, 2, 3, 1, 2, 1]
    assert orders[3](7) == [1, 2, 3, 1, 2, 3, 1]
    assert orders[3](8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert DiffusersSinglestepPP(3, lower_final=False).orders(6) == [1, 2, 3, 1, 2, 3]
