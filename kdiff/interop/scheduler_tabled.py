"""The schedulers of diffusers with a table of betas: their keys and their solvers."""

from kdiff import solvers
from kdiff.interop.configs import FLAG, Key, listed, one_of, only, optional, real, whole
from kdiff.interop.multistep import (
    BothWays,
    DiffusersDEIS,
    DiffusersDPMSolver,
    DiffusersDPMSolverPP,
    DiffusersDPMSolverPPSDE,
    DiffusersDPMSolverSDE,
    DiffusersSinglestep,
    DiffusersSinglestepPP,
    DiffusersSinglestepSDE,
    DiffusersUniPC,
)
from kdiff.interop.scheduler_keys import (
    ANY,
    BETA_SCHEDULES,
    CLIPPING,
    DPM,
    ENDING,
    FLOW,
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
from kdiff.interop.scheduler_parts import PREDICTIONS, Kind, guidance_of
from kdiff.interop.solvers import (
    DDIMInverted,
    DDIMKeptNoise,
    DiffusersPNDM,
    DiffusersTCD,
    EvenSteps,
    NoisyEnd,
    PseudoRungeKutta,
)

__all__ = ["DISTILLED", "DYNAMIC", "MULTISTEP", "OF_VARIANCE", "SINGLESTEP", "TABLED", "WARMUPS", "multistep"]

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


def multistep(config):
    """kdiff's own solver if it is equal: at orders 1 and 2, if the final order is 1 in every run or in none."""
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


def _inverted(config):
    return DDIMInverted(
        PREDICTIONS[config["prediction_type"]](), config["clip_sample_range"] if config["clip_sample"] else None
    )


def _both_ways(config):
    """The order falls only in short runs, which end above t = 0."""
    kind = MULTISTEP["dpmsolver++" if config["algorithm_type"] == "deis" else config["algorithm_type"]][1]
    variant = config["solver_type"] if config["solver_type"] in ("midpoint", "heun") else "midpoint"
    lower, euler = bool(config["lower_order_final"]), bool(config["euler_at_final"])
    return BothWays(kind(config["solver_order"], variant, lower, euler))


def _singlestep(config):
    """diffusers also splits the last block if it is incomplete, or if the run ends at t = 0."""
    kind = SINGLESTEP["dpmsolver++" if config["algorithm_type"] == "deis" else config["algorithm_type"]]
    variant = config["solver_type"] if config["solver_type"] in ("midpoint", "heun") else "midpoint"
    lower = bool(config["lower_order_final"]) or config["final_sigmas_type"] == "zero"
    return kind(config["solver_order"], variant, lower)


SINGLESTEP = {
    "dpmsolver++": DiffusersSinglestepPP,
    "dpmsolver": DiffusersSinglestep,
    "sde-dpmsolver++": DiffusersSinglestepSDE,
}


def _sa(config):
    """The default tau of diffusers, as a file has no function: 1 for labels from 200 to 800, which few steps have."""
    steps, flow = config["num_train_timesteps"], bool(config["use_flow_sigmas"])
    low, high = (place / steps for place in ((200.0, 801.0) if flow else (200.5, 801.5)))
    tau = solvers.Within(1.0, low, min(1.0, high)) if low <= 1.0 else 0.0
    orders = config["predictor_order"], config["corrector_order"]
    return solvers.SASolver(tau, *orders, bool(config["lower_order_final"]), "bh1")


# --- classes

DISTILLED = {
    **TABLE,
    **LATE,
    **ZERO_SNR,
    **CLIPPING,
    **THRESHOLD,
    **LEADING,
    "beta_schedule": Key("scaled_linear", TABLE["beta_schedule"].rule),
    "clip_sample": Key(False, SWITCH),
    "set_alpha_to_one": Key(True, FLAG),
    "original_inference_steps": Key(50, whole(1)),
    "timestep_scaling": Key(10.0, real(0.0, 1e6)),
}
DYNAMIC = ("solver_order", "use_dynamic_shifting", "time_shift_type")

TABLED = {
    "DDPMScheduler": Kind(
        {
            **TABLE,
            **ZERO_SNR,
            **CLIPPING,
            **THRESHOLD,
            **LEADING,
            "beta_schedule": Key("linear", one_of(*BETA_SCHEDULES, "sigmoid", "laplace")),
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
        multistep,
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
        {
            **TABLE,
            **LATE,
            **NO_DATA,
            **LINSPACE,
            **SIGMAS,
            **CLIPPING,
            "beta_schedule": Key("linear", one_of(*BETA_SCHEDULES, "exp")),
            "clip_sample": Key(False, SWITCH),
        },
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
    "DDIMInverseScheduler": Kind(
        {
            **TABLE,
            **ZERO_SNR,
            **CLIPPING,
            "timestep_spacing": Key("leading", one_of("leading", "trailing")),
            "set_alpha_to_one": Key(True, FLAG),
            "set_alpha_to_zero": Key(None, SWITCH),  # an older name, which has precedence
        },
        _inverted,
    ),
    "DPMSolverMultistepInverseScheduler": Kind(
        {
            **TABLE,
            **THRESHOLD,
            **DPM,
            # On "trailing", and with noise levels, the last step has length 0 in diffusers; with noise it gives NaN.
            "timestep_spacing": Key("linspace", one_of("linspace", "leading")),
            "algorithm_type": Key("dpmsolver++", one_of("dpmsolver++", "dpmsolver", "deis")),
            "solver_order": ORDERED["solver_order"],
            "lower_order_final": ORDERED["lower_order_final"],
            "euler_at_final": Key(False, SWITCH),
            **{name: only(False, None) for name in (*SIGMAS, "use_flow_sigmas")},
            "flow_shift": FLOW["flow_shift"],
        },
        _both_ways,
        "upwards",
        to_zero=False,
    ),
    "LCMScheduler": Kind(
        DISTILLED, lambda config: solvers.LCM(0.5, config["timestep_scaling"]), "distilled", to_zero=True
    ),
    "TCDScheduler": Kind(DISTILLED, lambda config: DiffusersTCD(), "distilled", to_zero=False),
    "DPMSolverSinglestepScheduler": Kind(
        {
            **{name: key for name, key in ORDERED.items() if name not in ("timestep_spacing", "steps_offset")},
            **ENDING,
            **DPM,
            "algorithm_type": Key("dpmsolver++", one_of(*SINGLESTEP, "deis")),
            "lower_order_final": Key(False, SWITCH),
        },
        _singlestep,
        "shorter",
    ),
    "DPMSolverSDEScheduler": Kind(
        {**TABLE, **LATE, **NO_DATA, **LINSPACE, **SIGMAS, "noise_sampler_seed": Key(None, ANY)},
        lambda config: solvers.DPMSolverPPSinglestepSDE(),
        "unrounded",
    ),
    "SASolverScheduler": Kind(
        {
            **{name: key for name, key in ORDERED.items() if name not in DYNAMIC},
            "predictor_order": Key(2, one_of(1, 2, 3)),
            "corrector_order": Key(2, one_of(1, 2, 3)),
            "algorithm_type": only("data_prediction"),
            "tau_func": only(None),
            "variance_type": DPM["variance_type"],
            "lambda_min_clipped": DPM["lambda_min_clipped"],
        },
        _sa,
        "shorter",
    ),
    "UnCLIPScheduler": Kind(
        {
            "num_train_timesteps": TABLE["num_train_timesteps"],
            **CLIPPING,
            "variance_type": Key("fixed_small_log", one_of("fixed_small_log", "learned_range")),
            "prediction_type": Key("epsilon", one_of("epsilon", "sample")),
            "beta_schedule": only("squaredcos_cap_v2"),
        },
        lambda config: solvers.DDPM(OF_VARIANCE[config["variance_type"]]),
    ),
}
TABLED |= {"DDIMParallelScheduler": TABLED["DDIMScheduler"], "DDPMParallelScheduler": TABLED["DDPMScheduler"]}
