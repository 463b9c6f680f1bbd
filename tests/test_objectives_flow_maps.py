"""MeanFlow that guides itself, and the steps of shortcuts."""

import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import objectives, random
from kdiff.blocks import Interval, LabelEmbedding
from kdiff.networks import MLP
from kdiff.times import Scaled
from tests.helpers_taught import LABELS, RECTIFIED, TIMES, Given, X, exact_model
from tests.toys import draw_weights, mostly_once, numpy


@pytest.mark.parametrize("case", mostly_once([(2.0, 0.6), (3.0, 0.0)]))
def test_mean_flow_guides_itself(case):
    """Where r = s the target is w v + kappa u_c + (1 - w - kappa) u_0 (Geng et al. 2025, eqs. 20 and 21), in NumPy."""
    guidance, kappa = case
    made = MLP(16, 1, conditions={"interval": Interval(8), "label": LabelEmbedding(2, dropout=0.1)})
    objective = objectives.MeanFlow(None, 0.01, "forward_mode", guidance=guidance, kappa=kappa)
    model = kdiff.DiffusionModel(
        made,
        RECTIFIED,
        "flow",
        codec="identity",
        objective=objective,
        ema=None,
        time_label=Scaled(10.0),
        times=Given(*TIMES.tables),
    )
    model.build({"image": (None, 2), "label": (None,)})
    draw_weights(model.network)
    labels = {"label": ops.convert_to_tensor(LABELS, "int32")}
    problem = objective.problem(model, ops.convert_to_tensor(X), labels, random.Keys(random.key_of(0)), True)
    noise = numpy(random.normal(next(random.Keys(random.key_of(0))), X.shape))
    m = RECTIFIED.at(np.float32(TIMES.tables[0]))
    sigma = numpy(m.sigma)[:, None]
    x_t = (1.0 - sigma) * X + sigma * noise

    def u(label):
        label = ops.convert_to_tensor(label, "int32")
        return (x_t - numpy(model.denoise(ops.convert_to_tensor(x_t.astype("float32")), m, label=label))) / sigma

    w = guidance * (1.0 - kappa)
    expected = w * (noise - X) + kappa * u(LABELS) + (1.0 - w - kappa) * u(np.full(64, 2))
    np.testing.assert_allclose(numpy(problem.target)[1:], expected[1:], atol=1e-3)


@pytest.mark.once
def test_a_network_without_conditions_cannot_guide_itself():
    with pytest.raises(ValueError, match="the network cannot be guided"):
        exact_model(RECTIFIED, "flow", objectives.MeanFlow(guidance=2.0))


@pytest.mark.once
def test_the_halves_of_the_shortest_shortcuts_are_posterior_means():
    """Frans et al. 2024, section 3.3: N = 1, 2, 4 ... steps / 2 equal steps; of the last alone halves have d = 0."""
    objective, schedule = objectives.Shortcut(steps=16), kdiff.schedules.Rectified(1e-6)
    u = np.float32([[0.0, 0.3], [0.3, 0.3], [0.6, 0.3], [0.8, 0.3], [0.99, 0.99]])
    now, mid, then, shortest = objective._steps(schedule, ops.convert_to_tensor(u))
    np.testing.assert_array_equal(numpy(shortest), [False, False, False, True, True])
    wanted = [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    np.testing.assert_allclose(numpy(now.t) - numpy(then.t), wanted, atol=1e-5)
    np.testing.assert_allclose(numpy(now.t) - numpy(mid.t), np.divide(wanted, 2), atol=1e-5)
    np.testing.assert_allclose(numpy(then.t), [0, 0, 1 / 4, 2 / 8, 7 / 8], atol=1e-5)
