"""diffusers' schedulers: what one of them says is here a schedule, a prediction, a time label and a sampler.

    beta_schedule, trained_betas, rescale_betas_zero_snr      the schedule
    prediction_type                                           the prediction
    the class, algorithm_type, solver_order, variance_type    the solver
    timestep_spacing, steps_offset, use_karras_sigmas         the grid; and how the time label is rounded
    set_alpha_to_one, final_sigmas_type                       whether the run goes to t = 0
    clip_sample, thresholding                                 the guidance

A key that would be lost is an error; keys of other classes, which diffusers reads over, are read over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from kdiff import predictions, solvers, times
from kdiff.interop.configs import FLAG, Key, Keys, complete, explained, kind, listed, one_of, only, optional, whole
from kdiff.interop.foreign import FOREIGN
from kdiff.interop.grids import FlowMatching, WithFirst
from kdiff.interop.multistep import (
    DiffusersDEIS,
    DiffusersDPMSolver,
    DiffusersDPMSolverPP,
    DiffusersDPMSolverPPSDE,
    DiffusersDPMSolverSDE,
    DiffusersUniPC,
)
from kdiff.interop.scheduler_keys import (
    CLIPPING,
    DPM,
    ENDING,
    FLOW_MATCHING,
    LATE,
    LEADING,
    LINSPACE,
    NO_DATA,
    ORDERED,
    SIGMA_ENDS,
    SIGMAS,
    SWITCH,
    TABLE,
    THRESHOLD,
    VARIANCES,
    ZERO_SNR,
)
from kdiff.interop.scheduler_parts import (
    BETAS,
    PREDICTIONS,
    grid_of,
    guidance_of,
    label_of,
    noise_grid_of,
    schedule_of,
    shift_of,
    to_zero_of,
)
from kdiff.interop.solvers import DDIMKeptNoise, DiffusersPNDM, EvenSteps, NoisyEnd, PseudoRungeKutta
from kdiff.sampling import Sampler
from kdiff.schedules import NoiseSchedule, Rectified

__all__ = ["KINDS", "MULTISTEP", "OF_VARIANCE", "WARMUPS", "Kind", "Process", "process"]


class Process(NamedTuple):
    """What a scheduler is in kdiff."""

    schedule: NoiseSchedule
    prediction: predictions.Prediction
    time_label: times.TimeLabel
    sampler: Sampler


class Kind(NamedTuple):
    """How one class of schedulers is translated.

    Attributes:
        keys: of its configuration.
        solver: of a configuration.
        spacing: how its `timestep_spacing` is read: "rounded" to steps of the process, or "unrounded"; or "shorter",
            rounded, of a run of one step more without its last time.
        make: of a configuration and the number of tokens, all four, for a class that has no table.
    """

    keys: Keys
    solver: Callable[[dict[str, Any]], solvers.Solver]
    spacing: str = "rounded"
    make: Callable[[dict[str, Any], int | None], Process] | None = None


# --- solvers

OF_VARIANCE = dict(zip(VARIANCES, ("small", "small", "large", "learned"), strict=True))
WARMUPS = {False: solvers.PNDM(PseudoRungeKutta()), True: solvers.PNDM(solvers.Heun("ratio"), 1)}
MULTISTEP = {
    "dpmsolver++": (solvers.DPMSolverPP, DiffusersDPMSolverPP),
    "dpmsolver": (solvers.DPMSolver, DiffusersDPMSolver),
    "sde-dpmsolver++": (solvers.DPMSolverPPSDE, DiffusersDPMSolverPPSDE),
    "sde-dpmsolver": (solvers.DPMSolverSDE, DiffusersDPMSolverSDE),
}


def _ddpm(config):
    variance = OF_VARIANCE[config["variance_type"]]
    late = config["timestep_spacing"] == "trailing" or config["steps_offset"]
    noisy = variance != "small" and late and config["timestep_spacing"] != "linspace"
    return NoisyEnd(variance) if noisy else solvers.DDPM(variance)


def _ddim(config):
    solver = DDIMKeptNoise(guidance_of(config)) if guidance_of(config) else solvers.DDIM()
    return solver if config["timestep_spacing"] == "leading" else EvenSteps(solver)


def _pndm(config):
    if config["timestep_spacing"] == "leading" and config["prediction_type"] == "epsilon":
        return WARMUPS[bool(config["skip_prk_steps"])]
    return DiffusersPNDM(PREDICTIONS[config["prediction_type"]](), 1 if config["skip_prk_steps"] else 3)


def _multistep(config):
    """kdiff's own solver where it does the same: of the orders 1 and 2, if they fall to 1 in every run or in none."""
    lower, order, closing = bool(config["lower_order_final"]), config["solver_order"], _closing(config)
    algorithm = "dpmsolver++" if config["algorithm_type"] == "deis" else config["algorithm_type"]
    variant = config["solver_type"] if config["solver_type"] in ("midpoint", "heun") else "midpoint"
    own, theirs = MULTISTEP[algorithm]
    if order <= 2 and (closing or not lower):
        return own(order, variant, lower_final=closing)
    return theirs(order, variant, lower, closing and config["final_sigmas_type"] != "zero")


def _closing(config) -> bool:
    return config["final_sigmas_type"] == "zero" or bool(config["euler_at_final"])


def _unipc(config):
    order, variant = config["solver_order"], config["solver_type"] if config["solver_type"] == "bh1" else "bh2"
    predicts, lower = "data" if config["predict_x0"] else "noise", bool(config["lower_order_final"])
    if config["disable_corrector"]:
        return DiffusersUniPC(order, variant, predicts, lower, tuple(config["disable_corrector"]))
    return solvers.UniPC(order, variant, predicts=predicts, lower_final=lower)


def _deis(config):
    return (DiffusersDEIS if config["lower_order_final"] else solvers.DEIS)(
        config["solver_order"], bool(config["lower_order_final"])
    )


# --- classes


def _flow_matching(config, tokens) -> Process:
    shift, terminal = shift_of(config, tokens), config["shift_terminal"]
    last = 1.0 / config["num_train_timesteps"] if config["use_dynamic_shifting"] else None
    grid = FlowMatching(shift, config["num_train_timesteps"], last, terminal, noise_grid_of(config))
    solver = solvers.Consistency() if config["stochastic_sampling"] else solvers.Euler()
    return _flow(config, Sampler(solver, grid))


def _flow(config, sampler) -> Process:
    return Process(Rectified(), predictions.Flow(), times.Scaled(float(config["num_train_timesteps"])), sampler)


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
        _ddpm,
    ),
    "DDIMScheduler": Kind(
        {**TABLE, **ZERO_SNR, **CLIPPING, **THRESHOLD, **LEADING, "set_alpha_to_one": Key(True, FLAG)}, _ddim
    ),
    "PNDMScheduler": Kind(
        {
            **TABLE,
            **NO_DATA,
            **LEADING,
            "set_alpha_to_one": Key(False, FLAG),
            "skip_prk_steps": Key(False, SWITCH),
        },
        _pndm,
    ),
    "DPMSolverMultistepScheduler": Kind(
        {
            **ORDERED,
            **ZERO_SNR,
            **ENDING,
            **DPM,
            "euler_at_final": Key(False, SWITCH),
            "use_lu_lambdas": Key(False, SWITCH),
        },
        _multistep,
        "shorter",
    ),
    "UniPCMultistepScheduler": Kind(
        {
            **ORDERED,
            **ZERO_SNR,
            **ENDING,
            **SIGMA_ENDS,
            "predict_x0": Key(True, SWITCH),
            "solver_type": Key("bh2", one_of("bh1", "bh2", "midpoint", "heun", "logrho")),
            "disable_corrector": Key([], optional(listed(whole(0), 0, 1000))),
            "solver_p": only(None),
            "shift_terminal": Key(None, FLOW_MATCHING["shift_terminal"].rule),
        },
        _unipc,
        "shorter",
    ),
    "DEISMultistepScheduler": Kind(
        {
            **ORDERED,
            "algorithm_type": Key("deis", one_of("deis", "dpmsolver", "dpmsolver++")),
            "solver_type": Key("logrho", one_of("logrho", "midpoint", "heun", "bh1", "bh2")),
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
            **SIGMA_ENDS,
            **ENDING,
            "interpolation_type": only("linear"),
            "timestep_type": Key("discrete", one_of("discrete", "continuous")),
        },
        lambda config: solvers.Euler(),
        "unrounded",
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        {**TABLE, **NO_DATA, **ZERO_SNR, **LINSPACE}, lambda config: solvers.EulerAncestral(), "unrounded"
    ),
    "HeunDiscreteScheduler": Kind(
        {**TABLE, **LATE, **NO_DATA, **LINSPACE, **SIGMAS, **CLIPPING, "clip_sample": Key(False, SWITCH)},
        lambda config: solvers.Heun("ratio"),
        "unrounded",
    ),
    "LMSDiscreteScheduler": Kind({**TABLE, **LINSPACE, **SIGMAS}, lambda config: solvers.LMS(), "unrounded"),
    "KDPM2DiscreteScheduler": Kind(
        {**TABLE, **LATE, **NO_DATA, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2("ratio"), "unrounded"
    ),
    "KDPM2AncestralDiscreteScheduler": Kind(
        {**TABLE, **LATE, **NO_DATA, **LINSPACE, **SIGMAS}, lambda config: solvers.DPM2Ancestral(), "unrounded"
    ),
    "FlowMatchEulerDiscreteScheduler": Kind(FLOW_MATCHING, lambda config: solvers.Euler(), make=_flow_matching),
}


def process(config: dict[str, Any], source: Any, learned: bool = False, tokens: int | None = None) -> Process:
    """What a scheduler's configuration says.

    Args:
        config: the configuration.
        source: the file that it is from, for errors.
        learned: whether the network predicts the variance as well.
        tokens: the length of the transformer's sequence, (height / patch) (width / patch), on which the times depend
            where `use_dynamic_shifting` is true.

    Raises:
        ValueError: if the class is none of those that kdiff has; if a key says what kdiff cannot do, or keys do not go
            together.
    """
    name = config.get("_class_name")
    with explained(source):
        if config.get("predict_epsilon", True) is not True and "prediction_type" not in config:
            raise ValueError('`predict_epsilon` is of an old version; write `prediction_type` "sample" in its place')
        config = {key: value for key, value in config.items() if key != "predict_epsilon"}
        scheduler = kind(KINDS, name, source, "_class_name")
        config = {**complete(config, scheduler.keys, source, FOREIGN), "_class_name": name}
        for wrong, words in _conflicts(scheduler, config, learned):
            if wrong:
                raise ValueError(words)
        if scheduler.make:
            made = scheduler.make(config, tokens)
        else:
            made = Process(
                schedule_of(config, scheduler.spacing),
                PREDICTIONS[config["prediction_type"]](),
                label_of(config, scheduler.spacing),
                _sampler(scheduler, config, tokens),
            )
        return made._replace(prediction=predictions.LearnedVariance(made.prediction)) if learned else made


def _sampler(scheduler: Kind, config, tokens) -> Sampler:
    solver = scheduler.solver(config)
    grid, to_zero = grid_of(config, scheduler.spacing, tokens), to_zero_of(config)
    steps = config["num_train_timesteps"] if config["_class_name"] == "DDPMScheduler" else None
    kept = isinstance(getattr(solver, "solver", solver), DDIMKeptNoise)
    changes = [] if kept else filter(None, [guidance_of(config)])
    return Sampler(solver, grid if to_zero else WithFirst(grid), steps, tuple(changes), to_zero)


def _conflicts(scheduler: Kind, config, learned) -> list[tuple[bool, str]]:
    """What keys say that do not go together, each with whether it is so here."""
    said = config.get
    steps, betas, ending = said("num_train_timesteps"), said("trained_betas"), said("final_sigmas_type")
    algorithm, shorter = said("algorithm_type", ""), scheduler.spacing == "shorter"
    zero = said("rescale_betas_zero_snr") and config["_class_name"] in ("DDPMScheduler", "DDIMScheduler")
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    sigmas = [name for name in names if said(name)]
    unipc, plain = config["_class_name"] == "UniPCMultistepScheduler", said("solver_type") != "bh1"
    flow, dynamic = said("use_flow_sigmas"), said("use_dynamic_shifting")
    return [
        (
            betas is not None and len(betas) != steps,
            f"`num_train_timesteps` is {steps}, and `trained_betas` are {len(betas or [])}: they must be as many",
        ),
        (len(sigmas) > 1, f"at most one of {sigmas} may be true"),
        (
            bool(sigmas) and shorter and said("beta_schedule") == "squaredcos_cap_v2",
            f"{sigmas} must be false where `beta_schedule` is 'squaredcos_cap_v2': diffusers has them at one time step",
        ),
        (
            algorithm in ("dpmsolver", "sde-dpmsolver") and ending == "zero",
            f"`final_sigmas_type` must be 'sigma_min' for `algorithm_type` {algorithm!r}; received: 'zero'",
        ),
        (
            unipc and ending == "zero" and not (plain and said("predict_x0") and said("lower_order_final")),
            "`final_sigmas_type` must be 'sigma_min' unless `predict_x0` and `lower_order_final` are true and "
            "`solver_type` is 'bh2': in diffusers the last step is not a number",
        ),
        (
            algorithm == "sde-dpmsolver" and said("solver_order") == 3,
            "`solver_order` must be 1 or 2 for `algorithm_type` 'sde-dpmsolver'; received: 3",
        ),
        (
            said("variance_type") == "learned_range" and not learned and not shorter,
            "`variance_type` 'learned_range' needs a network with twice as many channels in its output",
        ),
        (
            bool(zero) and said("prediction_type") == "epsilon" and said("timestep_spacing") != "leading",
            "`rescale_betas_zero_snr` ends in nothing but noise, of which 'epsilon' tells no data; `prediction_type` "
            "must be 'v_prediction' or 'sample'",
        ),
        (
            said("prediction_type") == "flow_prediction" and not flow,
            "`use_flow_sigmas` must be true where `prediction_type` is 'flow_prediction'",
        ),
        (bool(flow) and bool(sigmas), f"`use_flow_sigmas` must be false where {sigmas} are true"),
        (
            bool(dynamic) and shorter and not flow,
            "`use_flow_sigmas` must be true where `use_dynamic_shifting` is",
        ),
        (
            said("shift_terminal") is not None and shorter and not flow,
            "`use_flow_sigmas` must be true where there is a `shift_terminal`",
        ),
        (
            bool(said("sigma_min") or said("sigma_max")) and not scheduler.make and not sigmas,
            "`sigma_min` and `sigma_max` must be None, unless one of "
            f"{list(names[:3])} is true, without which diffusers has no use for them",
        ),
        (
            said("timestep_type") == "continuous" and bool(said("rescale_betas_zero_snr")),
            "`rescale_betas_zero_snr` must be false where `timestep_type` is 'continuous'",
        ),
    ]
