"""The schedulers of diffusers without a table of betas: rectified flow, EDM, consistency models, and others."""

from kdiff import guidance, predictions, schedules, solvers, times
from kdiff.interop.configs import Key, one_of, only, optional, real, whole
from kdiff.interop.grids import Consistent, FlowMatching, SineSquared, Uniform, WithFirst
from kdiff.interop.predictions import ConsistencyKarras
from kdiff.interop.scheduler_keys import ALGORITHMS, EDM, FLOW_MATCHING, STEPS, SWITCH, THRESHOLD
from kdiff.interop.scheduler_parts import Kind, Process, guidance_of, noise_grid_of, shift_of
from kdiff.interop.scheduler_tabled import multistep
from kdiff.interop.score_sde import DownTo, EulerMaruyama, PredictorCorrector
from kdiff.interop.solvers import DiffusersIPNDM, FlowLine, QuietEnd
from kdiff.interop.tables import WuerstchenCosine
from kdiff.sampling import Sampler

__all__ = ["UNTABLED"]


def _flow_matching(config, tokens) -> Process:
    shift, terminal = shift_of(config, tokens), config["shift_terminal"]
    last = 1.0 / config["num_train_timesteps"] if config["use_dynamic_shifting"] else None
    grid = FlowMatching(shift, config["num_train_timesteps"], last, terminal, noise_grid_of(config))
    solver = solvers.Consistency() if config["stochastic_sampling"] else solvers.Euler()
    return _flow(config, Sampler(solver, grid))


def _flow(config, sampler) -> Process:
    return Process(
        schedules.Rectified(), predictions.Flow(), times.Scaled(float(config["num_train_timesteps"])), sampler
    )


def _heun(config, tokens) -> Process:
    grid = FlowMatching(float(config["shift"]), config["num_train_timesteps"])
    return _flow(config, Sampler(solvers.Heun(FlowLine()), grid))


def _edm(config, tokens) -> Process:
    """Variance exploding, with Karras' preconditioning, of opposite sign for "v_prediction"."""
    ends = {"sigma_min": config["sigma_min"], "sigma_max": config["sigma_max"]}
    karras = config["sigma_schedule"] == "karras"
    grid = times.Karras(config["rho"], **ends) if karras else times.Exponential(**ends)
    to_zero = config["final_sigmas_type"] == "zero"
    solver = multistep(config) if "solver_order" in config else solvers.Euler()
    kind = predictions.Karras if config["prediction_type"] == "epsilon" else predictions.TrigFlow
    changes = tuple(filter(None, [guidance_of(config)]))
    sampler = Sampler(solver, grid if to_zero else WithFirst(grid), None, changes, to_zero)
    schedule = schedules.VarianceExploding(*ends.values())
    return Process(schedule, kind(config["sigma_data"]), times.LogSNR(-0.125), sampler)


def _consistency(config, tokens) -> Process:
    """A consistency model: Song et al. 2023, whose network receives 1000 log(sigma) / 4."""
    low, high = config["sigma_min"], config["sigma_max"]
    grid = Consistent(config["num_train_timesteps"], config["rho"], low, high)
    changes = (guidance.Clip(1.0),) if config["clip_denoised"] else ()
    sampler = Sampler(solvers.Consistency(low), grid, None, changes)
    prediction = ConsistencyKarras(config["sigma_data"], low)
    return Process(schedules.VarianceExploding(low, high), prediction, times.LogSNR(-125.0), sampler)


def _flow_lcm(config, tokens) -> Process:
    """Each step goes to the estimate of the data and adds new noise: stochastic sampling of flow matching."""
    return _flow_matching({**config, "stochastic_sampling": True}, tokens)


def _ipndm(config, tokens) -> Process:
    sampler = Sampler(DiffusersIPNDM(4), SineSquared())
    return Process(schedules.Trigonometric(1e-8), predictions.Velocity(), times.Scaled(1.0), sampler)


def _wuerstchen(config, tokens) -> Process:
    schedule = WuerstchenCosine(float(config["scaler"]), float(config["s"]))
    return Process(schedule, predictions.Noise(), times.Scaled(1.0), Sampler(QuietEnd(), Uniform(), to_zero=False))


def _score_sde(config, tokens) -> Process:
    """Song et al. 2021; its networks receive sigma, of which kdiff's take the logarithm."""
    epsilon = config["sampling_eps"]
    solver = PredictorCorrector(config["snr"], config["correct_steps"], epsilon)
    schedule = schedules.VarianceExploding(config["sigma_min"], config["sigma_max"])
    return Process(schedule, predictions.Score(), times.LogSNR(-0.5), Sampler(solver, DownTo(epsilon)))


def _score_sde_vp(config, tokens) -> Process:
    """Song et al. 2021; its networks receive (T - 1) t, as in training; in old pipelines T is that of the run."""
    schedule = schedules.LinearVP(float(config["beta_min"]), float(config["beta_max"]), 1e-8)
    label = times.Scaled(config["num_train_timesteps"] - 1.0)
    return Process(schedule, predictions.Noise(), label, Sampler(EulerMaruyama(), DownTo(config["sampling_eps"])))


UNTABLED = {
    "FlowMatchEulerDiscreteScheduler": Kind(FLOW_MATCHING, make=_flow_matching),
    "FlowMatchLCMScheduler": Kind(
        {
            **{name: key for name, key in FLOW_MATCHING.items() if name != "stochastic_sampling"},
            "scale_factors": only(None),
            "upscale_mode": Key("bicubic", optional(one_of("bicubic", "bilinear", "nearest", "nearest-exact", "area"))),
        },
        make=_flow_lcm,
    ),
    "FlowMatchHeunDiscreteScheduler": Kind(
        {name: FLOW_MATCHING[name] for name in ("num_train_timesteps", "shift")}, make=_heun
    ),
    "EDMEulerScheduler": Kind(EDM, make=_edm),
    "EDMDPMSolverMultistepScheduler": Kind(
        {
            **EDM,
            **THRESHOLD,
            "solver_order": Key(2, one_of(1, 2, 3)),
            "algorithm_type": Key("dpmsolver++", one_of(*ALGORITHMS[::2], "deis")),
            "solver_type": Key("midpoint", one_of("midpoint", "heun", "logrho", "bh1", "bh2")),
            "lower_order_final": Key(True, SWITCH),
            "euler_at_final": Key(False, SWITCH),
        },
        make=_edm,
    ),
    "CMStochasticIterativeScheduler": Kind(
        {
            "num_train_timesteps": Key(40, whole(2)),
            **{name: EDM[name] for name in ("sigma_min", "sigma_max", "sigma_data", "rho")},
            "s_noise": only(1.0),
            "clip_denoised": Key(True, SWITCH),
        },
        make=_consistency,
    ),
    "IPNDMScheduler": Kind({"num_train_timesteps": Key(1000, STEPS), "trained_betas": only(None)}, make=_ipndm),
    "ScoreSdeVeScheduler": Kind(
        {
            "num_train_timesteps": Key(2000, STEPS),
            "snr": Key(0.15, real(1e-6, 1e3)),
            "sigma_min": Key(0.01, real(1e-6, 1e6)),
            "sigma_max": Key(1348.0, real(1e-6, 1e6)),
            "sampling_eps": Key(1e-5, real(1e-12, 0.1)),
            "correct_steps": Key(1, whole(0, 100)),
        },
        make=_score_sde,
    ),
    "ScoreSdeVpScheduler": Kind(
        {
            "num_train_timesteps": Key(2000, whole(2)),
            "beta_min": Key(0.1, real(1e-4, 100.0)),
            "beta_max": Key(20, real(1e-4, 100.0)),
            "sampling_eps": Key(1e-3, real(1e-6, 0.1)),
        },
        make=_score_sde_vp,
    ),
    "DDPMWuerstchenScheduler": Kind(
        {"scaler": Key(1.0, real(0.01, 100.0)), "s": Key(0.008, real(0.0, 1.0))}, make=_wuerstchen
    ),
}
