import numpy as np
import pytest

from kdiff import degradations, operators, random
from kdiff.base import Value
from kdiff.degradations import Degradations, RandomBlur, RandomNoise
from tests.toys import images, numpy

pytestmark = pytest.mark.eager

KEY = random.key_of(5)
CASES = {
    "blur": (RandomBlur(0.5, 2.0, 0.5, radius=2), (8, 6, 2)),
    "noise": (RandomNoise(0.3), (8, 6, 2)),
    "all": (Degradations([RandomBlur(), operators.Downsample(2), RandomNoise()]), (4, 3, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_shape_and_key(name):
    of, shape = CASES[name]
    x = images(6, (8, 6, 2))
    y = numpy(of(x, KEY))
    assert y.shape == (6, *shape)
    assert of.output_shape((8, 6, 2)) == shape
    np.testing.assert_array_equal(numpy(of(x, KEY)), y)
    assert np.abs(numpy(of(x, random.key_of(6))) - y).max() > 1e-3
    assert of.clone() == of
    assert isinstance(of, Value)


@pytest.mark.once
def test_a_blur_of_one_width_is_the_operator():
    x = images(4, (7, 5, 1))
    y = numpy(RandomBlur(0.8, 0.8, 1.0, radius=2)(x, KEY))
    np.testing.assert_allclose(y, numpy(operators.Blur.gaussian(0.8, 2)(x)), atol=1e-5)
    half = numpy(RandomBlur(0.8, 0.8, 0.5, radius=2)(np.repeat(x[:1], 200, axis=0), KEY))
    kept = np.isclose(half, x[:1], atol=1e-6).all(axis=(1, 2, 3))
    assert 70 < kept.sum() < 130
    np.testing.assert_allclose(half[~kept], np.broadcast_to(y[:1], half[~kept].shape), atol=1e-5)
    np.testing.assert_array_equal(numpy(RandomBlur(probability=0.0)(x, KEY)), x)


@pytest.mark.once
def test_the_variance_of_random_noise():
    """E[std^2] = high^2 / 3."""
    y = numpy(RandomNoise(0.6)(np.zeros((400, 8, 8, 1), "float32"), KEY))
    assert np.var(y) == pytest.approx(0.12, rel=0.1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomBlur(0.0), ValueError, "`low`"),
        (lambda: RandomBlur(0.6, 0.4), ValueError, "`high`"),
        (lambda: RandomBlur(probability=2), ValueError, "`probability`"),
        (lambda: RandomNoise(-1), ValueError, "`high`"),
        (lambda: Degradations([]), TypeError, "`parts` must be degradations or operators"),
        (lambda: RandomBlur(radius=4).output_shape((4, 8, 1)), ValueError, "larger than 4 pixels"),
        (lambda: degradations.RandomNoise()(np.zeros((3, 4)), KEY), ValueError, r"received the shape \(3, 4\)"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
