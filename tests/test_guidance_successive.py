"""Guidance by several conditions, on a denoiser of which each answer is known."""

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, schedules
from kdiff.denoisers import Denoiser, Estimate, Given
from kdiff.guidance import ClassifierFree, Successive
from tests.toys import numpy

COSINE = schedules.Cosine()
X = np.zeros((2, 3), "float32")


def answer(given, x, m):
    """1 + a + 10 b + 100 a b: the order in which a and b are left out counts."""
    a, b = (ops.reshape(given.conditions[name], (-1, 1)) for name in "ab")
    return Estimate(1.0 + a + 10.0 * b + 100.0 * a * b + 0.0 * x)


def denoiser():
    rows = {name: ops.convert_to_tensor(np.array(values, "float32")) for name, values in (("a", [2, 3]), ("b", [1, 4]))}
    return Denoiser(answer, Given(rows), {name: np.float32(0) for name in "ab"})


def ask(guidance):
    return numpy(guidance(denoiser())(ops.convert_to_tensor(X), COSINE.at(np.float32(0.5))).x_hat)[:, 0]


def value(a, b):
    return 1.0 + a + 10.0 * b + 100.0 * a * b


A, B = np.array([2.0, 3.0]), np.array([1.0, 4.0])


def test_the_equation():
    """Brooks et al. 2022, eq. 3, with a for the text and b for the picture."""
    wanted = value(0, 0) + 1.5 * (value(0, B) - value(0, 0)) + 7.5 * (value(A, B) - value(0, B))
    np.testing.assert_allclose(ask(Successive({"a": 7.5, "b": 1.5})), wanted, rtol=1e-6)
    turned = value(0, 0) + 7.5 * (value(A, 0) - value(0, 0)) + 1.5 * (value(A, B) - value(A, 0))
    np.testing.assert_allclose(ask(Successive({"b": 1.5, "a": 7.5})), turned, rtol=1e-6)


@pytest.mark.once
def test_one_name_is_classifier_free_guidance():
    np.testing.assert_allclose(ask(Successive({"a": 3.0})), ask(ClassifierFree(3.0, drop=("a",))), rtol=1e-6)
    np.testing.assert_allclose(ask(Successive({"a": 1.0, "b": 1.0})), value(A, B), rtol=1e-6)
    assert not Successive({"a": 1.0}).active
    assert Successive({"a": [1.0, 2.0]}).active
    assert Successive({"a": 2.0, "b": 3.0}).key() != Successive({"b": 3.0, "a": 2.0}).key()


def test_scales_and_negative_conditions_of_each_sample():
    """In a compiled run of one step to t = 0, where x is x_hat."""
    guidance = Successive({"a": [2.0, 5.0], "b": 3.0}, negative={"a": np.array([0.5, 0.0])})
    rows = lambda few: {name: np.asarray(one, "float32") for name, one in few.items()}  # noqa: E731
    from kdiff.guidance.base import Here, Run, tensors

    here = Here(tensors(guidance.rows(Run((2, 3), conditions=rows))), (), None)
    found = numpy(guidance.guide(denoiser(), ops.convert_to_tensor(X), COSINE.at(np.float32(0.5)), here).x_hat)[:, 0]
    none, scale = np.array([0.5, 0.0]), np.array([2.0, 5.0])
    wanted = value(none, 0) + 3.0 * (value(none, B) - value(none, 0)) + scale * (value(A, B) - value(none, B))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    run = Sampler("ddim", steps=2, guidance=Successive({"a": [2.0, 5.0], "b": 3.0}))(denoiser(), COSINE, (2, 3))
    wanted = value(0, 0) + 3.0 * (value(0, B) - value(0, 0)) + scale * (value(A, B) - value(0, B))
    np.testing.assert_allclose(numpy(run)[:, 0], wanted, rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "`scales` must be numbers by name"),
        ((3.0,), "received: 3.0"),
        (({"a": float("nan")},), "scale"),
        (({"a": 2.0}, {"b": 1.0}), r"`negative` must be conditions by name, of \['a'\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Successive(*arguments)


@pytest.mark.once
def test_what_has_no_null_cannot_be_left_out():
    with pytest.raises(ValueError, match=r"\['c'\] cannot be left out"):
        ask(Successive({"c": 2.0}))
