"""Configurations of diffusers' schedulers from kdiff's objects: the first candidate that reads back as equal."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop import multistep, schedulers
from kdiff.interop.grids import BetaSigmas, Consistent, FlowMatching, FlowSigmas, UpTo, Upwards
from kdiff.interop.guidance import LowThreshold
from kdiff.interop.scheduler_keys import SPACINGS, VARIANCES
from kdiff.interop.scheduler_parts import PREDICTIONS
from kdiff.interop.scheduler_tabled import MULTISTEP, SINGLESTEP
from kdiff.interop.score_sde import EulerMaruyama, PredictorCorrector
from kdiff.interop.solvers import DDIMInverted, DDIMKeptNoise, DiffusersPNDM, DiffusersTCD, EvenSteps, NoisyEnd
from kdiff.interop.tables import ExponentialBeta, LaplaceBeta, NearlyZeroSNR, WuerstchenCosine
from kdiff.times import Distilled, TimeGrid

__all__ = [
    "ENDS",
    "NAMES_OF_PREDICTIONS",
    "NOISES",
    "SCHEDULES",
    "SOLVERS",
    "Config",
    "scheduler_config",
    "unclip_config",
]

Config = dict[str, Any]

SCHEDULES = {
    schedules.LinearBeta: "linear",
    schedules.ScaledLinearBeta: "scaled_linear",
    schedules.CosineBeta: "squaredcos_cap_v2",
    schedules.SigmoidBeta: "sigmoid",
    LaplaceBeta: "laplace",
    ExponentialBeta: "exp",
}
NAMES_OF_PREDICTIONS = {kind: name for name, kind in PREDICTIONS.items()}


def _named(name: str, **options: Callable[[Any], Any]) -> Callable[[Any], Config]:
    return lambda solver: {"_class_name": name, **{key: value(solver) for key, value in options.items()}}


def _dpm(algorithm: str) -> Callable[[Any], Config]:
    return _named(
        "DPMSolverMultistepScheduler",
        algorithm_type=lambda _: algorithm,
        solver_order=lambda solver: solver.order,
        solver_type=lambda solver: solver.variant,
        lower_order_final=lambda solver: solver.lower_final,
        euler_at_final=lambda solver: getattr(solver, "euler_final", False),
    )


def _singlestep(algorithm: str) -> Callable[[Any], Config]:
    return _named(
        "DPMSolverSinglestepScheduler",
        algorithm_type=lambda _: algorithm,
        solver_order=lambda solver: solver.order,
        solver_type=lambda solver: solver.variant,
        lower_order_final=lambda solver: solver.lower_final,
    )


def _ddpm() -> Callable[[Any], Config]:
    names = dict(zip(("small", "", "large", "learned"), VARIANCES, strict=True))
    return _named("DDPMScheduler", variance_type=lambda solver: names[solver.variance])


def _unipc() -> Callable[[Any], Config]:
    return _named(
        "UniPCMultistepScheduler",
        solver_order=lambda solver: solver.predictor_order,
        solver_type=lambda solver: solver.variant,
        predict_x0=lambda solver: solver.predicts == "data",
        lower_order_final=lambda solver: solver.lower_final,
        disable_corrector=lambda solver: list(getattr(solver, "uncorrected", ())),
    )


def _deis() -> Callable[[Any], Config]:
    return _named(
        "DEISMultistepScheduler",
        solver_order=lambda solver: solver.order,
        lower_order_final=lambda solver: solver.lower_final,
    )


def _inverse(both: multistep.BothWays) -> Config:
    return {**SOLVERS[type(both.solver)](both.solver), "_class_name": "DPMSolverMultistepInverseScheduler"}


SOLVERS = {
    solvers.DDPM: _ddpm(),
    NoisyEnd: _ddpm(),
    solvers.DDIM: _named("DDIMScheduler"),
    DDIMKeptNoise: _named("DDIMScheduler"),
    solvers.PNDM: _named("PNDMScheduler", skip_prk_steps=lambda solver: solver.warm == 1),
    DiffusersPNDM: _named("PNDMScheduler", skip_prk_steps=lambda solver: solver.warm == 1),
    **{kind: _dpm(name) for name, kinds in MULTISTEP.items() for kind in kinds},
    solvers.UniPC: _unipc(),
    multistep.DiffusersUniPC: _unipc(),
    solvers.DEIS: _deis(),
    multistep.DiffusersDEIS: _deis(),
    solvers.Euler: _named("EulerDiscreteScheduler"),
    solvers.EulerAncestral: _named("EulerAncestralDiscreteScheduler"),
    solvers.Heun: _named("HeunDiscreteScheduler"),
    solvers.LMS: _named("LMSDiscreteScheduler"),
    solvers.DPM2: _named("KDPM2DiscreteScheduler"),
    solvers.DPM2Ancestral: _named("KDPM2AncestralDiscreteScheduler"),
    solvers.LCM: _named("LCMScheduler", timestep_scaling=lambda solver: solver.scaling),
    DiffusersTCD: _named("TCDScheduler"),
    **{kind: _singlestep(name) for name, kind in SINGLESTEP.items()},
    solvers.DPMSolverPPSinglestepSDE: _named("DPMSolverSDEScheduler"),
    solvers.SASolver: _named(
        "SASolverScheduler",
        predictor_order=lambda solver: solver.predictor_order,
        corrector_order=lambda solver: solver.corrector_order,
        lower_order_final=lambda solver: solver.lower_final,
    ),
    DDIMInverted: _named(
        "DDIMInverseScheduler",
        clip_sample=lambda solver: solver.limit is not None,
        clip_sample_range=lambda solver: solver.limit or 1.0,
    ),
    multistep.BothWays: _inverse,
}
ENDS = ({}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False}, {"final_sigmas_type": "sigma_min"})
NOISES = {
    times.Karras: ({"use_karras_sigmas": True},),
    times.Exponential: ({"use_exponential_sigmas": True}, {"use_lu_lambdas": True}),
    BetaSigmas: ({"use_beta_sigmas": True},),
}


def scheduler_config(wanted: schedulers.Process) -> Config:
    """The configuration of the scheduler that is read as this process.

    kdiff's DDIM on `Trailing` is treated as that of diffusers, which is equal if the number of steps divides T.

    Raises:
        ValueError: if there is none.
    """
    learned = isinstance(wanted.prediction, predictions.LearnedVariance)
    for config in _candidates(wanted):
        config = {name: value for name, value in config.items() if name == "_class_name" or _known(config, name)}
        with contextlib.suppress(ValueError):  # candidates that diffusers refuses are skipped
            if _comparable(schedulers.process(config, "", learned)) == _comparable(wanted):
                return config
    raise ValueError(
        f"diffusers has no scheduler with {wanted.schedule!r}, {wanted.prediction!r}, {wanted.time_label!r} and "
        f"{wanted.sampler!r} together. Supported solvers: {sorted(kind.__name__ for kind in SOLVERS)}; time labels: "
        "Index(), or Scaled for flow matching; grids: Leading, Trailing, Linspace and those of kdiff.interop.grids"
    )


def unclip_config(wanted: schedulers.Process) -> Config:
    """The configuration of an `UnCLIPScheduler`, the only one for Karlo's pipelines, that is read as this process.

    Raises:
        ValueError: if there is none.
    """
    prediction = getattr(wanted.prediction, "prediction", wanted.prediction)
    learned = isinstance(wanted.prediction, predictions.LearnedVariance)
    config = {
        "num_train_timesteps": wanted.schedule.num_steps,
        "variance_type": "learned_range" if learned else "fixed_small_log",
        "prediction_type": NAMES_OF_PREDICTIONS.get(type(prediction)),
        **_changes(wanted.sampler.guidance, wanted.sampler.solver),
    }
    config = {"_class_name": "UnCLIPScheduler", **config}
    with contextlib.suppress(ValueError):
        if _comparable(schedulers.process(config, "", learned)) == _comparable(wanted):
            return config
    raise ValueError(f"no UnCLIPScheduler of diffusers equals {wanted}; the closest is {config}")


def _comparable(process: schedulers.Process) -> tuple:
    """A process without its number of steps, which a configuration does not contain."""
    prediction, solver, grid = process.prediction, process.sampler.solver, process.sampler.grid
    if isinstance(prediction, predictions.LearnedVariance):
        prediction = prediction.clone(num_steps=None, weight=0.001)
    if isinstance(solver, EvenSteps) and isinstance(getattr(grid, "grid", grid), times.Trailing):
        solver = solver.solver
    return process.schedule, prediction, process.time_label, process.sampler.replaced(solver=solver, steps=None)


def _known(config: Config, name: str) -> bool:
    return name in schedulers.KINDS[config["_class_name"]].keys


def _candidates(wanted: schedulers.Process) -> Iterator[Config]:
    yield from _untabled(wanted)
    solver, grid = wanted.sampler.solver, wanted.sampler.grid
    if isinstance(solver, PredictorCorrector):
        yield _score_sde(wanted.schedule, solver)
        return
    solver = solver.solver if isinstance(solver, EvenSteps) else solver
    inner = list(_inside(grid))
    table, prediction = _table(wanted.schedule, inner), wanted.prediction
    prediction = NAMES_OF_PREDICTIONS.get(type(getattr(prediction, "prediction", prediction)))
    if table is None or prediction is None or type(solver) not in SOLVERS:
        return
    shared = {**SOLVERS[type(solver)](solver), **table, "prediction_type": prediction}
    shared |= _changes(wanted.sampler.guidance, solver)
    shared |= {"timestep_type": "continuous"} if isinstance(wanted.time_label, times.LogSNR) else {}
    offsets, noises, clipped = {0, 1}, [{}], {}
    for one in inner:
        ends = {name: getattr(one, name, None) for name in ("sigma_min", "sigma_max")}
        noises += [{**names, **ends} for names in NOISES.get(type(one), ())]
        offsets |= {one.offset} if isinstance(one, times.Leading) else set()
        shared |= {"original_inference_steps": one.original} if isinstance(one, Distilled) else {}
        if isinstance(one, (UpTo, Upwards)) and one.last < wanted.schedule.num_steps:
            clipped = _lowest(wanted.schedule, one.last)
    for spacing, offset, end, noise in itertools.product(SPACINGS, sorted(offsets), ENDS, noises):
        yield {**shared, **clipped, "timestep_spacing": spacing, "steps_offset": offset, **end, **noise}


def _lowest(schedule, last: int) -> Config:
    """The `lambda_min_clipped` that leaves `last` steps of the process."""
    return {"lambda_min_clipped": 0.25 * float(schedule.log_snrs[last] + schedule.log_snrs[last + 1])}


def _untabled(wanted: schedulers.Process) -> Iterator[Config]:
    """The candidates among the classes without a table."""
    schedule, grid, solver = wanted.schedule, wanted.sampler.grid, wanted.sampler.solver
    yield {"_class_name": "IPNDMScheduler"}
    if isinstance(solver, EulerMaruyama) and isinstance(schedule, schedules.LinearVP):
        ends = {
            "beta_min": schedule.beta_min,
            "beta_max": schedule.beta_max,
            "sampling_eps": getattr(grid, "last", 1e-3),
        }
        steps = round(getattr(wanted.time_label, "scale", 999.0)) + 1
        yield {"_class_name": "ScoreSdeVpScheduler", "num_train_timesteps": steps, **ends}
    if isinstance(schedule, WuerstchenCosine):
        yield {"_class_name": "DDPMWuerstchenScheduler", "scaler": schedule.scaler, "s": schedule.s}
    if isinstance(grid, FlowMatching):
        yield _flow(grid, solver)
        yield {
            "_class_name": "FlowMatchHeunDiscreteScheduler",
            **_only(_flow(grid, solver), "num_train_timesteps", "shift"),
        }
    if isinstance(schedule, schedules.VarianceExploding):
        ends = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        yield from _exploding(
            wanted, {**ends, **_rho(grid), "sigma_data": getattr(wanted.prediction, "sigma_data", 0.5)}
        )


def _exploding(wanted: schedulers.Process, shared: Config) -> Iterator[Config]:
    """The candidates for EDM and consistency models."""
    grid, solver = wanted.sampler.grid, wanted.sampler.solver
    if isinstance(grid, Consistent):
        clip = {"clip_denoised": bool(wanted.sampler.guidance), "num_train_timesteps": grid.num_steps}
        yield {"_class_name": "CMStochasticIterativeScheduler", **shared, **clip}
    shared = {
        **shared,
        "prediction_type": "v_prediction" if type(wanted.prediction) is predictions.TrigFlow else "epsilon",
    }
    if type(solver) not in SOLVERS:
        return
    named = {**SOLVERS[type(solver)](solver), **_changes(wanted.sampler.guidance, solver)}
    for kind, end, noise in itertools.product(
        ("EDMEuler", "EDMDPMSolverMultistep"), ("zero", "sigma_min"), ("karras", "exponential")
    ):
        yield {**named, "_class_name": f"{kind}Scheduler", **shared, "final_sigmas_type": end, "sigma_schedule": noise}


def _rho(grid) -> Config:
    found = [one.rho for one in _inside(grid) if isinstance(one, times.Karras)]
    return {"rho": found[0]} if found else {}


def _only(config: Config, *names: str) -> Config:
    return {name: config[name] for name in names}


def _flow(grid: FlowMatching, solver) -> Config:
    noise = NOISES[type(grid.noise)][0] if type(grid.noise) in NOISES else {}
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": grid.num_steps,
        "shift": grid.shift,
        "shift_terminal": grid.terminal,
        "stochastic_sampling": isinstance(solver, solvers.Consistency),
        **noise,
    }


def _score_sde(schedule, solver: PredictorCorrector) -> Config:
    return {
        "_class_name": "ScoreSdeVeScheduler",
        "snr": solver.snr,
        "correct_steps": solver.corrections,
        "sampling_eps": solver.epsilon,
        **{name: getattr(schedule, name, None) for name in ("sigma_min", "sigma_max")},
    }


def _inside(grid: TimeGrid) -> Iterator[TimeGrid]:
    """A grid and the grids nested in it."""
    yield grid
    for name in ("grid", "ends", "noise"):
        if getattr(grid, name, None) is not None:
            yield from _inside(getattr(grid, name))


def _table(schedule, inner: list[TimeGrid]) -> Config | None:
    for one in inner:
        if isinstance(one, FlowSigmas):
            flow = {"use_flow_sigmas": True, "flow_shift": one.shift, "shift_terminal": one.terminal}
            return {"num_train_timesteps": one.num_steps, **flow}
    rescaled = isinstance(schedule, (schedules.ZeroTerminalSNR, NearlyZeroSNR))
    schedule = schedule.schedule if rescaled else schedule
    config = {"num_train_timesteps": schedule.num_steps, "rescale_betas_zero_snr": rescaled}
    if type(schedule) in SCHEDULES:
        ends = {name: getattr(schedule, name) for name in ("beta_start", "beta_end") if hasattr(schedule, name)}
        return {**config, "beta_schedule": SCHEDULES[type(schedule)], **ends}
    if isinstance(schedule, schedules.BetaTable):
        return {**config, "trained_betas": [float(beta) for beta in schedule.betas]}
    return None


def _changes(changes, solver) -> Config:
    if isinstance(solver, DDIMInverted):
        return {}
    config: Config = {"clip_sample": False}
    for change in [*changes, *([solver.guidance] if isinstance(solver, DDIMKeptNoise) else [])]:
        if isinstance(change, guidance.Clip):
            config |= {"clip_sample": True, "clip_sample_range": change.limit}
        if isinstance(change, LowThreshold):
            config |= {"thresholding": True, "sample_max_value": change.limit}
        if isinstance(change, guidance.DynamicThreshold):
            config |= {"thresholding": True, "dynamic_thresholding_ratio": change.quantile}
            config["sample_max_value"] = change.highest
    return config
