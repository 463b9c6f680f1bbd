"""The configurations of diffusers' schedulers: the valid values of each key, class by class."""

import math

from kdiff.interop.configs import FLAG, LARGEST, Key, Rule, either, listed, one_of, only, optional, real, whole

__all__ = [
    "ALGORITHMS",
    "ANY",
    "BETA",
    "BETA_SCHEDULES",
    "CLIPPING",
    "DPM",
    "EDM",
    "ENDING",
    "FLOW",
    "FLOW_MATCHING",
    "LATE",
    "LEADING",
    "LINSPACE",
    "NO_DATA",
    "ORDERED",
    "PREDICTED",
    "SIGMA",
    "SIGMAS",
    "SIGMA_ENDS",
    "SPACINGS",
    "STEPS",
    "SWITCH",
    "TABLE",
    "THRESHOLD",
    "VARIANCES",
    "ZERO_SNR",
]

SPACINGS = ("leading", "trailing", "linspace")
PREDICTED = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")

ANY = Rule("anything", lambda value: True)  # for keys that diffusers itself does not use
SWITCH = either(FLAG, one_of(None))
STEPS = whole(1)
BETA = real(0.0, 1.0)
SIGMA = optional(real(1e-8, 1e8))

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # supported by every class; others by a few
TABLE = {
    "num_train_timesteps": Key(1000, STEPS),
    "beta_start": Key(0.0001, BETA),
    "beta_end": Key(0.02, BETA),
    "beta_schedule": Key("linear", one_of(*BETA_SCHEDULES)),
    "trained_betas": Key(None, optional(listed(BETA, 1, LARGEST))),
    "prediction_type": Key("epsilon", one_of(*PREDICTED)),
    "steps_offset": Key(0, whole(0)),
}
LATE = {"beta_start": Key(0.00085, BETA), "beta_end": Key(0.012, BETA)}  # the defaults in Heun, DPM2 and others
NO_DATA = {"prediction_type": Key("epsilon", one_of("epsilon", "v_prediction"))}
ZERO_SNR = {"rescale_betas_zero_snr": Key(False, SWITCH)}
CLIPPING = {"clip_sample": Key(True, SWITCH), "clip_sample_range": Key(1.0, real(0.0, 1e6))}
THRESHOLD = {
    "thresholding": Key(False, SWITCH),
    "dynamic_thresholding_ratio": Key(0.995, real(0.0, 1.0)),
    "sample_max_value": Key(1.0, real(1e-6, 1e6)),
}
LEADING = {"timestep_spacing": Key("leading", one_of(*SPACINGS))}
LINSPACE = {"timestep_spacing": Key("linspace", one_of(*SPACINGS))}
SIGMAS = {
    "use_karras_sigmas": Key(False, SWITCH),
    "use_exponential_sigmas": Key(False, SWITCH),
    "use_beta_sigmas": Key(False, SWITCH),
}
SIGMA_ENDS = {"sigma_min": Key(None, SIGMA), "sigma_max": Key(None, SIGMA)}
FLOW = {
    "prediction_type": Key("epsilon", one_of(*PREDICTED, "flow_prediction")),
    "use_flow_sigmas": Key(False, SWITCH),
    "flow_shift": Key(1.0, real(1e-3, 1e6)),
    "use_dynamic_shifting": Key(False, SWITCH),
    "time_shift_type": only("exponential"),
}
ORDERED = {
    **TABLE,
    **THRESHOLD,
    **LINSPACE,
    **SIGMAS,
    **FLOW,
    "solver_order": Key(2, one_of(1, 2, 3)),
    "lower_order_final": Key(True, SWITCH),
}
ENDING = {"final_sigmas_type": Key("zero", one_of("zero", "sigma_min"))}
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
# Each of the three families of multistep solvers accepts the others' variants, and uses its own default then.
DPM = {
    "algorithm_type": Key("dpmsolver++", one_of(*ALGORITHMS, "deis")),
    "solver_type": Key("midpoint", one_of("midpoint", "heun", "logrho", "bh1", "bh2")),
    "variance_type": Key(None, ANY),
    "lambda_min_clipped": Key(-math.inf, either(real(-100.0, 100.0), one_of(-math.inf, None))),
}
FLOW_MATCHING = {
    "num_train_timesteps": Key(1000, STEPS),
    "shift": Key(1.0, real(1e-3, 1e3)),
    "use_dynamic_shifting": Key(False, SWITCH),
    "invert_sigmas": only(False, None),
    "shift_terminal": Key(None, optional(real(1e-6, 0.999))),
    **SIGMAS,
    "stochastic_sampling": Key(False, SWITCH),
    # For dynamic shifting only.
    "base_shift": Key(0.5, optional(real(-1e3, 1e3))),
    "max_shift": Key(1.15, optional(real(-1e3, 1e3))),
    "base_image_seq_len": Key(256, optional(whole(1))),
    "max_image_seq_len": Key(4096, optional(whole(1))),
    "time_shift_type": Key("exponential", one_of("exponential", "linear")),
}
EDM = {
    "sigma_min": Key(0.002, real(1e-8, 1e8)),
    "sigma_max": Key(80.0, real(1e-8, 1e8)),
    "sigma_data": Key(0.5, real(1e-6, 1e6)),
    "sigma_schedule": Key("karras", one_of("karras", "exponential")),
    "num_train_timesteps": Key(1000, STEPS),
    "prediction_type": Key("epsilon", one_of("epsilon", "v_prediction")),
    "rho": Key(7.0, real(1e-3, 1e3)),
    **ENDING,
}
