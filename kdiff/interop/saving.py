"""Configurations of schedulers for diffusers, from our objects: written by the tables below, and read back to check."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop import schedulers
from kdiff.interop.grids import FlowMatching
from kdiff.interop.solvers import DDIMKeptNoise, DiffusersDEIS
from kdiff.interop.tables import NearlyZeroSNR

__all__ = [
    "ENDS",
    "NOISE_GRIDS",
    "PREDICTIONS",
    "SCHEDULES",
    "SOLVERS",
    "VARIANCES",
    "Config",
    "scheduler_config",
]

Config = dict[str, Any]

SCHEDULES = {
    schedules.LinearBeta: "linear",
    schedules.ScaledLinearBeta: "scaled_linear",
    schedules.CosineBeta: "squaredcos_cap_v2",
    schedules.SigmoidBeta: "sigmoid",
}
PREDICTIONS = {kind: name for name, kind in schedulers.PREDICTIONS.items()}


def _named(name: str, **options: Callable[[Any], Any]) -> Callable[[Any], Config]:
    return lambda solver: {"_class_name": name, **{key: value(solver) for key, value in options.items()}}


def _dpm(algorithm: str) -> Callable[[Any], Config]:
    return _named(
        "DPMSolverMultistepScheduler",
        algorithm_type=lambda _: algorithm,
        solver_order=lambda solver: solver.order,
        solver_type=lambda solver: solver.variant,
        lower_order_final=lambda solver: solver.lower_final,
    )


def _deis() -> Callable[[Any], Config]:
    return _named(
        "DEISMultistepScheduler",
        solver_order=lambda solver: solver.order,
        lower_order_final=lambda solver: solver.lower_final,
    )


SOLVERS = {
    solvers.DDPM: _named("DDPMScheduler", variance_type=lambda solver: VARIANCES[solver.variance]),
    solvers.DDIM: _named("DDIMScheduler"),
    DDIMKeptNoise: _named("DDIMScheduler"),
    solvers.PNDM: _named("PNDMScheduler", skip_prk_steps=lambda solver: solver.warm == 1),
    **{kind: _dpm(name) for name, kinds in schedulers.MULTISTEP.items() for kind in kinds},
    solvers.UniPC: _named(
        "UniPCMultistepScheduler",
        solver_order=lambda solver: solver.predictor_order,
        solver_type=lambda solver: solver.variant,
        predict_x0=lambda solver: solver.predicts == "data",
        lower_order_final=lambda solver: solver.lower_final,
    ),
    solvers.DEIS: _deis(),
    DiffusersDEIS: _deis(),
    solvers.Euler: _named("EulerDiscreteScheduler"),
    solvers.EulerAncestral: _named("EulerAncestralDiscreteScheduler"),
    solvers.Heun: _named("HeunDiscreteScheduler"),
    solvers.LMS: _named("LMSDiscreteScheduler"),
    solvers.DPM2: _named("KDPM2DiscreteScheduler"),
    solvers.DPM2Ancestral: _named("KDPM2AncestralDiscreteScheduler"),
}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
ENDS = ({}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"})
NOISE_GRIDS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True})


def scheduler_config(wanted: schedulers.Process) -> Config:
    """The configuration of the scheduler that is read as this process.

    Raises:
        ValueError: if there is none.
    """
    for config in _candidates(wanted):
        config = {name: value for name, value in config.items() if name == "_class_name" or _known(config, name)}
        with contextlib.suppress(ValueError):  # what diffusers refuses is no candidate
            made = schedulers.process(config, "", isinstance(wanted.prediction, predictions.LearnedVariance))
            if _comparable(made) == _comparable(wanted):
                return config
    raise ValueError(
        f"diffusers has no scheduler that is {wanted.schedule!r}, {wanted.prediction!r}, {wanted.time_label!r} and "
        f"{wanted.sampler!r} at once. Known solvers: {sorted(kind.__name__ for kind in SOLVERS)}; time labels: "
        "Index(), or Scaled for flow matching; grids: Leading, Trailing, Linspace and those of kdiff.interop.grids"
    )


def _comparable(process: schedulers.Process) -> tuple:
    """Without the number of steps, which a configuration does not have."""
    prediction = process.prediction
    if isinstance(prediction, predictions.LearnedVariance):
        prediction = prediction.clone(num_steps=None, weight=0.001)
    return (*process[:1], prediction, process.time_label, process.sampler.clone(steps=None))


def _known(config: Config, name: str) -> bool:
    kind = schedulers.KINDS.get(config["_class_name"])
    return name in (schedulers.FLOW_MATCHING if kind is None else kind.keys)


def _candidates(wanted: schedulers.Process) -> Iterator[Config]:
    solver, grid = wanted.sampler.solver, wanted.sampler.grid
    if isinstance(grid, FlowMatching):
        flow = {"num_train_timesteps": grid.num_steps, "shift": grid.shift}
        yield {"_class_name": "FlowMatchEulerDiscreteScheduler", **flow}
    table, prediction = _table(wanted.schedule), wanted.prediction
    prediction = PREDICTIONS.get(type(getattr(prediction, "prediction", prediction)))
    if table is None or prediction is None or type(solver) not in SOLVERS:
        return
    shared = {**SOLVERS[type(solver)](solver), **table, "prediction_type": prediction, **_changes(wanted.sampler)}
    offsets = sorted({0, 1, _offset(grid)})
    for spacing, offset, end, noise in itertools.product(schedulers.SPACINGS, offsets, ENDS, NOISE_GRIDS):
        yield {**shared, "timestep_spacing": spacing, "steps_offset": offset, **end, **noise}


def _offset(grid) -> int:
    """That of a Leading, which may stand inside of others."""
    inner = (getattr(grid, name, None) for name in ("grid", "ends"))
    return grid.offset if isinstance(grid, times.Leading) else max([0, *(_offset(one) for one in inner if one)])


def _table(schedule) -> Config | None:
    rescaled = isinstance(schedule, (schedules.ZeroTerminalSNR, NearlyZeroSNR))
    schedule = schedule.schedule if rescaled else schedule
    config = {"num_train_timesteps": schedule.num_steps, "rescale_betas_zero_snr": rescaled}
    if type(schedule) in SCHEDULES:
        ends = {name: getattr(schedule, name) for name in ("beta_start", "beta_end") if hasattr(schedule, name)}
        return {**config, "beta_schedule": SCHEDULES[type(schedule)], **ends}
    if isinstance(schedule, schedules.BetaTable):
        return {**config, "trained_betas": [float(beta) for beta in schedule.betas]}
    return None


def _changes(sampler) -> Config:
    changes = [*sampler.guidance, *([sampler.solver.guidance] if isinstance(sampler.solver, DDIMKeptNoise) else [])]
    config: Config = {"clip_sample": False}
    for change in changes:
        if isinstance(change, guidance.Clip):
            config |= {"clip_sample": True, "clip_sample_range": change.limit}
        if isinstance(change, guidance.DynamicThreshold):
            config |= {"thresholding": True, "dynamic_thresholding_ratio": change.quantile}
            config["sample_max_value"] = change.highest
    return config
