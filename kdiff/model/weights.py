"""Weights in the loss: per position or per example, from the objective and from `sample_weight`."""

import math

from keras import ops

from kdiff.objectives import Problem

__all__ = ["compared", "example_weights", "product", "squared_errors"]


def compared(problem: Problem, sample_weight):
    """(target, output, weight), where the weight has the rank of a loss that is averaged over the last axis."""
    positions = len(problem.target.shape) - 1
    factors = [_with_rank(factor, positions) for factor in (problem.weight, sample_weight)]
    return problem.target, problem.output, product(*factors)


def _with_rank(weight, rank: int):
    """A weight per example, reshaped to this rank; a weight per position is unchanged."""
    if weight is None or len(weight.shape) == rank:
        return weight
    return ops.reshape(weight, (-1, *[1] * (rank - 1)))


def example_weights(weight):
    """The weight of each example, `(batch,)`, its mean over the positions."""
    if weight is None or len(weight.shape) == 1:
        return weight
    return ops.mean(ops.cast(weight, "float32"), axis=tuple(range(1, len(weight.shape))))


def squared_errors(problem: Problem, sample_weight):
    """The mean squared errors, `(batch,)`, over the positions with weight."""
    errors = ops.mean(ops.square(problem.target - problem.output), axis=-1)
    axes = tuple(range(1, len(errors.shape)))
    if sample_weight is None or len(sample_weight.shape) == 1:
        return ops.mean(errors, axis=axes)
    weight = ops.cast(sample_weight, "float32")
    return ops.sum(weight * errors, axis=axes) / ops.maximum(ops.sum(weight, axis=axes), 1e-12)


def product(*factors):
    """The product, in float32, of the factors that are not None; None if there are none."""
    factors = [ops.cast(factor, "float32") for factor in factors if factor is not None]
    return math.prod(factors[1:], start=factors[0]) if factors else None
