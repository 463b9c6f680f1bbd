"""Linear operators: linearity, adjoint, and the inverse that posterior sampling needs, against explicit matrices."""

import numpy as np
import pytest

from kdiff import operators
from kdiff.operators import Blur, Composed, Downsample, Grey, Mask, Operator
from tests.toys import numpy

SHAPE = (6, 8, 3)
OPERATORS = [
    Mask(np.random.default_rng(0).integers(0, 2, (6, 8))),
    Mask(np.random.default_rng(0).integers(0, 2, SHAPE)),
    Downsample(2),
    Grey(),
    Blur(np.random.default_rng(0).normal(size=(3, 5))),
    Blur.gaussian(0.8),
    Composed([Blur.gaussian(1.0, 2), Downsample(2)]),
]


def matrix(operator, shape=SHAPE):
    """A, in float64, from what becomes of each unit vector."""
    size = int(np.prod(shape))
    return numpy(operator(np.eye(size, dtype="float32").reshape(size, *shape))).reshape(size, -1).T.astype("float64")


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_it_is_a_matrix_and_its_adjoint_the_transposed(operator):
    a, x = matrix(operator), normal(4, *SHAPE)
    y = numpy(operator(x))
    assert y.shape == (4, *operator.output_shape(SHAPE))
    np.testing.assert_allclose(y.reshape(4, -1), x.reshape(4, -1) @ a.T, atol=1e-5)
    v = normal(4, *operator.output_shape(SHAPE), seed=2)
    back = numpy(operator.adjoint(v, SHAPE))
    np.testing.assert_allclose(back.reshape(4, -1), v.reshape(4, -1) @ a, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_the_inverse_is_that_of_the_matrix(operator):
    a, v = matrix(operator), normal(3, *operator.output_shape(SHAPE), seed=3)
    exact = np.linalg.solve(0.7 * a @ a.T + 0.3 * np.eye(len(a)), v.reshape(3, -1).T).T
    simple = isinstance(operator, (Mask, Downsample, Grey))
    # A A^T of a mask has two eigenvalues, 0 and 1, of the two others one.
    iterations = (2 if isinstance(operator, Mask) else 1) if simple else 60
    received = numpy(operator.solve(v, SHAPE, 0.7, 0.3, iterations)).reshape(3, -1)
    np.testing.assert_allclose(received, exact, atol=2e-4 * np.abs(exact).max())


def test_the_inverse_of_nothing_is_nothing():
    np.testing.assert_array_equal(numpy(Downsample(2).solve(np.zeros((2, 3, 4, 3), "float32"), SHAPE, 1.0, 0.1)), 0.0)


def test_what_each_measures():
    x = normal(1, *SHAPE)
    np.testing.assert_allclose(numpy(Downsample(2)(x))[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(numpy(Grey()(x)), x.mean(-1, keepdims=True), atol=1e-6)
    mask = np.zeros((6, 8))
    mask[2] = 1
    np.testing.assert_array_equal(numpy(Mask(mask)(x))[0, 2], 0.0)
    np.testing.assert_array_equal(numpy(Mask(mask)(x))[0, 3], x[0, 3])
    # A flat image stays flat, to the edge, and one bright pixel becomes the kernel.
    np.testing.assert_allclose(numpy(Blur.gaussian(1.0, 2)(np.ones((1, 6, 8, 3), "float32"))), 1.0, atol=1e-6)
    dot, kernel = np.zeros((1, 7, 7, 1), "float32"), np.arange(9.0).reshape(3, 3)
    dot[0, 3, 3] = 1
    np.testing.assert_allclose(numpy(Blur(kernel)(dot))[0, 2:5, 2:5, 0], kernel, atol=1e-6)
    assert Blur.gaussian(1.0).kernel.shape == (7, 7)


@pytest.mark.once
def test_names_and_configuration():
    assert {"mask", "downsample", "grey", "blur", "composed"} <= set(Operator.names())
    for operator in OPERATORS:
        again = type(operator).from_config(operator.get_config())
        assert again == operator
        np.testing.assert_array_equal(matrix(again), matrix(operator))
    assert Operator.get("downsample") == Downsample(2)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(np.full((6, 8), 0.5)), "binary"),
        (lambda: Mask(np.ones((5, 8))).output_shape(SHAPE), r"\(5, 8\).*\(6, 8, 3\)"),
        (lambda: Downsample(0), "factor"),
        (lambda: Downsample(4).output_shape(SHAPE), "4 must divide"),
        (lambda: Downsample(2).output_shape((7,)), "images"),
        (lambda: Blur(np.ones((2, 3))), "odd"),
        (lambda: Blur(np.ones((13, 3))).output_shape(SHAPE), "too large"),
        (lambda: Composed([Downsample(2), Downsample(2)]).output_shape(SHAPE), "2 must divide.*3, 4"),
        (lambda: Operator.get("blurr"), "Did you mean 'blur'"),
        (lambda: operators.Blur.gaussian(0.0), "std"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.once
def test_an_operator_as_a_matrix():
    np.testing.assert_allclose(Downsample(2).matrix((2, 2, 1)), np.full((1, 4), 0.25))
    operator = Composed([Blur.gaussian(0.7, 1), Downsample(2)])
    x = np.random.default_rng(1).standard_normal((1, 4, 4, 2)).astype("float32")
    flat = operator.matrix((4, 4, 2)) @ x.reshape(-1)
    np.testing.assert_allclose(flat, numpy(operator(x)).reshape(-1), atol=1e-6)
