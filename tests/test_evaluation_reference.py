"""The scores that torch-fidelity, torchmetrics, prdc and pytorch-fid give the same features."""

import numpy as np
import pytest

from kdiff import evaluation
from tests import helpers_peers  # noqa: F401
from tests.test_evaluation import drawn, updated

pytestmark = [pytest.mark.once, pytest.mark.reference]
torch = pytest.importorskip("torch")

FAKE = drawn(200, (np.linspace(-0.3, 0.4, 8), np.diag(np.linspace(0.4, 1.6, 8))))
REAL = drawn(200, (np.zeros(8), np.eye(8)), seed=1)
LOGITS = 2 * drawn(300, (np.zeros(10), np.eye(10)), seed=2)
TENSORS = torch.tensor(FAKE).double(), torch.tensor(REAL).double()


def score(metric, *arguments, **options):
    return updated(metric(None, *arguments, **options), FAKE).result()


def test_of_torch_fidelity():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    moments = [metric_fid.fid_features_to_statistics(features) for features in TENSORS]
    frechet = metric_fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    assert score(evaluation.FrechetDistance, REAL) == pytest.approx(frechet, rel=1e-5)
    # Subsets of all are the estimate of all.
    kernel = metric_kid.kid_features_to_metric(*TENSORS, kid_subsets=1, kid_subset_size=200, verbose=False)
    expected = kernel["kernel_inception_distance_mean"]
    assert score(evaluation.KernelDistance, REAL) == pytest.approx(expected, rel=1e-5)
    neighbours = metric_prc.prc_features_to_metric(*TENSORS, prc_neighborhood=3, verbose=False)
    assert score(evaluation.Precision, REAL) == pytest.approx(neighbours["precision"], rel=1e-5)
    assert score(evaluation.Recall, REAL) == pytest.approx(neighbours["recall"], rel=1e-5)
    for splits in (1, 10):
        expected = metric_isc.isc_features_to_metric(torch.tensor(LOGITS), splits, shuffle=False)
        metric = updated(evaluation.InceptionScore(splits=splits, from_logits=True), LOGITS)
        assert metric.result() == pytest.approx(expected["inception_score_mean"], rel=1e-5)


def test_of_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    features = torch.nn.Identity()
    features.num_features = 8
    peers = {
        evaluation.FrechetDistance: FrechetInceptionDistance(features),
        evaluation.KernelDistance: KernelInceptionDistance(features, subsets=1, subset_size=200),
    }
    for ours, theirs in peers.items():
        theirs.set_dtype(torch.float64)
        for rows, real in zip(TENSORS, (False, True), strict=True):
            theirs.update(rows, real=real)
        expected = theirs.compute()
        expected = expected if ours is evaluation.FrechetDistance else expected[0]
        assert score(ours, REAL) == pytest.approx(float(expected), rel=1e-5)
    theirs = InceptionScore(features, splits=1)
    theirs.update(torch.tensor(LOGITS).double())
    ours = updated(evaluation.InceptionScore(splits=1, from_logits=True), LOGITS).result()
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_of_prdc():
    prdc = pytest.importorskip("prdc")
    for metric in (evaluation.Precision, evaluation.Recall, evaluation.Density, evaluation.Coverage):
        expected = prdc.compute_prdc(REAL.astype("float64"), FAKE.astype("float64"), nearest_k=4)[metric.key]
        assert score(metric, REAL, k=4) == pytest.approx(expected, rel=1e-5)


def test_of_pytorch_fid():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    moments = [moment for rows in (FAKE, REAL) for moment in (rows.mean(0), np.cov(rows, rowvar=False))]
    expected = fid_score.calculate_frechet_distance(*moments)
    assert score(evaluation.FrechetDistance, REAL) == pytest.approx(expected, rel=1e-5)
