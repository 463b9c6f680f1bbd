import warnings

import keras
import numpy as np
import pytest

from kdiff import evaluation
from kdiff.evaluation import EvaluationCallback, FrechetDistance, KernelDistance
from tests.toys import compiled_model, images

pytestmark = pytest.mark.eager


def flat(batch):
    return np.asarray(batch).reshape(len(batch), -1)[:, :3]


def flat_too(batch):
    return flat(batch)


def evaluating(metrics=None, **options):
    metrics = metrics or FrechetDistance(flat, images(40))
    return EvaluationCallback(metrics, num_samples=16, steps=2, **options)


def fitted(callbacks, epochs=2, **options):
    model = compiled_model(**options)
    history = model.fit(images(16), epochs=epochs, batch_size=8, callbacks=callbacks, verbose=0).history
    return model, history


def test_scores_of_the_averages_are_logged_where_other_callbacks_find_them(tmp_path):
    best = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", "fd", save_weights_only=True, mode="min")
    seen = []
    last = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["fd"]))
    metric = FrechetDistance(flat, images(40))
    model, history = fitted([evaluating(metric, seed=3), best, last], ema=0.5)
    assert history["fd"] == seen
    metric.reset_state()
    metric.update_state(model.sample(16, steps=2, seed=3))
    assert metric.result() == pytest.approx(seen[-1], rel=1e-6)
    metric.reset_state()
    metric.update_state(model.sample(16, steps=2, seed=3, ema=False))
    assert metric.result() != pytest.approx(seen[-1], rel=1e-4)
    assert len(list(tmp_path.glob("*.h5"))) == 2


class Scripted(evaluation.SampleMetric):
    key, better = "scripted", "min"
    values = (3.0, 1.0, 2.0, 2.5, 0.5)

    def update_from(self, samples, conditions, shared):
        self.turn = getattr(self, "turn", -1) + 1

    def result(self):
        return self.values[self.turn]


class FakeModel(keras.Sequential):
    """A regression that can be sampled."""

    def sample(self, num_samples, **options):
        return np.zeros((num_samples, 4, 4, 1), "float32")


def fitted_fake(*callbacks, epochs=5):
    model = FakeModel([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    x = np.ones((4, 2), "float32")
    return model.fit(x, x[:, :1], epochs=epochs, callbacks=list(callbacks), verbose=0).history


@pytest.mark.once
def test_the_best_is_kept_and_training_stops_early(tmp_path):
    best = keras.callbacks.ModelCheckpoint(
        tmp_path / "{epoch}.weights.h5", "scripted", save_best_only=True, save_weights_only=True, mode=Scripted.better
    )
    stop = keras.callbacks.EarlyStopping("scripted", patience=2, mode="min")
    history = fitted_fake(EvaluationCallback(Scripted()), best, stop)
    assert history["scripted"] == [3.0, 1.0, 2.0, 2.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.weights.h5", "2.weights.h5"]


@pytest.mark.once
@pytest.mark.data  # Keras' callback writes by TensorFlow
def test_scores_are_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf

    fitted_fake(EvaluationCallback(Scripted()), keras.callbacks.TensorBoard(tmp_path), epochs=2)
    events = [tf.compat.v1.train.summary_iterator(str(file)) for file in (tmp_path / "train").iterdir()]
    values = [value for one in events for event in one for value in event.summary.value]
    assert [float(tf.make_ndarray(one.tensor)) for one in values if one.tag == "epoch_scripted"] == [3.0, 1.0]


@pytest.mark.once
def test_every_so_many_epochs():
    assert fitted_fake(EvaluationCallback(Scripted(), every=2))["scripted"] == [3.0, 1.0]


class Failing(Scripted):
    def result(self):
        raise MemoryError("no room")


@pytest.mark.once
def test_a_failure_is_a_warning_and_training_goes_on():
    with pytest.warns(UserWarning, match="no scores of epoch 1, and training goes on: MemoryError: no room"):
        history = fitted_fake(EvaluationCallback([Failing()]), epochs=2)
    assert len(history["loss"]) == 2
    assert "scripted" not in history


def test_metrics_with_the_same_features_share_them():
    calls = []

    def counted(batch):
        calls.append(len(batch))
        return flat(batch)

    reference = evaluation.Reference(flat(images(40)))
    metrics = [
        FrechetDistance(counted, reference),
        KernelDistance(counted, reference),
        evaluation.Density(flat_too, reference),
    ]
    callback = evaluating(metrics, intervals=True)
    _, history = fitted([callback], epochs=1)
    assert calls == [16]
    assert set(history) >= {"fd", "kd", "density", "fd_low", "fd_high"}
    assert callback.reports[1]["fd"].value == history["fd"][0]
    assert history["fd_low"][0] < history["fd"][0] < history["fd_high"][0]


@pytest.mark.once
def test_shared_features_are_checked_by_each_metric():
    callback = evaluating([FrechetDistance(flat, images(40)), evaluation.InceptionScore(flat, splits=2)])
    with pytest.warns(UserWarning, match="probabilities must sum to 1"):
        fitted([callback], epochs=1)


@pytest.mark.once
def test_conditions_are_those_of_the_samples():
    class Text(FakeModel):
        def sample(self, num_samples, **options):
            self.asked = options
            return np.ones((num_samples, 2), "float32")

    def embedded(texts):
        return np.array([[len(text), 1.0] for text in texts])

    score = evaluation.CLIPScore(None, embedded)
    callback = EvaluationCallback(
        score, num_samples=3, conditions={"text": ["a", "b", "cc"]}, options={"guidance": 2.0}
    )
    model = Text()
    callback.set_model(model)
    expected = np.mean([1, 1, 3 / 10**0.5])
    assert callback.evaluate(1)["clip_score"] == pytest.approx(100 * expected)
    assert list(model.asked["text"]) == ["a", "b", "cc"]
    assert model.asked["guidance"] == 2.0
    callback.conditions = {}
    with warnings.catch_warnings(record=True) as caught:
        callback.on_epoch_end(0, {})
    assert "samples need a condition `text`" in str(caught[0].message)


BAD = [
    ({"metrics": []}, ValueError, "distinct names"),
    ({"metrics": [Scripted(), Scripted()]}, ValueError, "distinct names"),
    ({"metrics": keras.metrics.Mean()}, TypeError, "a metric of kdiff.evaluation"),
    ({"every": 0}, ValueError, "`every`"),
    ({"num_samples": 1}, ValueError, "`num_samples`"),
    ({"steps": 0}, ValueError, "`steps`"),
    ({"sampler": "dim"}, ValueError, "Unknown Solver"),
    ({"conditions": {"label": [1, 2]}, "num_samples": 3}, ValueError, "one row for each of 3"),
]


@pytest.mark.once
@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_mistakes_are_named_before_training(options, error, message):
    with pytest.raises(error, match=message):
        EvaluationCallback(**{"metrics": Scripted(), **options})
