"""Loss weights: each as its paper states it, for the output that the paper's network has."""

import numpy as np
import pytest

from kdiff import predictions, schedules, weightings
from kdiff.schedules import Marginal
from kdiff.weightings import Weighting
from tests.toys import numpy

LOG_SNR = np.linspace(-18, 18, 37).astype("float32")
SNR = np.exp(LOG_SNR.astype("float64"))
VP = schedules.Cosine(-20.0, 20.0).at_log_snr(LOG_SNR)
RECTIFIED = schedules.Rectified(1e-5).at_log_snr(LOG_SNR)
R = 1 / (1 + np.exp(LOG_SNR.astype("float64") / 2))  # sigma of rectified flow


def of_output(weighting, prediction, m=VP):
    """The factor on the squared error of the network's output, float64."""
    return (numpy(weighting(m.log_snr)) * numpy(prediction.gain(m)) ** 2).astype("float64")


@pytest.mark.once
def test_every_weighting_is_here():
    names = (
        "min_snr soft_min_snr p2 truncated_snr edm velocity uniform sigma_sqrt cos_map variational likelihood sigmoid"
    )
    ours = {name for name, kind in Weighting.names().items() if kind.__module__.startswith("kdiff.")}
    assert ours == set(names.split())
    per_log_snr = {name for name in ours if Weighting.names()[name].per_log_snr}
    assert per_log_snr == {"variational", "likelihood", "sigmoid"}


@pytest.mark.parametrize("name", sorted(Weighting.names()))
def test_weights_are_finite_above_zero_and_of_the_shape_of_log_snr(name):
    """Also at the ends of a table, of 40, and of a schedule without signal, of -40."""
    weighting = Weighting.get(name)
    for log_snr in (np.linspace(-40, 40, 9).astype("float32"), np.float32(0.5), np.zeros((2, 3), "float32")):
        weight = numpy(weighting(log_snr))
        assert weight.dtype == np.float32
        assert weight.shape == log_snr.shape
        assert np.all(np.isfinite(weight) & (weight > 0))


PUBLISHED = [
    # Hang et al. 2023, section 3.4, of the noise, the data and the velocity.
    (weightings.MinSNR(5.0), predictions.Noise(), np.minimum(SNR, 5) / SNR),
    (weightings.MinSNR(5.0), predictions.Data(), np.minimum(SNR, 5)),
    (weightings.MinSNR(5.0), predictions.Velocity(), np.minimum(SNR, 5) / (SNR + 1)),
    # Choi et al. 2022, eq. 8, of the noise.
    (weightings.P2(1.0, 1.0), predictions.Noise(), 1 / (1 + SNR)),
    (weightings.P2(0.5, 0.7), predictions.Noise(), 1 / (0.5 + SNR) ** 0.7),
    (weightings.P2(gamma=0.0), predictions.Noise(), np.ones_like(SNR)),
    # Salimans and Ho 2022, section 4, of the data.
    (weightings.TruncatedSNR(), predictions.Data(), np.maximum(SNR, 1)),
    (weightings.Velocity(), predictions.Data(), SNR + 1),
    (weightings.Velocity(), predictions.Velocity(), np.ones_like(SNR)),
    # Karras et al. 2022, table 1, (s^2 + sd^2) / (s sd)^2 of the data; of their own network, 1.
    (weightings.EDM(0.5), predictions.Data(), (1 / SNR + 0.25) * SNR / 0.25),
    (weightings.EDM(0.3), predictions.Karras(0.3), np.ones_like(SNR)),
    # Crowson et al. 2024, with gamma = 1 / sd^2 that of EDM's network is (s sd)^2 / (s^2 + sd^2)^2, up to sd^2.
    (weightings.SoftMinSNR(4.0), predictions.Karras(0.5), 4 * 0.25 / SNR / (1 / SNR + 0.25) ** 2 / 4),
    (weightings.SoftMinSNR(4.0), predictions.Data(), 4 * SNR / (SNR + 4)),
    # Kingma and Gao 2023, half of sigmoid(b - l) of the noise, and half of 1.
    (weightings.Sigmoid(-1.5), predictions.Noise(), 0.5 / (1 + np.exp(LOG_SNR.astype("float64") + 1.5))),
    (weightings.Variational(), predictions.Noise(), np.full_like(SNR, 0.5)),
]


@pytest.mark.parametrize(("weighting", "prediction", "expected"), PUBLISHED)
def test_published_weights(weighting, prediction, expected):
    np.testing.assert_allclose(of_output(weighting, prediction), expected, rtol=1e-4)


def test_weights_of_rectified_flow():
    """Esser et al. 2024: of the loss of rectified flow, in r = sigma = t."""
    flow = predictions.Flow()
    np.testing.assert_allclose(of_output(weightings.SigmaSqrt(), flow, RECTIFIED), 1 / R**2, rtol=1e-4)
    cos_map = 2 / (np.pi - 2 * np.pi * R + 2 * np.pi * R**2)
    np.testing.assert_allclose(of_output(weightings.CosMap(), flow, RECTIFIED), cos_map, rtol=1e-4)
    # Whether the schedule is variance preserving does not matter to a weight of the flow.
    np.testing.assert_allclose(of_output(weightings.CosMap(), flow, VP), cos_map, rtol=1e-4)


@pytest.mark.reference
def test_weights_of_the_training_scripts():
    """diffusers' weights of the flow's loss."""
    torch = pytest.importorskip("torch")
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    for name, weighting in (("sigma_sqrt", weightings.SigmaSqrt()), ("cosmap", weightings.CosMap())):
        expected = compute_loss_weighting_for_sd3(name, torch.tensor(R)).numpy()
        np.testing.assert_allclose(of_output(weighting, predictions.Flow(), RECTIFIED), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "prediction",
    [
        predictions.Data(),
        predictions.Noise(),
        predictions.Score(),
        predictions.Velocity(),
        predictions.Flow(),
        predictions.Karras(0.4),
        predictions.TrigFlow(0.4),
    ],
    ids=repr,
)
def test_uniform_is_the_plain_error_of_a_prediction(prediction):
    np.testing.assert_allclose(of_output(weightings.Uniform(prediction), prediction), 1.0, rtol=1e-4)
    # And of no other.
    other = predictions.Noise() if not isinstance(prediction, predictions.Noise) else predictions.Data()
    assert np.ptp(np.log(of_output(weightings.Uniform(prediction), other))) > 1


def test_uniform_of_the_normalisation():
    """Where a schedule does not preserve the variance: of all but the velocity and the score, that does not matter."""
    m = schedules.VarianceExploding(1e-5, 1e5).at_log_snr(LOG_SNR)
    for prediction in (predictions.Noise(), predictions.Flow(), predictions.Karras(0.5), predictions.Data()):
        np.testing.assert_allclose(of_output(weightings.Uniform(prediction), prediction, m), 1.0, rtol=1e-3)
    assert np.ptp(np.log(of_output(weightings.Uniform("velocity"), predictions.Velocity(), m))) > 1


def test_weights_that_are_each_other():
    """And what lies between what."""
    weight = {name: numpy(Weighting.get(name)(LOG_SNR)).astype("float64") for name in Weighting.names()}
    np.testing.assert_allclose(weight["velocity"], weight["uniform"] * (1 + 1 / SNR), rtol=1e-4)
    np.testing.assert_array_equal(weight["likelihood"], weight["variational"])
    np.testing.assert_allclose(numpy(weightings.EDM(1.0)(LOG_SNR)), weight["velocity"], rtol=1e-5)
    # min(a, b) / 2 <= a b / (a + b) <= min(a, b)
    soft, hard = (numpy(kind(4.0)(LOG_SNR)) for kind in (weightings.SoftMinSNR, weightings.MinSNR))
    assert np.all((soft <= hard * 1.00001) & (soft >= 0.49999 * hard))
    # SoftMinSNR(e^b) is the shape of Sigmoid(b), but not per unit of log-SNR.
    np.testing.assert_allclose(2 * numpy(weightings.Sigmoid(np.log(4.0))(LOG_SNR)), soft, rtol=1e-4)
    np.testing.assert_allclose(numpy(weightings.Sigmoid(40.0)(LOG_SNR)), weight["variational"], rtol=1e-4)


def test_weights_do_not_look_at_the_normalisation():
    """They are functions of log-SNR alone; a marginal without t, alpha and sigma will do for `Uniform`."""
    m = Marginal(None, None, None, VP.log_snr)
    for name in Weighting.names():
        np.testing.assert_array_equal(numpy(Weighting.get(name)(m.log_snr)), numpy(Weighting.get(name)(LOG_SNR)))


@pytest.mark.once
@pytest.mark.parametrize(
    "make",
    [
        lambda: weightings.MinSNR(-1.0),
        lambda: weightings.SoftMinSNR(0.0),
        lambda: weightings.P2(k=0.0),
        lambda: weightings.P2(gamma=-1.0),
        lambda: weightings.EDM(0.0),
        lambda: weightings.Sigmoid(100.0),
        lambda: weightings.Sigmoid("2"),
    ],
)
def test_impossible_weightings(make):
    with pytest.raises(ValueError, match="must be a number"):
        make()


@pytest.mark.once
def test_defaults_are_the_published_ones():
    """Hang et al. 2023: gamma = 5; Crowson et al. 2024: 4; Choi et al. 2022: k = 1, gamma = 1; EDM, table 1: 0.5."""
    published = {
        weightings.MinSNR: {"gamma": 5.0},
        weightings.SoftMinSNR: {"gamma": 4.0},
        weightings.P2: {"k": 1.0, "gamma": 1.0},
        weightings.EDM: {"sigma_data": 0.5},
        weightings.Sigmoid: {"bias": 0.0},
    }
    for kind, arguments in published.items():
        assert kind().get_config() == arguments
