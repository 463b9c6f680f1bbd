"""Linear operators of inverse problems, in which an image is reconstructed from a measurement:

    y = A x + noise

An operator defines `forward`, A x. The rest follows: the adjoint A^T is its vector-Jacobian product, and
(a A A^T + b I)^-1 v, which posterior sampling needs, is computed by conjugate gradients.

    operator = operators.Downsample(4)
    model.sample(8, guidance=guidance.PiGDM(operator, small))        # small: (8, height / 4, width / 4, channels)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, check_integer, check_number

__all__ = ["Blur", "Composed", "Downsample", "Grey", "Mask", "Operator", "Shape", "conjugate_gradients"]

Shape = tuple[int, ...]


class Operator(Value):
    """The base class of linear operators. A new one defines `forward`, and `check` if it does not fit every shape."""

    def forward(self, x):
        """A x, `(batch, ...)`, for a batch of examples `(batch, ...)`, float32. It must be linear."""
        raise NotImplementedError

    def __call__(self, x, key=None):
        """A x, for tensors or arrays. The random `key` is unused, as `kdiff.degradations` have the same interface."""
        x = ops.convert_to_tensor(x, "float32")
        self.check(tuple(x.shape[1:]))
        return self.forward(x)

    def check(self, shape: Shape) -> None:
        """Raises a ValueError if examples of this shape do not fit."""

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of A x for examples of this shape.

        Raises:
            ValueError: if they do not fit.
        """
        self.check(shape)
        return tuple(self.forward(ops.zeros((1, *shape))).shape[1:])

    def matrix(self, shape: Shape) -> np.ndarray:
        """A as a matrix, `(size of A x, size of x)`, for flattened examples of this small shape."""
        size = int(np.prod(shape))
        columns = ops.convert_to_numpy(self(np.eye(size, dtype="float32").reshape(size, *shape)))
        return columns.reshape(size, -1).T

    def adjoint(self, y, shape: Shape):
        """A^T y, for examples of this shape, where <A x, y> = <x, A^T y>."""
        y = ops.convert_to_tensor(y, "float32")
        zeros = ops.zeros((ops.shape(y)[0], *shape))
        return backend.vjp(lambda x: (self.forward(x), None), zeros)[1](y)

    def solve(self, v, shape: Shape, a, b, iterations: int = 10):
        """(a A A^T + b I)^-1 v, by `conjugate_gradients`.

        Args:
            v: a batch with the shape of A x.
            shape: the shape of an example.
            a, b: numbers, or tensors that broadcast against `v`.
            iterations: the number of iterations, exact if A A^T has at most as many distinct eigenvalues: 1 for `Mask`,
                `Downsample` and `Grey`.
        """

        def apply(p):
            return a * self.forward(self.adjoint(p, shape)) + b * p

        return conjugate_gradients(apply, ops.convert_to_tensor(v, "float32"), iterations)


def conjugate_gradients(apply: Callable, v, iterations: int):
    """Solves apply(u) = v for each example by conjugate gradients (Hestenes and Stiefel 1952).

    Args:
        apply: a linear function of a batch, symmetric and positive definite for each example.
        v: a batch.
        iterations: the number of iterations, exact if `apply` has at most as many distinct eigenvalues.
    """
    axes = tuple(range(1, len(v.shape)))

    def dot(p, q):
        return ops.sum(p * q, axis=axes, keepdims=True)

    solution, rest, direction = ops.zeros_like(v), v, v
    squared = smallest = dot(v, v)
    for _ in range(iterations):
        product = apply(direction)
        # Once the residual is zero, the step is 0, not 0 / 0.
        left = squared > 1e-12 * smallest
        step = ops.where(left, squared / ops.where(left, dot(direction, product), 1.0), 0.0)
        solution, rest = solution + step * direction, rest - step * product
        before, squared = squared, dot(rest, rest)
        direction = rest + ops.where(left, squared / ops.where(left, before, 1.0), 0.0) * direction
    return solution


class Mask(Operator):
    """The known part of an image with missing values: y = (1 - mask) x.

    Args:
        mask: 1 where values are missing and 0 where they are known, as in `guidance.Inpaint`, with the shape of an
            example, or `(height, width)` for an image.
    """

    def __init__(self, mask: Any):
        self.mask = np.asarray(mask, "float32")
        if not np.isin(self.mask, (0.0, 1.0)).all():
            raise ValueError("Mask: `mask` must be binary: 1 where the image is missing, 0 where it is known")

    def check(self, shape: Shape) -> None:
        """The mask must fit."""
        if self.mask.shape not in (shape, shape[:-1], (*shape[:-1], 1)):
            raise ValueError(f"Mask: `mask` has the shape {self.mask.shape}, which does not fit examples of {shape}")

    def forward(self, x):
        """(1 - mask) x."""
        mask = self.mask if self.mask.ndim == len(x.shape) - 1 else self.mask[..., None]
        return x * ops.convert_to_tensor(1.0 - mask)


class Downsample(Operator):
    """The mean of each square of `factor` x `factor` pixels: y, (batch, height / factor, width / factor, channels).

    Args:
        factor: the factor, which must divide the height and the width.
    """

    def __init__(self, factor: int = 2):
        check_integer("Downsample", "factor", factor)
        self.factor = factor

    def check(self, shape: Shape) -> None:
        """The factor must divide height and width."""
        _check_image("Downsample", shape)
        if shape[0] % self.factor or shape[1] % self.factor:
            raise ValueError(f"Downsample: {self.factor} must divide height and width; received images of {shape}")

    def forward(self, x):
        """The means."""
        batch, height, width, channels = x.shape[0], *x.shape[1:]
        f = self.factor
        batch = -1 if batch is None else batch
        return ops.mean(ops.reshape(x, (batch, height // f, f, width // f, f, channels)), axis=(2, 4))


class Grey(Operator):
    """The mean of the channels: y, (batch, height, width, 1)."""

    def forward(self, x):
        """The mean."""
        return ops.mean(x, axis=-1, keepdims=True)


class Blur(Operator):
    """Convolution of each channel with one kernel, with reflection padding.

    Args:
        kernel: the kernel, `(height, width)`, both odd and smaller than twice the size of the image.
    """

    def __init__(self, kernel: Any):
        self.kernel = np.asarray(kernel, "float32")
        if self.kernel.ndim != 2 or not (np.array(self.kernel.shape) % 2).all():
            raise ValueError(f"Blur: `kernel` must have odd height and width; received: {self.kernel.shape}")

    @classmethod
    def gaussian(cls, std: float = 1.0, radius: int | None = None) -> "Blur":
        """A normalised Gaussian kernel.

        Args:
            std: the standard deviation in pixels, above 0.
            radius: the kernel has 2 radius + 1 pixels per side; None: three standard deviations.
        """
        check_number("Blur", "std", std, 1e-3)
        radius = int(np.ceil(3 * std)) if radius is None else radius
        check_integer("Blur", "radius", radius, 0)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
        return cls(np.outer(weights, weights) / weights.sum() ** 2)

    def check(self, shape: Shape) -> None:
        """The kernel's radius must be smaller than the image."""
        _check_image("Blur", shape)
        if any(size // 2 >= side for size, side in zip(self.kernel.shape, shape, strict=False)):
            raise ValueError(f"Blur: a kernel of {self.kernel.shape} is too large for images of {shape}")

    def forward(self, x):
        """The convolution."""
        for axis, size in enumerate(self.kernel.shape, start=1):
            mirrored = np.pad(np.arange(x.shape[axis]), size // 2, mode="reflect").astype("int32")
            x = ops.take(x, mirrored, axis=axis)
        kernel = np.tile(self.kernel[::-1, ::-1, None, None], (1, 1, x.shape[-1], 1))
        return backend.depthwise_convolution(x, ops.convert_to_tensor(kernel), None, (1, 1), "valid", (1, 1))


class Composed(Operator):
    """The composition of operators: y = ... A_2 A_1 x.

    Args:
        operators: the operators, the first of which is applied first: `Composed([Blur.gaussian(1.0), Downsample(2)])`.
    """

    def __init__(self, operators: Sequence[Operator]):
        self.operators = [Operator.get(one) for one in operators]

    def check(self, shape: Shape) -> None:
        """Each must fit the output of the preceding one."""
        for one in self.operators:
            shape = one.output_shape(shape)

    def forward(self, x):
        """The last one's output."""
        for one in self.operators:
            x = one.forward(x)
        return x


def _check_image(owner: str, shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError(f"{owner}: examples must be images, (height, width, channels); received: {shape}")
