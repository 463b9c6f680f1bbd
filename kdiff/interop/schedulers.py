"""diffusers' schedulers: what one of them says is here a schedule, a prediction, a time label and a sampler.

    beta_schedule, trained_betas, rescale_betas_zero_snr      the schedule
    prediction_type                                           the prediction
    the class, algorithm_type, solver_order, variance_type    the solver
    timestep_spacing, steps_offset, use_karras_sigmas         the grid
    set_alpha_to_one, final_sigmas_type                       whether the run goes to t = 0
    clip_sample, thresholding                                 the guidance

A key that would be lost is an error.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop.configs import (
    FLAG,
    LARGEST,
    Key,
    Keys,
    complete,
    explained,
    kind,
    listed,
    one_of,
    only,
    optional,
    real,
    whole,
)
from kdiff.interop.foreign import FOREIGN
from kdiff.interop.grids import FlowMatching, LinspaceUnrounded, WithFirst, Within, WithoutLast
from kdiff.interop.solvers import (
    DDIMKeptNoise,
    DiffusersDEIS,
    DiffusersDPMSolver,
    DiffusersDPMSolverPP,
    DiffusersDPMSolverPPSDE,
    DiffusersDPMSolverSDE,
    PseudoRungeKutta,
)
from kdiff.interop.tables import NearlyZeroSNR
from kdiff.sampling import Sampler

__all__ = [
    "BETA",
    "BETAS",
    "CLIPPING",
    "ENDING",
    "EVEN",
    "FLOW",
    "FLOW_MATCHING",
    "GRIDS",
    "KINDS",
    "LATE_TABLE",
    "LEADING",
    "LINSPACE",
    "MULTISTEP",
    "NO_DATA",
    "ORDERED",
    "PREDICTIONS",
    "SIGMAS",
    "SPACINGS",
    "STEPS",
    "TABLE",
    "THRESHOLD",
    "VARIANCES",
    "WARMUPS",
    "ZERO_SNR",
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

STEPS = whole(1)
BETA = real(0.0, 1.0)
TABLE = {
    "num_train_timesteps": Key(1000, STEPS),
    "beta_start": Key(0.0001, BETA),
    "beta_end": Key(0.02, BETA),
    "beta_schedule": Key("linear", one_of("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": Key(None, optional(listed(BETA, 1, LARGEST))),
    "prediction_type": Key("epsilon", one_of(*PREDICTIONS)),
    "steps_offset": Key(0, whole(0)),
}
NO_DATA = {"prediction_type": Key("epsilon", one_of("epsilon", "v_prediction"))}
ZERO_SNR = {"rescale_betas_zero_snr": Key(False, FLAG)}
CLIPPING = {"clip_sample": Key(True, FLAG), "clip_sample_range": Key(1.0, real(0.0, 1e6))}
THRESHOLD = {
    "thresholding": Key(False, FLAG),
    "dynamic_thresholding_ratio": Key(0.995, real(0.0, 1.0)),
    "sample_max_value": Key(1.0, real(1.0, 1e6)),
}
LEADING = {"timestep_spacing": Key("leading", one_of(*SPACINGS))}
# diffusers' DDIM and PNDM go from each step to that T // steps below, which of these is not the next one.
EVEN = {"timestep_spacing": Key("leading", one_of("leading", "trailing"))}
LINSPACE = {"timestep_spacing": Key("linspace", one_of(*SPACINGS))}
SIGMAS = {
    "use_karras_sigmas": Key(False, FLAG),
    "use_exponential_sigmas": Key(False, FLAG),
    "use_beta_sigmas": only(False),
}
LATE_TABLE = {"beta_start": Key(0.00085, BETA), "beta_end": Key(0.012, BETA)}  # the defaults of Heun and DPM2
FLOW = {
    "use_flow_sigmas": only(False, None),
    "flow_shift": Key(1.0, real(0.0, 1e6)),
    "use_dynamic_shifting": only(False, None),
    "time_shift_type": only("exponential"),
}
ORDERED = {
    **TABLE,
    **THRESHOLD,
    **LINSPACE,
    **SIGMAS,
    **FLOW,
    "solver_order": Key(2, one_of(1, 2, 3)),
    "lower_order_final": Key(True, FLAG),
}
ENDING = {"final_sigmas_type": Key("zero", one_of("zero", "sigma_min"))}


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
    """kdiff's own solver where it does the same: of the orders 1 and 2, if they fall to 1 in every run or in none."""
    lower, order = config["lower_order_final"], config["solver_order"]
    own = order <= 2 and (config["final_sigmas_type"] == "zero" or not lower)
    made = MULTISTEP[config["algorithm_type"]][0 if own else 1]
    return made(order, config["solver_type"], lower_final=lower or config["final_sigmas_type"] == "zero")


def _deis(config):
    lower = config["lower_order_final"]
    return (DiffusersDEIS if lower else solvers.DEIS)(config["solver_order"], lower)


MULTISTEP = {
    "dpmsolver++": (solvers.DPMSolverPP, DiffusersDPMSolverPP),
    "dpmsolver": (solvers.DPMSolver, DiffusersDPMSolver),
    "sde-dpmsolver++": (solvers.DPMSolverPPSDE, DiffusersDPMSolverPPSDE),
    "sde-dpmsolver": (solvers.DPMSolverSDE, DiffusersDPMSolverSDE),
}

KINDS = {
    "DDPMScheduler": Kind(
        {
            **TABLE,
            **ZERO_SNR,
            **CLIPPING,
            **THRESHOLD,
            **LEADING,
            "beta_schedule": Key("linear", one_of(*BETAS)),
            "variance_type": Key("fixed_small", one_of(*VARIANCES)),
        },
        lambda config: solvers.DDPM(VARIANCES[config["variance_type"]]),
    ),
    "DDIMScheduler": Kind(
        {**TABLE, **ZERO_SNR, **CLIPPING, **THRESHOLD, **EVEN, "set_alpha_to_one": Key(True, FLAG)},
        lambda config: DDIMKeptNoise(_guidance(config)) if _guidance(config) else solvers.DDIM(),
    ),
    "PNDMScheduler": Kind(
        {
            **TABLE,
            **EVEN,
            "prediction_type": only(
                "epsilon"
            ),  # of velocities diffusers combines those, not what they say of the noise
            "set_alpha_to_one": Key(False, FLAG),
            "skip_prk_steps": Key(False, FLAG),
        },
        lambda config: WARMUPS[config["skip_prk_steps"]],
    ),
    "DPMSolverMultistepScheduler": Kind(
        {
            **ORDERED,
            **ZERO_SNR,
            **ENDING,
            "algorithm_type": Key("dpmsolver++", one_of(*MULTISTEP)),
            "solver_type": Key("midpoint", one_of("midpoint", "heun")),
            "euler_at_final": Key(False, FLAG),
            "use_lu_lambdas": only(False, None),
            "variance_type": only(None),
            "lambda_min_clipped": only(-math.inf, None),
        },
        _multistep,
        "shorter",
    ),
    "UniPCMultistepScheduler": Kind(
        {
            **ORDERED,
            **ZERO_SNR,
            **ENDING,
            "predict_x0": Key(True, FLAG),
            "solver_type": Key("bh2", one_of("bh1", "bh2")),
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
        _deis,
        "shorter",
    ),
    "EulerDiscreteScheduler": Kind(
        {
            **TABLE,
            **ZERO_SNR,
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
        {**TABLE, **NO_DATA, **ZERO_SNR, **LINSPACE}, lambda config: solvers.EulerAncestral(), "unrounded"
    ),
    "HeunDiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **NO_DATA, **LINSPACE, **SIGMAS, **CLIPPING, "clip_sample": Key(False, FLAG)},
        lambda config: solvers.Heun("ratio"),
        "unrounded",
    ),
    "LMSDiscreteScheduler": Kind({**TABLE, **LINSPACE, **SIGMAS}, lambda config: solvers.LMS(), "unrounded"),
    "KDPM2DiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **NO_DATA, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2("ratio"), "unrounded"
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        {**TABLE, **LATE_TABLE, **NO_DATA, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2Ancestral(), "unrounded"
    ),
}
FLOW_MATCHING = {
    "num_train_timesteps": Key(1000, STEPS),
    "shift": Key(1.0, real(1e-3, 1e3)),
    "use_dynamic_shifting": only(False, None),
    "invert_sigmas": only(False, None),
    "shift_terminal": only(None),
    "use_karras_sigmas": only(False),
    "use_exponential_sigmas": only(False),
    "use_beta_sigmas": only(False),
    "stochastic_sampling": only(False, None),
    # Of dynamic shifting alone.
    "base_shift": Key(0.5, optional(real(-1e3, 1e3))),
    "max_shift": Key(1.15, optional(real(-1e3, 1e3))),
    "base_image_seq_len": Key(256, optional(whole(1))),
    "max_image_seq_len": Key(4096, optional(whole(1))),
    "time_shift_type": Key("exponential", one_of("exponential", "linear")),
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
    name = config.get("_class_name")
    with explained(source):
        if config.get("predict_epsilon", True) is not True and "prediction_type" not in config:
            raise ValueError('`predict_epsilon` is of an old version; write `prediction_type` "sample" in its place')
        config = {key: value for key, value in config.items() if key != "predict_epsilon"}
        if name == "FlowMatchEulerDiscreteScheduler":
            return _flow_matching(complete(config, FLOW_MATCHING, source, FOREIGN))
        scheduler = kind(KINDS, name, source, "_class_name")
        config = {**complete(config, scheduler.keys, source, FOREIGN), "_class_name": name}
        for wrong, words in _conflicts(scheduler, config, learned):
            if wrong:
                raise ValueError(words)
        prediction = PREDICTIONS[config["prediction_type"]]()
        return Process(
            _schedule(scheduler, config),
            predictions.LearnedVariance(prediction) if learned else prediction,
            times.Index(),
            _sampler(scheduler, config),
        )


def _conflicts(scheduler, config, learned) -> list[tuple[bool, str]]:
    """What keys say that do not go together, each with whether it is so here."""
    steps, betas, ending = config["num_train_timesteps"], config["trained_betas"], config.get("final_sigmas_type")
    algorithm = config.get("algorithm_type", "")
    zero = config.get("rescale_betas_zero_snr") and config["_class_name"] in ("DDPMScheduler", "DDIMScheduler")
    sigmas = [name for name in ("use_karras_sigmas", "use_exponential_sigmas") if config.get(name)]
    unipc, plain = config["_class_name"] == "UniPCMultistepScheduler", config.get("solver_type") == "bh2"
    variance, late = config.get("variance_type"), config["timestep_spacing"] == "trailing" or config["steps_offset"]
    return [
        (
            betas is not None and len(betas) != steps,
            f"`num_train_timesteps` is {steps}, and `trained_betas` are {len(betas or [])}: they must be as many",
        ),
        (len(sigmas) > 1, f"at most one of {sigmas} may be true"),
        (
            bool(sigmas) and scheduler.spacing == "shorter" and ending == "sigma_min",
            f"`final_sigmas_type` must be 'zero' where {sigmas} are true; received: 'sigma_min'",
        ),
        (
            bool(sigmas) and scheduler.spacing == "shorter" and config["beta_schedule"] == "squaredcos_cap_v2",
            f"{sigmas} must be false where `beta_schedule` is 'squaredcos_cap_v2': diffusers has them at one time step",
        ),
        (
            variance in ("fixed_large", "learned_range") and bool(late) and config["timestep_spacing"] != "linspace",
            f"`timestep_spacing` must be 'linspace', or 'leading' with `steps_offset` 0, where `variance_type` is "
            f"{variance!r}: otherwise diffusers adds noise in the last step",
        ),
        (
            algorithm in ("dpmsolver", "sde-dpmsolver") and ending == "zero",
            f"`final_sigmas_type` must be 'sigma_min' for `algorithm_type` {algorithm!r}; received: 'zero'",
        ),
        (
            unipc and ending == "zero" and not (plain and config["predict_x0"] and config["lower_order_final"]),
            "`final_sigmas_type` must be 'sigma_min' unless `predict_x0` and `lower_order_final` are true and "
            "`solver_type` is 'bh2': in diffusers the last step is not a number",
        ),
        (
            algorithm == "sde-dpmsolver" and config.get("solver_order") == 3,
            "`solver_order` must be 1 or 2 for `algorithm_type` 'sde-dpmsolver'; received: 3",
        ),
        (
            bool(config.get("euler_at_final")) and ending != "zero",
            "`euler_at_final` must be false, unless `final_sigmas_type` is 'zero', to be loaded; received: True",
        ),
        (
            config.get("variance_type") == "learned_range" and not learned,
            "`variance_type` 'learned_range' needs a network with twice as many channels in its output",
        ),
        (
            bool(zero) and config["prediction_type"] == "epsilon" and config["timestep_spacing"] != "leading",
            "`rescale_betas_zero_snr` ends in nothing but noise, of which 'epsilon' tells no data; `prediction_type` "
            "must be 'v_prediction' or 'sample'",
        ),
    ]


def _schedule(scheduler: Kind, config) -> schedules.NoiseSchedule:
    if config["trained_betas"] is not None:
        schedule = schedules.BetaTable(config["trained_betas"])
    else:
        table = (config["num_train_timesteps"], config["beta_start"], config["beta_end"])
        schedule = BETAS[config["beta_schedule"]](*table)
    if not config.get("rescale_betas_zero_snr"):
        return schedule
    return schedules.ZeroTerminalSNR(schedule) if scheduler.spacing == "rounded" else NearlyZeroSNR(schedule)


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
