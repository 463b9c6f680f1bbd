import keras
import numpy as np
import pytest
from keras import layers

from kdiff.evaluation import Extractor, FrechetDistance, Images, cached_reference
from kdiff.evaluation.caching import fingerprint
from tests.toys import draw_weights


def pictures(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (12, 4, 4, 3), "uint8")


def network(width=3):
    return draw_weights(keras.Sequential([layers.Input((4, 4, 3)), layers.Flatten(), layers.Dense(width)]))


@pytest.fixture
def counted(monkeypatch):
    """How often features are made."""
    calls, plain = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, x: (calls.append(len(x)), plain(self, x))[1])
    return calls


def test_features_are_made_once_whatever_the_order(tmp_path, counted):
    made = cached_reference(Extractor(network(), Images(4)), pictures(), tmp_path / "new")
    read = cached_reference(Extractor(network(), Images(4)), pictures()[::-1], tmp_path / "new")  # another object
    batches = cached_reference(
        Extractor(network(), Images(4)), [(pictures()[:5], 0), (pictures()[5:], 0)], tmp_path / "new"
    )
    assert counted == [12]
    assert len(list((tmp_path / "new").iterdir())) == 1
    for other in (read, batches):
        np.testing.assert_array_equal(other.features, made.features)
    metric = FrechetDistance(None, read)
    metric.add(made.features)
    assert metric.result() == pytest.approx(0, abs=1e-6)


def changed(weight):
    other = network()
    other.weights[0].assign(other.weights[0] + weight)
    return other


CHANGES = {
    "an example": lambda: (Extractor(network(), Images(4)), np.concatenate([pictures()[:11], pictures(1)[:1]])),
    "one twice": lambda: (Extractor(network(), Images(4)), np.concatenate([pictures()[:11], pictures()[:1]])),
    "their type": lambda: (Extractor(network(), Images(4)), pictures().astype("int32")),
    "a weight": lambda: (Extractor(changed(1e-3), Images(4)), pictures()),
    "the network": lambda: (Extractor(network(4), Images(4)), pictures()),
    "the preprocessing": lambda: (Extractor(network(), Images(4, 0.4)), pictures()),
    "none": lambda: (Extractor(network(), None), pictures()),
}


@pytest.mark.once
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_another_file(change, tmp_path, counted):
    cached_reference(Extractor(network(), Images(4)), pictures(), tmp_path)
    cached_reference(*CHANGES[change](), tmp_path)
    assert counted == [12, 12]


def columns(first):
    return lambda y: y[:, first:]


@pytest.mark.once
def test_another_output_is_another_file(tmp_path, counted):
    """By what the function computes, wherever it is defined, and by what it holds."""
    outputs = [lambda y: y[:, :2], lambda y: y[:, 1:], columns(1), columns(2), lambda y, first=1: y[:, first:]]
    for output in outputs:
        cached_reference(Extractor(network(), Images(4), output=output), pictures(), tmp_path)
    assert counted == [12] * 5
    cached_reference(Extractor(network(), Images(4), output=columns(2)), pictures(), tmp_path)
    assert counted == [12] * 5


@pytest.mark.once
def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`output` must be a function that holds nothing but numbers"):
        cached_reference(Extractor(network(), output=np.tanh), pictures(), tmp_path)
    with pytest.raises(ValueError, match="only a Keras model has a hash"):
        cached_reference(Extractor(np.asarray), pictures(), tmp_path)
    with pytest.raises(ValueError, match="`prepare` has no configuration"):
        cached_reference(Extractor(network(), lambda x: x), pictures(), tmp_path)
    with pytest.raises(TypeError, match="must be an Extractor"):
        cached_reference(np.asarray, pictures(), tmp_path)
    with pytest.raises(TypeError, match="read only once"):
        cached_reference(Extractor(network()), iter([pictures()]), tmp_path)


@pytest.mark.once
def test_a_damaged_file_is_named(tmp_path):
    features = Extractor(network(), Images(4))
    cached_reference(features, pictures(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete file of features"):
        cached_reference(features, pictures(), tmp_path)


@pytest.mark.once
def test_examples_that_repeat_count():
    a, b = np.zeros((1, 3)), np.ones((1, 3))
    assert fingerprint(np.concatenate([a, a])) != fingerprint(np.concatenate([b, b]))
    assert fingerprint(np.concatenate([a, b])) == fingerprint([b, a])
