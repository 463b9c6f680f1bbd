"""Schedulers of diffusers, translated to a schedule, a prediction, a time label and a sampler.

    beta_schedule, trained_betas, rescale_betas_zero_snr      the schedule
    prediction_type                                           the prediction
    the class, algorithm_type, solver_order, variance_type    the solver
    timestep_spacing, steps_offset, use_karras_sigmas         the grid; and how the time label is rounded
    set_alpha_to_one, final_sigmas_type                       whether the run ends at t = 0
    clip_sample, thresholding                                 the guidance

A key that cannot be translated is an error; keys of other classes are ignored, as in diffusers.
"""

from typing import Any

from kdiff import predictions
from kdiff.interop.configs import complete, explained, kind
from kdiff.interop.foreign import FOREIGN
from kdiff.interop.grids import WithFirst
from kdiff.interop.scheduler_parts import (
    PREDICTIONS,
    Kind,
    Process,
    end_of,
    grid_of,
    guidance_of,
    label_of,
    schedule_of,
    to_zero_of,
)
from kdiff.interop.scheduler_tabled import TABLED
from kdiff.interop.scheduler_untabled import UNTABLED
from kdiff.interop.solvers import DDIMInverted, DDIMKeptNoise, DiffusersTCD
from kdiff.sampling import Sampler

__all__ = ["ALL_STEPS", "KINDS", "REFUSED", "process"]

KINDS = {**TABLED, **UNTABLED}
REFUSED = {
    "CogVideoXDDIMScheduler": "it shifts noise levels for video; use DDIMScheduler for pictures",
    "CogVideoXDPMScheduler": "it shifts noise levels for video; use DPMSolverMultistepScheduler for pictures",
    "RePaintScheduler": "it is for inpainting; use guidance.Inpaint and times.Jumps with DDPMScheduler",
    **dict.fromkeys(
        (
            "AmusedScheduler",
            "BlockRefinementScheduler",
            "DiscreteDDIMScheduler",
            "EntropyBoundScheduler",
            "VQDiffusionScheduler",
        ),
        "it is for discrete tokens",
    ),
    **dict.fromkeys(
        ("HeliosScheduler", "HeliosDMDScheduler"),
        "it changes the resolution of a video within a run, which is not supported",
    ),
    "ConsistencyDecoderScheduler": "it is for a two-step decoder of latents; kdiff has the decoders of autoencoders",
    "CosineDPMSolverMultistepScheduler": "it is for Stable Audio, which kdiff does not have; for EDM's noise levels "
    "use EDMDPMSolverMultistepScheduler",
    "FlowMapEulerDiscreteScheduler": "its networks receive the end of a step as well as its start, which is not "
    "supported",
    "LTXEulerAncestralRFScheduler": "it is for LTX-Video, which kdiff does not have; use solvers.EulerAncestral "
    "with the schedule of FlowMatchEulerDiscreteScheduler",
    "MiniMaxH3Scheduler": "it is for MiniMax's video, which kdiff does not have; its steps are those of "
    "FlowMatchEulerDiscreteScheduler with a `shift` of 12",
    "PiflowScheduler": "its networks return a policy for many steps at once, not one velocity",
    "RFD4ProteinaScheduler": "it has separate times for two modalities of a protein",
    "SCMScheduler": "it is for Sana's networks, distilled to trigonometric time, which kdiff does not have",
    "KarrasVeScheduler": "it is an older version of EDMEulerScheduler; use that",
}
ALL_STEPS = ("DDPMScheduler", "DDPMParallelScheduler")  # classes whose runs have every step by default


def process(config: dict[str, Any], source: Any, learned: bool = False, tokens: int | None = None) -> Process:
    """The process that the configuration of a scheduler describes.

    Args:
        config: the configuration.
        source: its file, for errors.
        learned: whether the network also predicts the variance.
        tokens: the length of the sequence of the transformer, (height / patch) (width / patch), on which the times
            depend if `use_dynamic_shifting` is true.

    Raises:
        ValueError: if the class is not supported; if the value of a key is not supported, or keys contradict each
            other.
    """
    name = config.get("_class_name")
    with explained(source):
        if config.get("predict_epsilon", True) is not True and "prediction_type" not in config:
            raise ValueError('`predict_epsilon` is from an old version; use `prediction_type` "sample" instead')
        config = {key: value for key, value in config.items() if key != "predict_epsilon"}
        if name in REFUSED:
            raise ValueError(f"kdiff does not support {name}: {REFUSED[name]}")
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
        if config.get("sigma_min") or config.get("sigma_max"):
            made.sampler.grid(made.schedule, 3)  # raises now if the table is too short
        return made._replace(prediction=predictions.LearnedVariance(made.prediction)) if learned else made


def _sampler(scheduler: Kind, config, tokens) -> Sampler:
    solver = scheduler.solver(config)
    grid, to_zero = grid_of(config, scheduler.spacing, tokens), to_zero_of(config)
    to_zero = to_zero if scheduler.to_zero is None else scheduler.to_zero
    steps = config["num_train_timesteps"] if config["_class_name"] in ALL_STEPS else None
    kept = isinstance(getattr(solver, "solver", solver), (DDIMKeptNoise, DDIMInverted, DiffusersTCD))
    changes = [] if kept else filter(None, [guidance_of(config)])
    ends = to_zero or scheduler.spacing == "upwards"
    return Sampler(solver, grid if ends else WithFirst(grid, end_of(config)), steps, tuple(changes), to_zero)


def _conflicts(scheduler: Kind, config, learned) -> list[tuple[bool, str]]:
    """Contradictions between keys, each with whether it occurs here."""
    said = config.get
    steps, betas, ending = said("num_train_timesteps"), said("trained_betas"), said("final_sigmas_type")
    algorithm, shorter = said("algorithm_type", ""), scheduler.spacing in ("shorter", "upwards")
    zero = said("rescale_betas_zero_snr") and scheduler.spacing in ("rounded", "distilled")
    first = said("timestep_spacing") != "leading" or scheduler.spacing == "distilled"
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    sigmas = [name for name in names if said(name)]
    unipc, plain = config["_class_name"] == "UniPCMultistepScheduler", said("solver_type") != "bh1"
    flow, dynamic = said("use_flow_sigmas"), said("use_dynamic_shifting")
    return [
        (
            betas is not None and len(betas) != steps,
            f"`num_train_timesteps` is {steps}, but `trained_betas` has {len(betas or [])} values",
        ),
        (len(sigmas) > 1, f"at most one of {sigmas} may be true"),
        (
            bool(sigmas) and shorter and said("beta_schedule") == "squaredcos_cap_v2",
            f"{sigmas} must be false where `beta_schedule` is 'squaredcos_cap_v2': diffusers has them at one time",
        ),
        (
            algorithm in ("dpmsolver", "sde-dpmsolver") and ending == "zero",
            f"`final_sigmas_type` must be 'sigma_min' for `algorithm_type` {algorithm!r}; received: 'zero'",
        ),
        (
            unipc and ending == "zero" and not (plain and said("predict_x0") and said("lower_order_final")),
            "`final_sigmas_type` must be 'sigma_min' unless `predict_x0` and `lower_order_final` are true and "
            "`solver_type` is 'bh2': in diffusers the last step gives NaN",
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
            bool(zero) and said("prediction_type") == "epsilon" and first,
            "`rescale_betas_zero_snr` ends in pure noise, from which 'epsilon' cannot give the data; `prediction_type` "
            "must be 'v_prediction' or 'sample'",
        ),
        (
            config["_class_name"] == "DDIMInverseScheduler"
            and said("prediction_type") == "sample"
            and to_zero_of(config),
            "`set_alpha_to_one` must be false where `prediction_type` is 'sample': x does not determine the noise",
        ),
        (
            said("prediction_type") == "flow_prediction" and not flow,
            "`use_flow_sigmas` must be true where `prediction_type` is 'flow_prediction'",
        ),
        (
            bool(flow) and said("prediction_type") == "v_prediction",
            "`prediction_type` must not be 'v_prediction' where `use_flow_sigmas` is true: diffusers' alpha x_t - "
            "sigma v holds where alpha^2 + sigma^2 is 1; if the network gives noise - x, it is 'flow_prediction'",
        ),
        (
            bool(flow) and unipc and said("prediction_type") == "epsilon",
            "`prediction_type` must not be 'epsilon' where `use_flow_sigmas` is true: with UniPC the run starts where "
            "alpha is 1e-6, and few digits of (x_t - sigma noise) / alpha are left in float32",
        ),
        (bool(flow) and bool(sigmas), f"`use_flow_sigmas` must be false where {sigmas} are true"),
        (
            bool(dynamic) and shorter and not flow,
            "`use_flow_sigmas` must be true where `use_dynamic_shifting` is",
        ),
        (
            said("shift_terminal") is not None and shorter and not flow,
            "`use_flow_sigmas` must be true if `shift_terminal` is given",
        ),
        (
            bool(said("sigma_min") or said("sigma_max")) and not scheduler.make and not sigmas,
            "`sigma_min` and `sigma_max` must be None, unless one of "
            f"{list(names[:3])} is true; otherwise diffusers does not use them",
        ),
        (
            said("timestep_type") == "continuous" and bool(said("rescale_betas_zero_snr")),
            "`rescale_betas_zero_snr` must be false where `timestep_type` is 'continuous'",
        ),
    ]
