"""Data whose diffusion is known exactly: ground truth for tests, lessons and benchmarks.

If data x is drawn from a mixture of Gaussians, sum_k w_k N(mean_k, cov_k), then x_t = alpha x + sigma noise is drawn
from the mixture of N(alpha mean_k, C_k), C_k = alpha^2 cov_k + sigma^2 I, and everything has a closed form:

    r_k        =  w_k N(x_t; alpha mean_k, C_k) / sum_j w_j N(x_t; alpha mean_j, C_j)
    E[x | x_t] =  sum_k r_k (mean_k + alpha cov_k C_k^-1 (x_t - alpha mean_k))
    score      = -sum_k r_k C_k^-1 (x_t - alpha mean_k)  =  (alpha E[x | x_t] - x_t) / sigma^2

(Karras et al. 2022, arXiv:2206.00364, appendix B.3, gives the case of points.) Each class is a denoiser, `x_hat =
data(x_t, m)`, and can replace a network in every solver:

    data = analytic.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.01)
    x = Sampler("heun", steps=20)(data, Cosine(), (500, 2))
"""

import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import Value, check_integer
from kdiff.denoisers import Denoiser, Estimate, Given
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["Gaussian", "GaussianMixture", "Points"]


class GaussianMixture(Value):
    """The mixture of Gaussians sum_k w_k N(mean_k, cov_k).

    Args:
        means: an array with shape `(components, ...)`; the shape of an example follows the first axis.
        covariances: one variance for all, or one per component, `(components,)`; one per coordinate, `(components,
            size)`; or full matrices, `(components, size, size)`, where size is the number of coordinates of an example.
            Zero is a point.
        weights: an array with shape `(components,)`, above zero; it is normalised. None: equal weights.

    Raises:
        ValueError: if the shapes do not fit, a weight is not above zero, or a covariance has a negative eigenvalue.
    """

    def __init__(self, means, covariances=0.0, weights=None):
        name = type(self).__name__
        self.means = np.asarray(means, "float64")
        self.covariances = np.asarray(covariances, "float64")
        if self.means.ndim < 2:
            raise ValueError(f"{name}: `means` must have the shape (components, ...); received: {self.means.shape}")
        count, size = len(self.means), self.means[0].size
        self.weights = np.ones(count) if weights is None else np.asarray(weights, "float64")
        if self.weights.shape != (count,) or not np.all(self.weights > 0):
            raise ValueError(f"{name}: `weights` must be {count} numbers above zero; received: {weights!r}")
        self._variances, self._axes = _eigen(name, self.covariances, count, size)
        self._flat = self.means.reshape(count, size)
        self._log_weights = np.log(self.weights / self.weights.sum())

    # The formulas of the module's docstring, in `ops` (float32) or NumPy (float64).

    def _parts(self, xp, x_t, alpha, sigma):
        """(log of w_k N(x_t), y, C): shapes (batch, k), and (batch, k, size) twice, in the axes of each covariance.

        `x_t` is (batch, size); alpha and sigma are scalars or (batch, 1, 1).
        """
        means, variances, axes, log_weights = self._constants(xp)
        y = x_t[:, None, :] - alpha * means
        if len(axes.shape) == 3:
            y = xp.einsum("bki,kij->bkj", y, axes)
        c = alpha**2 * variances + sigma**2 + xp.zeros_like(y)
        logs = log_weights - 0.5 * xp.sum(y**2 / c + xp.log(2 * np.pi * c), axis=-1)
        return logs, y, c

    def _constants(self, xp):
        constants = (self._flat, self._variances, self._axes, self._log_weights)
        return constants if xp is np else tuple(ops.convert_to_tensor(value, "float32") for value in constants)

    def _posterior_means(self, xp, y, c, alpha):
        means, variances, axes, _ = self._constants(xp)
        return means + _turned(xp, alpha * variances / c * y, axes)

    def _denoise(self, xp, x_t, alpha, sigma):
        logs, y, c = self._parts(xp, x_t, alpha, sigma)
        return xp.sum(_softmax(xp, logs)[..., None] * self._posterior_means(xp, y, c, alpha), axis=1)

    def __call__(self, x_t, m: Marginal):
        """E[x | x_t], the optimal denoiser.

        Args:
            x_t: noisy data, with shape `(batch, ...)`.
            m: its marginal; the fields have shape `()` or `(batch,)`.
        """
        flat, alpha, sigma = _flat(x_t, m)
        return ops.reshape(self._denoise(ops, flat, alpha, sigma), ops.shape(x_t))

    def conditional(self, label) -> Denoiser:
        """The denoiser given the condition "label", the index of the component that the data is drawn from; -1: any.

        Args:
            label: integers, with shape `(batch,)`.
        """

        def answer(given, x_t, m):
            flat, alpha, sigma = _flat(x_t, m)
            logs, y, c = self._parts(ops, flat, alpha, sigma)
            label = given.conditions["label"][:, None]
            logs = ops.where((label < 0) | (label == ops.arange(len(self.means), dtype="int32")), logs, -1e30)
            means = self._posterior_means(ops, y, c, alpha)
            return Estimate(ops.reshape(ops.sum(_softmax(ops, logs)[..., None] * means, axis=1), ops.shape(x_t)))

        given = Given({"label": ops.convert_to_tensor(label, "int32")})
        return Denoiser(answer, given, {"label": np.int32(-1)})

    def score(self, x_t, m: Marginal):
        """The gradient of log p(x_t), with the shape of `x_t`."""
        flat, alpha, sigma = _flat(x_t, m)
        logs, y, c = self._parts(ops, flat, alpha, sigma)
        scores = _turned(ops, -y / c, self._constants(ops)[2])
        return ops.reshape(ops.sum(_softmax(ops, logs)[..., None] * scores, axis=1), ops.shape(x_t))

    def log_prob(self, x_t, m: Marginal):
        """log p(x_t), in nats, with shape `(batch,)`. At m.t = 0 it is the log-likelihood of the data."""
        logs, _, _ = self._parts(ops, *_flat(x_t, m))
        return ops.logsumexp(logs, axis=-1)

    def sample(self, num_samples: int, seed: int = 0) -> np.ndarray:
        """Examples, float32, with shape `(num_samples, ...)`; the same on every backend."""
        check_integer("sample", "num_samples", num_samples)
        generator = np.random.default_rng(seed)
        k = generator.choice(len(self.weights), num_samples, p=np.exp(self._log_weights))
        y = generator.standard_normal((num_samples, self._flat.shape[1])) * np.sqrt(self._variances[k])
        y = np.einsum("bij,bj->bi", self._axes[k], y) if self._axes.ndim == 3 else y
        return (self._flat[k] + y).reshape(num_samples, *self.means.shape[1:]).astype("float32")

    def posterior_sample(self, x_t, m: Marginal, seed: int = 0):
        """Draws x from p(x | x_t), one per x_t; the same on every backend."""
        flat, alpha, sigma = _flat(x_t, m)
        logs, y, c = self._parts(ops, flat, alpha, sigma)
        keys = random.fold_in(random.key_of(seed), np.arange(2))
        gumbel = -ops.log(-ops.log(random.uniform(keys[0], logs.shape) + 2.0**-25))
        chosen = ops.one_hot(ops.argmax(logs + gumbel, axis=-1), logs.shape[-1])[..., None]
        # In the axes of the covariance, the posterior has the variance cov sigma^2 / C.
        _, variances, axes, _ = self._constants(ops)
        deviation = ops.sqrt(variances / c) * sigma
        fresh = deviation * random.normal(keys[1], tuple(flat.shape))[:, None, :]
        x = self._posterior_means(ops, y, c, alpha) + _turned(ops, fresh, axes)
        return ops.reshape(ops.sum(chosen * x, axis=1), ops.shape(x_t))

    def flow(self, x, schedule: NoiseSchedule, now: float, then: float, steps: int = 500) -> np.ndarray:
        """The result of the probability flow from x at time `now` to time `then`, in either direction, float64.

        With z = x / alpha and s = sigma / alpha it is dz / d log s = z - E[x | z, s] for any schedule. It is solved by
        the classical Runge-Kutta method with `steps` steps; for a `Gaussian`, in closed form.
        """
        start, end = (Marginal(*(np.float64(ops.convert_to_numpy(v)) for v in schedule.at(t))) for t in (now, then))
        x = np.asarray(x, "float64")
        z = x.reshape(len(x), -1) / start.alpha
        z = self._flow(z, -start.log_snr / 2, -end.log_snr / 2, steps)
        return (end.alpha * z).reshape(x.shape)

    def _flow(self, z, u, end, steps):
        h = (end - u) / steps

        def slope(z, u):
            return z - self._denoise(np, z, 1.0, np.exp(u))

        for i in range(steps):
            at = u + i * h
            a = slope(z, at)
            b = slope(z + h / 2 * a, at + h / 2)
            c = slope(z + h / 2 * b, at + h / 2)
            z = z + h / 6 * (a + 2 * b + 2 * c + slope(z + h * c, at + h))
        return z


class Gaussian(GaussianMixture):
    """The Gaussian N(mean, covariance).

    Args:
        mean: an array with the shape of an example.
        covariance: one variance, one per coordinate, `(size,)`, or a matrix, `(size, size)`.
    """

    def __init__(self, mean, covariance=1.0):
        mean, covariance = np.asarray(mean, "float64"), np.asarray(covariance, "float64")
        if mean.ndim == 0:
            raise ValueError(f"Gaussian: `mean` must have the shape of an example; received the number {mean}")
        super().__init__(mean[None], covariance if covariance.ndim == 0 else covariance[None])
        self.mean, self.covariance = mean, covariance

    def restored(self, x_t, m: Marginal, y, level: Marginal, matrix):
        """E[x | x_t, y], y = alpha_y A x + sigma_y noise: the optimal denoiser for super-resolution from a noised y.

            H = [alpha I; alpha_y A],  S = H cov H^T + diag(sigma^2 I, sigma_y^2 I)
            E[x | x_t, y] = mean + cov H^T S^-1 ([x_t; y] - H mean)

        Args:
            x_t: noisy data, with shape `(batch, ...)`.
            m: its marginal; the fields have shape `()` or `(batch,)`.
            y: the measurement, with the shape of A x.
            level: the marginal of `y`, with fields as in `m`.
            matrix: A, an array with shape `(size of y, size of x)`, such as `operators.Downsample(2).matrix((8, 8,
                1))`.
        """
        size, a = self.mean.size, np.asarray(matrix, "float64")
        cov = self.covariance if self.covariance.ndim == 2 else np.eye(size) * self.covariance
        batch = ops.shape(x_t)[0]

        def spread(of_x, of_y):
            parts = (ops.broadcast_to(ops.reshape(v, (-1, 1)), (batch, n)) for v, n in ((of_x, size), (of_y, len(a))))
            return ops.concatenate(list(parts), axis=1)

        stacked = np.concatenate([np.eye(size), a])  # H without the scales of its rows
        scales = spread(m.alpha, level.alpha)
        noise = spread(m.sigma, level.sigma)
        both, mean, gain = (
            ops.convert_to_tensor(value.astype("float32"))
            for value in (stacked @ cov @ stacked.T, stacked @ self.mean.reshape(-1), cov @ stacked.T)
        )
        s = scales[:, :, None] * both * scales[:, None, :] + noise[:, :, None] ** 2 * ops.eye(size + len(a))
        z = ops.concatenate([ops.reshape(ops.cast(v, "float32"), (batch, -1)) for v in (x_t, y)], axis=1)
        rest = ops.solve(s, (z - scales * mean)[:, :, None])[:, :, 0]
        x_hat = mean[:size] + ops.matmul(scales * rest, ops.transpose(gain))
        return ops.reshape(x_hat, ops.shape(x_t))

    def _flow(self, z, u, end, steps):
        """Each coordinate, in the axes of the covariance, keeps its standard score: z - mean ~ sqrt(cov + s^2)."""
        kept = np.sqrt((self._variances + np.exp(2 * end)) / (self._variances + np.exp(2 * u)))
        y = (z - self._flat)[:, None, :]
        y = np.einsum("bki,kij->bkj", y, self._axes) if self._axes.ndim == 3 else y
        return self._flat + _turned(np, kept * y, self._axes)[:, 0]


class Points(GaussianMixture):
    """A finite data set: the ideal denoiser for a training set, which generates only its points.

    Args:
        points: an array with shape `(count, ...)`.
    """

    def __init__(self, points):
        super().__init__(points)
        self.points = self.means


def _eigen(name, covariances, count, size):
    """(variances, axes): (count, size), and (count, size, size), or (count,) if the axes are the coordinates."""
    if covariances.ndim < 3:
        column = covariances[:, None] if covariances.ndim == 1 else covariances
        if column.shape not in ((), (count, 1), (count, size)):
            raise ValueError(
                f"{name}: covariances of {count} components of {size} coordinates have the shape (), ({count},), "
                f"({count}, {size}) or ({count}, {size}, {size}); received: {covariances.shape}"
            )
        variances, axes = np.broadcast_to(column, (count, size)), np.ones(count)
    else:
        if covariances.shape != (count, size, size):
            raise ValueError(
                f"{name}: full covariances must have the shape ({count}, {size}, {size}); received: {covariances.shape}"
            )
        variances, axes = np.linalg.eigh(covariances)
    if not np.all(variances >= -1e-12):
        raise ValueError(f"{name}: a covariance must have no negative eigenvalue; received: {variances.min()}")
    return np.maximum(variances, 0.0), axes


def _flat(x_t, m: Marginal):
    """x_t as (batch, size), and alpha and sigma that broadcast against (batch, k, size)."""
    x_t = ops.convert_to_tensor(x_t, "float32")
    alpha, sigma = (ops.reshape(v, (-1, 1, 1)) for v in (m.alpha, m.sigma))
    return ops.reshape(x_t, (ops.shape(x_t)[0], -1)), alpha, sigma


def _turned(xp, y, axes):
    """From the axes of each covariance to the coordinates."""
    return xp.einsum("bkj,kij->bki", y, axes) if len(axes.shape) == 3 else y


def _softmax(xp, logs):
    weights = xp.exp(logs - xp.max(logs, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)
