"""diffusers' schedulers: what one of them says is here a schedule, a prediction, a time label and a sampler.

    beta_schedule, trained_betas, rescale_betas_zero_snr      the schedule
    prediction_type                                           the prediction
    the class, algorithm_type, solver_order, variance_type    the solver
    timestep_spacing, steps_offset, use_karras_sigmas         the grid
    set_alpha_to_one, final_sigmas_type                       whether the run goes to t = 0
    clip_sample, thresholding                                 the guidance

A key that would be lost is an error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop.configs import Key, Keys, complete, kind, only
from kdiff.interop.grids import FlowMatching, LinspaceUnrounded, WithFirst, Within, WithoutLast
from kdiff.interop.solvers import DDIMKeptNoise, PseudoRungeKutta
from kdiff.sampling import Sampler

__all__ = [
    "BETAS",
    "CLIPPING",
    "ENDING",
    "FLOW",
    "FLOW_MATCHING",
    "GRIDS",
    "KINDS",
    "LATE_TABLE",
    "LEADING",
    "LINSPACE",
    "MULTISTEP",
    "ORDERED",
    "PREDICTIONS",
    "SIGMAS",
    "SPACINGS",
    "TABLE",
    "THRESHOLD",
    "UNUSED",
    "VARIANCES",
    "WARMUPS",
    "Kind",
    "Process",
    "process",
]


class Process(NamedTuple):
    """What a scheduler is in kdiff."""

    schedule: schedules.NoiseSchedule
    prediction: predictions.Prediction
    time_label: times.TimeLabel
    sampler: Sampler


# --- keys

BETAS = {
    "linear": lambda *table: schedules.LinearBeta(*table),
    "scaled_linear": lambda *table: schedules.ScaledLinearBeta(*table),
    "squaredcos_cap_v2": lambda steps, start, end: schedules.CosineBeta(steps),
    "sigmoid": lambda *table: schedules.SigmoidBeta(*table),
}
PREDICTIONS = {
    "epsilon": predictions.Noise,
    "sample": predictions.Data,
    "v_prediction": predictions.Velocity,
}
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}
WARMUPS = {False: solvers.PNDM(PseudoRungeKutta()), True: solvers.PNDM(solvers.Heun("ratio"), 1)}
SPACINGS = ("leading", "trailing", "linspace")

TABLE = {
    "num_train_timesteps": Key(1000),
    "beta_start": Key(0.0001),
    "beta_end": Key(0.02),
    "beta_schedule": Key("linear", tuple(BETAS)),
    "trained_betas": Key(None),
    "prediction_type": Key("epsilon", tuple(PREDICTIONS)),
    "rescale_betas_zero_snr": Key(False),
    "steps_offset": Key(0),
}
CLIPPING = {"clip_sample": Key(True), "clip_sample_range": Key(1.0)}
THRESHOLD = {"thresholding": Key(False), "dynamic_thresholding_ratio": Key(0.995), "sample_max_value": Key(1.0)}
LEADING = {"timestep_spacing": Key("leading", SPACINGS)}
LINSPACE = {"timestep_spacing": Key("linspace", SPACINGS)}
SIGMAS = {"use_karras_sigmas": Key(False), "use_exponential_sigmas": Key(False), "use_beta_sigmas": only(False, None)}
LATE_TABLE = {"beta_start": Key(0.00085), "beta_end": Key(0.012)}  # the defaults of Heun and DPM2
UNUSED = ("lambda_min_clipped", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
FLOW = {"use_flow_sigmas": only(False, None), "flow_shift": Key(1.0), "use_dynamic_shifting": only(False)}
ORDERED = {
    **TABLE,
    **THRESHOLD,
    **LINSPACE,
    **SIGMAS,
    **FLOW,
    "solver_order": Key(2, (1, 2, 3)),
    "lower_order_final": Key(True),
}
ENDING = {"final_sigmas_type": Key("zero", ("zero", "sigma_min"))}


class Kind(NamedTuple):
    """How one class of schedulers is translated.

    Attributes:
        keys: of its configuration.
        solver: of a configuration.
        spacing: how its `timestep_spacing` is read, a key of `GRIDS`.
    """

    keys: Keys
    solver: Callable[[dict[str, Any]], solvers.Solver]
    spacing: str = "rounded"


def _multistep(config):
    sde = config["algorithm_type"].startswith("sde")
    order = min(config["solver_order"], 2) if sde else config["solver_order"]
    return MULTISTEP[config["algorithm_type"]](order, config["solver_type"])


MULTISTEP = {
    "dpmsolver++": solvers.DPMSolverPP,
    "dpmsolver": solvers.DPMSolver,
    "sde-dpmsolver++": solvers.DPMSolverPPSDE,
    "sde-dpmsolver": solvers.DPMSolverSDE,
}

KINDS = {
    "DDPMScheduler": Kind(
        {**TABLE, **CLIPPING, **THRESHOLD, **LEADING, "variance_type": Key("fixed_small", tuple(VARIANCES))},
        lambda config: solvers.DDPM(VARIANCES[config["variance_type"]]),
    ),
    "DDIMScheduler": Kind(
        {**TABLE, **CLIPPING, **THRESHOLD, **LEADING, "set_alpha_to_one": Key(True)},
        lambda config: DDIMKeptNoise(_guidance(config)) if _guidance(config) else solvers.DDIM(),
    ),
    "PNDMScheduler": Kind(
        {**TABLE, **LEADING, "set_alpha_to_one": Key(False), "skip_prk_steps": Key(False)},
        lambda config: WARMUPS[config["skip_prk_steps"]],
    ),
    "DPMSolverMultistepScheduler": Kind(
        {
            **ORDERED,
            **ENDING,
            "algorithm_type": Key("dpmsolver++", tuple(MULTISTEP)),
            "solver_type": Key("midpoint", ("midpoint", "heun")),
            "euler_at_final": Key(False),
            "use_lu_lambdas": only(False, None),
            "variance_type": only(None),
        },
        _multistep,
        "shorter",
    ),
    "UniPCMultistepScheduler": Kind(
        {
            **ORDERED,
            **ENDING,
            "predict_x0": Key(True),
            "solver_type": Key("bh2", ("bh1", "bh2")),
            "disable_corrector": only([], None),
            "solver_p": only(None),
            "sigma_min": only(None),
            "sigma_max": only(None),
            "shift_terminal": only(None),
        },
        lambda config: solvers.UniPC(
            config["solver_order"],
            config["solver_type"],
            predicts="data" if config["predict_x0"] else "noise",
            lower_final=config["lower_order_final"],
        ),
        "shorter",
    ),
    "DEISMultistepScheduler": Kind(
        {
            **ORDERED,
            "final_sigmas_type": only("sigma_min"),
            "algorithm_type": only("deis"),
            "solver_type": only("logrho"),
        },
        lambda config: solvers.DEIS(config["solver_order"], config["lower_order_final"]),
        "shorter",
    ),
    "EulerDiscreteScheduler": Kind(
        {
            **TABLE,
            **LINSPACE,
            **SIGMAS,
            **ENDING,
            "interpolation_type": only("linear"),
            "timestep_type": only("discrete"),
            "sigma_min": only(None),
            "sigma_max": only(None),
        },
        lambda config: solvers.Euler(),
        "unrounded",
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        {**TABLE, **LINSPACE}, lambda config: solvers.EulerAncestral(), "unrounded"
    ),
    "HeunDiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **LINSPACE, **SIGMAS, **CLIPPING, "clip_sample": Key(False)},
        lambda config: solvers.Heun("ratio"),
        "unrounded",
    ),
    "LMSDiscreteScheduler": Kind({**TABLE, **LINSPACE, **SIGMAS}, lambda config: solvers.LMS(), "unrounded"),
    "KDPM2DiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2("ratio"), "unrounded"
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2Ancestral(), "unrounded"
    ),
}
FLOW_MATCHING = {
    "num_train_timesteps": Key(1000),
    "shift": Key(1.0),
    "use_dynamic_shifting": only(False),
    "invert_sigmas": only(False),
    "shift_terminal": only(None),
    "use_karras_sigmas": only(False, None),
    "use_exponential_sigmas": only(False, None),
    "use_beta_sigmas": only(False, None),
    "stochastic_sampling": only(False),
}

# What `timestep_spacing` means: of the schedulers that round, those of a step more, and those that do not round.
GRIDS = {
    "rounded": {
        "leading": times.Leading,
        "trailing": lambda _: times.Trailing(),
        "linspace": lambda _: times.Linspace(),
    },
    "unrounded": {
        "leading": times.Leading,
        "trailing": lambda _: times.Trailing(),
        "linspace": lambda _: LinspaceUnrounded(),
    },
    "shorter": {
        "leading": lambda offset: WithoutLast(times.Leading(offset)),
        "trailing": lambda _: times.Trailing(),
        "linspace": lambda _: WithoutLast(times.Linspace()),
    },
}


def process(config: dict[str, Any], source: Any, learned: bool = False) -> Process:
    """What a scheduler's configuration says.

    Args:
        config: the configuration.
        source: the file that it is from, for errors.
        learned: whether the network predicts the variance as well.
    """
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        return _flow_matching(complete(config, FLOW_MATCHING, source, UNUSED))
    scheduler = kind(KINDS, config.get("_class_name"), source, "_class_name")
    config = {**complete(config, scheduler.keys, source, UNUSED), "_class_name": config["_class_name"]}
    prediction = PREDICTIONS[config["prediction_type"]]()
    return Process(
        _schedule(config),
        predictions.LearnedVariance(prediction) if learned else prediction,
        times.Index(),
        _sampler(scheduler, config),
    )


def _schedule(config) -> schedules.NoiseSchedule:
    if config["trained_betas"] is not None:
        schedule = schedules.BetaTable(config["trained_betas"])
    else:
        table = (config["num_train_timesteps"], config["beta_start"], config["beta_end"])
        schedule = BETAS[config["beta_schedule"]](*table)
    return schedules.ZeroTerminalSNR(schedule) if config["rescale_betas_zero_snr"] else schedule


def _sampler(scheduler: Kind, config) -> Sampler:
    solver = scheduler.solver(config)
    grid, to_zero = _grid(scheduler, config), _to_zero(config)
    steps = config["num_train_timesteps"] if config["_class_name"] == "DDPMScheduler" else None
    changes = [] if isinstance(solver, DDIMKeptNoise) else filter(None, [_guidance(config)])
    return Sampler(solver, grid if to_zero else WithFirst(grid), steps, tuple(changes), to_zero)


def _grid(scheduler: Kind, config) -> times.TimeGrid:
    grid = GRIDS[scheduler.spacing][config["timestep_spacing"]](config["steps_offset"])
    named = {"use_karras_sigmas": times.Karras, "use_exponential_sigmas": times.Exponential}
    for key in (key for key in named if config.get(key)):
        grid = named[key]() if scheduler.spacing == "shorter" else Within(named[key](), grid)
    return grid


def _to_zero(config) -> bool:
    return config.get("set_alpha_to_one", True) and config.get("final_sigmas_type", "zero") == "zero"


def _guidance(config) -> guidance.Guidance | None:
    if config.get("thresholding"):
        return guidance.DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return guidance.Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


def _flow_matching(config) -> Process:
    grid = FlowMatching(config["shift"], config["num_train_timesteps"])
    label = times.Scaled(float(config["num_train_timesteps"]))
    return Process(schedules.Rectified(), predictions.Flow(), label, Sampler("euler", grid))
