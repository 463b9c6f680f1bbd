"""The parts of a diffusers scheduler with a table of betas: schedule, grid, time label, and so on."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop.configs import Keys
from kdiff.interop.grids import BetaSigmas, FlowSigmas, LinspaceUnrounded, UpTo, Upwards, Within, WithoutLast
from kdiff.interop.guidance import LowThreshold
from kdiff.interop.tables import ExponentialBeta, LaplaceBeta, NearlyZeroSNR
from kdiff.sampling import Sampler
from kdiff.schedules.wrappers import token_mu

__all__ = [
    "BETAS",
    "ENDS_ABOVE",
    "LABELS",
    "NOISE_GRIDS",
    "PREDICTIONS",
    "ROUNDED",
    "UNROUNDED",
    "Config",
    "Kind",
    "Process",
    "end_of",
    "grid_of",
    "guidance_of",
    "label_of",
    "noise_grid_of",
    "schedule_of",
    "shift_of",
    "to_zero_of",
]

Config = dict[str, Any]


class Process(NamedTuple):
    """The equivalent of a scheduler in kdiff."""

    schedule: schedules.NoiseSchedule
    prediction: predictions.Prediction
    time_label: times.TimeLabel
    sampler: Sampler


class Kind(NamedTuple):
    """The translation of one class of schedulers.

    Attributes:
        keys: of its configuration.
        solver: from a configuration; None if `make` builds it.
        spacing: the reading of `timestep_spacing`: "rounded" to steps of the process, or "unrounded"; "shorter",
            rounded, with one more step but without the last time; "upwards", rounded, for a run to noise; or
            "distilled", unused.
        make: from a configuration and the number of tokens to all four parts, for a class without a table.
        to_zero: whether its runs end at t = 0; None if keys decide.
    """

    keys: Keys
    solver: Callable[[Config], solvers.Solver] | None = None
    spacing: str = "rounded"
    make: Callable[[Config, int | None], Process] | None = None
    to_zero: bool | None = None


BETAS = {
    "linear": lambda *table: schedules.LinearBeta(*table),
    "scaled_linear": lambda *table: schedules.ScaledLinearBeta(*table),
    "squaredcos_cap_v2": lambda steps, start, end: schedules.CosineBeta(steps),
    "sigmoid": lambda *table: schedules.SigmoidBeta(*table),
    "laplace": lambda steps, start, end: LaplaceBeta(steps),
    "exp": lambda steps, start, end: ExponentialBeta(steps),
}
PREDICTIONS = {
    "epsilon": predictions.Noise,
    "sample": predictions.Data,
    "v_prediction": predictions.Velocity,
    "flow_prediction": predictions.Flow,
}
# The grids of `timestep_spacing`, for schedulers that round to steps of the process and for those that do not.
ROUNDED = {
    "leading": times.Leading,
    "trailing": lambda _: times.Trailing(),
    "linspace": lambda _: times.Linspace(),
}
UNROUNDED = {**ROUNDED, "linspace": lambda _: LinspaceUnrounded()}
NOISE_GRIDS = {
    "use_karras_sigmas": times.Karras,
    "use_exponential_sigmas": times.Exponential,
    "use_lu_lambdas": times.Exponential,
    "use_beta_sigmas": BetaSigmas,
}
LABELS = {"use_karras_sigmas": "nearest", "use_lu_lambdas": "nearest"}  # others are truncated
ENDS_ABOVE = ("DEISMultistepScheduler", "SASolverScheduler")  # classes whose runs end at the first step of the process


def schedule_of(config: Config, spacing: str) -> schedules.NoiseSchedule:
    """The schedule: a table of betas, except for rectified flow and continuous times."""
    if config.get("use_flow_sigmas"):
        return schedules.Rectified(1e-8)  # with alpha = 1e-6 at the start of runs
    if _continuous(config) and noise_grid_of(config) and config["sigma_min"] and config["sigma_max"]:
        # Variance preserving, with a range of sigma / alpha slightly larger than that of the runs.
        low, high = -2.0 * math.log(config["sigma_max"]) - 1e-3, -2.0 * math.log(config["sigma_min"]) + 1e-3
        return schedules.Cosine(low, high)
    if config.get("trained_betas") is not None:
        schedule = schedules.BetaTable(config["trained_betas"])
    else:
        table = (config["num_train_timesteps"], config.get("beta_start"), config.get("beta_end"))
        schedule = BETAS[config["beta_schedule"]](*table)
    if not config.get("rescale_betas_zero_snr"):
        return schedule
    return schedules.ZeroTerminalSNR(schedule) if spacing in ("rounded", "distilled") else NearlyZeroSNR(schedule)


def _continuous(config: Config) -> bool:
    """Whether a network receives log(sigma / alpha) / 4, without a table; in diffusers only with velocities."""
    return config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction"


def label_of(config: Config, spacing: str) -> times.TimeLabel:
    """The index; rounded if diffusers rounds it."""
    if config.get("use_flow_sigmas"):
        return times.RoundedLabel(times.Scaled(float(config["num_train_timesteps"])), "down")
    if _continuous(config):
        return times.LogSNR(-0.125)
    named = [name for name in NOISE_GRIDS if config.get(name)]
    if spacing != "shorter" or not named:
        return times.Index()
    return times.RoundedLabel(times.Index(), LABELS.get(named[0], "down"))


def grid_of(config: Config, spacing: str, tokens: int | None = None) -> times.TimeGrid:
    """The times above the end of a run."""
    if config.get("use_flow_sigmas"):
        unipc = config["_class_name"] == "UniPCMultistepScheduler"
        return FlowSigmas(shift_of(config, tokens), config["num_train_timesteps"], unipc, config.get("shift_terminal"))
    if spacing == "distilled":
        return times.Distilled(config["original_inference_steps"])
    noise, name = noise_grid_of(config), config.get("timestep_spacing", "linspace")
    if noise and spacing == "shorter":
        return noise
    grid = (UNROUNDED if spacing == "unrounded" else ROUNDED)[name](config.get("steps_offset", 0))
    last = _last(config)
    if spacing == "upwards":
        return Upwards(grid, last)
    if last < config["num_train_timesteps"]:
        grid = UpTo(grid, last)
    if spacing == "shorter" and name != "trailing":
        grid = WithoutLast(grid)
    return Within(noise, grid) if noise else grid


def noise_grid_of(config: Config) -> times.TimeGrid | None:
    """The configured grid of noise levels, if any."""
    ends = {name: config[name] for name in ("sigma_min", "sigma_max") if config.get(name)}
    for name, kind in NOISE_GRIDS.items():
        if config.get(name):
            return kind(**ends)
    return None


def _last(config: Config) -> int:
    """The number of steps of the process with log(alpha / sigma) of at least `lambda_min_clipped`."""
    steps, lowest = config["num_train_timesteps"], config.get("lambda_min_clipped")
    if lowest in (None, -math.inf):
        return steps
    table = schedule_of(config, "shorter")
    return int(np.sum(0.5 * table.log_snrs[1:] >= lowest))


def shift_of(config: Config, tokens: int | None) -> float:
    """The shift of rectified flow: `shift`, or a function of the number of tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    if tokens is None:
        raise ValueError(
            "with `use_dynamic_shifting` the times depend on the size of the sample: give `tokens`, the length of the "
            "sequence of the transformer, (height / patch) (width / patch), such as 4096"
        )
    base = (config.get("base_image_seq_len") or 256, config.get("max_image_seq_len") or 4096)
    ends = [0.5, 1.15]
    for i, name in enumerate(("base_shift", "max_shift")):
        ends[i] = ends[i] if config.get(name) is None else config[name]
    mu = token_mu("use_dynamic_shifting", tokens, *base, *ends)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def end_of(config: Config) -> float | None:
    """The last time of a run that does not end at t = 0, if it is not the first step of the process.

    For rectified flow DPM-Solver takes it from the first sigma / alpha of the table, which is not used otherwise.
    """
    if not config.get("use_flow_sigmas") or not config["_class_name"].startswith("DPMSolver"):
        return None
    table = schedule_of({**config, "use_flow_sigmas": False}, "shorter")
    return math.exp(-0.5 * float(table.log_snrs[1]))


def to_zero_of(config: Config) -> bool:
    """Whether a run ends at t = 0."""
    ending = config.get("final_sigmas_type", "sigma_min" if config["_class_name"] in ENDS_ABOVE else "zero")
    older, alpha = config.get("set_alpha_to_zero"), config.get("set_alpha_to_one", True)
    return bool(alpha if older is None else older) and ending == "zero"


def guidance_of(config: Config) -> guidance.Guidance | None:
    """The guidance rule that clips or thresholds x_hat."""
    if config.get("thresholding"):
        ratio, highest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return guidance.DynamicThreshold(ratio, highest) if highest >= 1 else LowThreshold(highest)
    return guidance.Clip(config["clip_sample_range"]) if config.get("clip_sample") else None
