"""Guidance for inverse problems: a known part of the image, or a measurement y = A x + noise.

Inpainting needs no gradient: the estimate is replaced where the image is known. The other rules add the gradient of
log p(y | x_t), for a Gaussian approximation of p(x | x_t) with mean x_hat and some covariance:

    E[x | x_t, y] = x_hat + (sigma^2 / alpha) grad log p(y | x_t).

With the covariance r^2 I of PiGDM it is exact for data N(mean, s^2 I); with that of `MomentMatching`, for any Gaussian.
"""

from typing import Any

import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import check_integer, check_number
from kdiff.checks import like_bytes
from kdiff.denoisers import Denoiser, Estimate
from kdiff.guidance.base import Guidance, Here, Run, check_scale, over
from kdiff.operators import Operator, conjugate_gradients
from kdiff.schedules import Marginal, bridge

__all__ = ["DPS", "Inpaint", "MomentMatching", "PiGDM"]


class Inpaint(Guidance):
    """Inpainting: pixels are generated where `mask` is 1, kept from `image` where it is 0, and edited in between:

        x_hat <- x_hat where t <= mask (anywhere if mask = 1, nowhere if 0), else image.

    The known pixels then follow q(x_then | x_now, image) with any solver. A mask value is a strength, as in
    `DiffusionModel.sample`: a pixel follows the image until time `mask` and the network afterwards, so the mask may be
    soft (Levin & Fried 2023, "Differential Diffusion", arXiv:2306.00950, section 3). Visible borders between generated
    and known regions can be harmonised by resampling (RePaint, Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1), a
    grid with jumps:

        Sampler("ddpm", times.Jumps("trailing", length=10, repeats=10), steps=250, guidance=Inpaint(image, mask))

    With `noise`, the network sees the known pixels with the same noise at all noise levels, whatever the solver draws:

        x <- x where t <= mask, else alpha image + sigma noise,     then x_hat as above.

    Only the first call of a whole run sees the x from which it begins. So does `StableDiffusionInpaintPipeline` of
    diffusers with a network that takes no mask; Avrahami et al. 2022, "Blended Latent Diffusion" (arXiv:2206.02779,
    algorithm 1), draw new noise in every step. The mask has the size of the data, that of the latents if there are any:

        rules = [ClassifierFree(7.5), Inpaint(photo, mask[::8, ::8], noise)]
        model.sample(4, text="a hat", x=noise, guidance=rules)

    Args:
        image: one image for all samples, or one per sample, as the model takes it: uint8, or in [-1, 1]. Other data
            works in the same way.
        mask: values in [0, 1] with shape `(height, width)`, optionally with a last axis of 1 or of the channels; one
            for all samples, or one per sample. None: 1 where `image` is NaN, 0 elsewhere.
        noise: standard normal noise with the shape of the data, one for all samples or one per sample. None: that of
            the solver, which is the same throughout a run only if the solver is deterministic and the run begins from
            `image` with noise.

    Raises:
        ValueError: if the mask is not in [0, 1], or the image is NaN where the mask is below 1; in a run, if the image,
            the mask or the noise has another size, or the noise is not finite.
    """

    arrays = ("image", "mask", "noise")

    def __init__(self, image: Any, mask: Any = None, noise: Any = None):
        self.image = np.asarray(image)
        self.noise = None if noise is None else np.asarray(noise)
        missing = np.isnan(self.image) if self.image.dtype.kind == "f" else np.zeros(self.image.shape, bool)
        self.mask = missing if mask is None else np.asarray(mask)
        if not ((self.mask >= 0) & (self.mask <= 1)).all():
            raise ValueError(
                "Inpaint: `mask` must be in [0, 1]: 1, or True, where the image is generated, 0 where it is kept, "
                f"and in between where it is edited; received values from {self.mask.min()} to {self.mask.max()}"
            )
        self._missing = missing

    def rows(self, run: Run):
        """The image, the mask and the noise, if any, of each sample."""
        image = np.where(self._missing, 0, self.image).astype(self.image.dtype)
        rows = {"image": run.examples(self, "image", image), "mask": self._mask_rows(run)}
        if self._missing.any() and (run.rows(self, "image", self._missing, run.shape[1:]) > rows["mask"]).any():
            raise ValueError("Inpaint: `image` must not be NaN where `mask` is below 1")
        return rows if self.noise is None else {**rows, "noise": run.rows(self, "noise", self.noise, run.shape[1:])}

    def _mask_rows(self, run: Run):
        count, *size, channels = run.shape
        for mask in (self.mask, self.mask[..., None]):
            for shape in ((*size, channels), (*size, 1)):
                if mask.shape in (shape, (count, *shape)):
                    return run.rows(self, "mask", mask, shape)
        raise ValueError(
            f"Inpaint: `mask` must have the shape {tuple(size)}, optionally with a first axis of {count} samples and a "
            f"last axis of 1 or {channels} channels; received: {self.mask.shape}"
        )

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        image, mask, at = here.rows["image"], here.rows["mask"], m.like(x)
        painted = (mask >= 1.0) | ((mask > 0.0) & (at.t <= mask))
        if "noise" in here.rows:
            known = at.alpha * image + at.sigma * here.rows["noise"]
            x = ops.where(ops.logical_or(painted, self._is_first(at, here)), x, known)
        estimate = denoise(x, m)
        return estimate.guided(ops.where(painted, estimate.x_hat, image))

    def finish(self, x, rows):
        """The image without noise where it is known."""
        return ops.where(rows["mask"] > 0.0, x, rows["image"])

    @staticmethod
    def _is_first(at: Marginal, here: Here):
        """Whether this is the first call of a whole run."""
        place = here.place
        return False if place is None else ops.logical_and(place.index == 0, at.t >= place.now.t)


class _Measured(Guidance):
    """Guidance by a measurement y = A x + noise."""

    arrays = ("measurement", "scale")

    def __init__(self, operator: Any, measurement: Any, scale: Any):
        check_scale(type(self).__name__, scale)
        self.operator = Operator.get(operator)
        self.measurement, self.scale = np.asarray(measurement, "float32"), scale

    def rows(self, run: Run):
        """The measurement and the scale of each sample."""
        self._check_range(run)
        shape = self.operator.output_shape(run.shape[1:])
        rows = {"measurement": run.rows(self, "measurement", self.measurement, shape)}
        return {**rows, "scale": run.rows(self, "scale", self.scale, ())}

    def _check_range(self, run: Run) -> None:
        """Raises a ValueError for a measurement in 0 ... 255 if the data is in [-1, 1]."""
        if run.limit is None or not like_bytes(self.measurement):
            return
        ones = ops.full((1, *run.shape[1:]), run.limit, "float32")
        most = max(float(np.abs(ops.convert_to_numpy(self.operator.forward(x))).max()) for x in (ones, _signs(ones)))
        if (high := float(self.measurement.max())) > 4.0 * most:
            raise ValueError(
                f"{type(self).__name__}: `measurement` reaches {high:.4g}, but for data in [-{run.limit:g}, "
                f"{run.limit:g}] the operator gives at most about {most:.4g}: it must be `operator(images)` for "
                "images in that range, x / 127.5 - 1 for 0..255"
            )

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        estimate, pull = denoise.vjp(x, m)
        rest = here.rows["measurement"] - self.operator.forward(estimate.x_hat)
        shape = tuple(x.shape[1:])
        gradient = pull(self.operator.adjoint(self._weighted(rest, shape, m), shape))
        return estimate.guided(estimate.x_hat + over(here.rows["scale"], x) * self._step(m.like(x), here) * gradient)

    def _weighted(self, rest, shape, m: Marginal):
        """The vector to which A^T and the derivative of x_hat are applied."""
        raise NotImplementedError

    def _step(self, m: Marginal, here: Here):
        """The factor on the gradient."""
        raise NotImplementedError


def _signs(ones):
    """The same values with random signs."""
    return ops.sign(random.normal(random.key_of(0), ops.shape(ones))) * ones


class DPS(_Measured):
    """Diffusion posterior sampling, DPS (Chung et al. 2022, arXiv:2209.14687, algorithm 1, with the step size of the
    authors' code): after a step of DDPM,

        x_then <- x_then - scale grad |y - A x_hat(x_t)|.

    This equals a step with the estimate x_hat - scale / (alpha_then (1 - SNR_now / SNR_then)) grad |y - A x_hat|, which
    is used with any solver. It needs many steps: the paper takes 1,000.

    Args:
        operator: an `Operator` or its name.
        measurement: y, one for all samples or one per sample.
        scale: the step size, 0.3 to 1 in the paper; one number, or one per sample.

    Raises:
        ValueError: in a run, if the operator does not fit the samples, or the measurement does not fit the operator.
    """

    def __init__(self, operator: Any, measurement: Any, scale: Any = 1.0):
        super().__init__(operator, measurement, scale)

    def _weighted(self, rest, shape, m: Marginal):
        """-grad |y - A x_hat| with respect to A x_hat."""
        norm = ops.sqrt(ops.sum(rest**2, axis=tuple(range(1, len(rest.shape))), keepdims=True))
        return rest / ops.maximum(norm, 1e-8)

    def _step(self, m: Marginal, here: Here):
        place = here.step(self)
        return 1.0 / (place.then.alpha * bridge(place.now, place.then)[1])


class PiGDM(_Measured):
    """Pseudoinverse-guided diffusion (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
    eqs. 7 and 8): with p(x | x_t) = N(x_hat, r^2 I),

        grad log p(y | x_t) = (d x_hat / d x_t)^T A^T (r^2 A A^T + std^2 I)^-1 (y - A x_hat),
        r^2 = data_std^2 sigma^2 / (alpha^2 data_std^2 + sigma^2).

    The estimate changes by sigma^2 / alpha times this gradient, a factor that also amplifies the error of a trained
    network's derivative. Guidance therefore starts at sigma / alpha = `highest`, above which y carries hardly any
    information. A few steps suffice. The inverse is computed by conjugate gradients.

    Args:
        operator: an `Operator` or its name.
        measurement: y, one for all samples or one per sample.
        std: the standard deviation of the noise in y.
        data_std: the standard deviation of the data, 1 in the paper. Images in [-1, 1] have about 0.5.
        scale: the factor on the gradient; 1 is Bayes' rule. One number, or one per sample.
        iterations: the conjugate gradient iterations; 1 suffices if A A^T is a multiple of the identity.
        highest: the largest sigma / alpha with guidance; infinity for an exact denoiser.

    Raises:
        ValueError: as in `DPS`.
    """

    def __init__(
        self,
        operator: Any,
        measurement: Any,
        std: float = 0.01,
        data_std: float = 1.0,
        scale: Any = 1.0,
        iterations: int = 10,
        highest: float = 20.0,
    ):
        super().__init__(operator, measurement, scale)
        check_number("PiGDM", "highest", highest, 0.0)
        check_number("PiGDM", "std", std, 1e-6)
        check_number("PiGDM", "data_std", data_std, 1e-6)
        check_integer("PiGDM", "iterations", iterations)
        self.std, self.data_std, self.iterations, self.highest = std, data_std, iterations, highest

    def _weighted(self, rest, shape, m: Marginal):
        """(r^2 A A^T + std^2 I)^-1 (y - A x_hat)."""
        m = m.like(rest)
        variance = self.data_std**2 * m.sigma**2 / (m.alpha**2 * self.data_std**2 + m.sigma**2)
        return self.operator.solve(rest, shape, variance, self.std**2, self.iterations)

    def _step(self, m: Marginal, here: Here):
        return ops.where(m.sigma <= self.highest * m.alpha, m.sigma**2 / m.alpha, 0.0)


class MomentMatching(_Measured):
    """Moment matching posterior sampling (Rozet et al. 2024, "Learning Diffusion Priors from Observations by
    Expectation Maximization", arXiv:2405.13712). The Jacobian J = d x_hat / d x_t gives the covariance of p(x | x_t):

        C = sigma^2 / alpha J,    x_hat <- x_hat + C A^T (A C A^T + std^2 I)^-1 (y - A x_hat).

    A measurement of one part thus informs all correlated parts. For Gaussian data the result is exactly E[x | x_t, y],
    and the samples have the mean and covariance of p(x | y), up to the error of the solver. For example, to impute the
    missing values of a series or a table:

        model.sample(100, guidance=MomentMatching(operators.Mask(missing), known, std=0.01), sampler="heun")

    The inverse is computed by conjugate gradients, with one backward pass of the network per iteration.

    Args:
        operator: an `Operator` or its name.
        measurement: y, one for all samples or one per sample; for `Mask`, examples with arbitrary missing values.
        std: the standard deviation of the noise in y; for exact data, a value small compared to that of the data.
        scale: the factor on the change; 1 is Bayes' rule. One number, or one per sample.
        iterations: the conjugate gradient iterations; as many as y has elements are exact.
        highest: the largest sigma / alpha with guidance, as in `PiGDM`; infinity for an exact denoiser.

    Raises:
        ValueError: as in `DPS`.
    """

    def __init__(
        self,
        operator: Any,
        measurement: Any,
        std: float = 0.01,
        scale: Any = 1.0,
        iterations: int = 5,
        highest: float = 20.0,
    ):
        super().__init__(operator, measurement, scale)
        check_number("MomentMatching", "highest", highest, 0.0)
        check_number("MomentMatching", "std", std, 1e-6)
        check_integer("MomentMatching", "iterations", iterations)
        self.std, self.iterations, self.highest = std, iterations, highest

    def guide(self, denoise: Denoiser, x, m: Marginal, here: Here) -> Estimate:
        estimate, pull = denoise.vjp(x, m, often=True)
        shape, at, forward = tuple(x.shape[1:]), m.like(x), self.operator.forward

        def change(u):
            """C A^T u."""
            return at.sigma**2 / at.alpha * pull(self.operator.adjoint(u, shape))

        rest = here.rows["measurement"] - forward(estimate.x_hat)
        u = conjugate_gradients(lambda u: forward(change(u)) + self.std**2 * u, rest, self.iterations)
        scale = over(here.rows["scale"], x) * ops.where(at.sigma <= self.highest * at.alpha, 1.0, 0.0)
        return estimate.guided(estimate.x_hat + scale * change(u))
