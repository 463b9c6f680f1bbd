"""Scores of samples: each against the equation of its paper, written as loops; intervals; what is refused."""

import itertools
import math

import keras
import numpy as np
import pytest
from scipy import optimize, stats

from kdiff import evaluation
from kdiff.evaluation.feature_likelihood import fitted_variances, mixture_log_likelihood
from tests.toys import compiled_model

# Two Gaussians in three dimensions: (mean, covariance).
A = (np.array([0.4, -0.2, 0.1]), np.array([[1.2, 0.3, 0.0], [0.3, 0.8, 0.1], [0.0, 0.1, 0.6]]))
B = (np.zeros(3), np.eye(3))
FAR = (A[0] + 0.9, 0.4 * A[1])  # from which no two scores of neighbours are the same
METRICS = [
    evaluation.FrechetDistance,
    evaluation.KernelDistance,
    evaluation.CMMD,
    evaluation.Precision,
    evaluation.Recall,
    evaluation.Density,
    evaluation.Coverage,
    evaluation.FeatureLikelihoodDivergence,
]


def drawn(n, gaussian=B, seed=0, dtype="float32"):
    return np.random.default_rng(seed).multivariate_normal(*gaussian, n).astype(dtype)


def updated(metric, *examples):
    metric.update_state(*examples)
    return metric


def frechet_by_sqrtm(x, y):
    """In one dimension more than SciPy's: the trace of a square root of the product, by its eigenvalues."""
    s, r = np.cov(x.T), np.cov(y.T)
    cross = np.sqrt(np.linalg.eigvals(s @ r).astype(complex)).real.sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s) + np.trace(r) - 2 * cross


def polynomial(a, b):
    return (np.dot(a, b) / len(a) + 1) ** 3


def kernel_by_pairs(x, y):
    n, m = len(x), len(y)
    xx = sum(polynomial(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(polynomial(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(polynomial(a, b) for a in x for b in y) / (n * m)


def cmmd_by_pairs(x, y):
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def mean(a, b):
        return np.mean([math.exp(-np.sum((p - q) ** 2) / 200) for p, q in itertools.product(a, b)])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def radius(rows, i, k):
    return sorted(np.linalg.norm(rows[i] - other) for j, other in enumerate(rows) if j != i)[k - 1]


def precision_by_pairs(x, y, k=3):
    radii = [radius(y, j, k) for j in range(len(y))]
    return np.mean([any(np.linalg.norm(a - b) < r for b, r in zip(y, radii, strict=True)) for a in x])


def density_by_pairs(x, y):
    radii = [radius(y, j, 5) for j in range(len(y))]
    return sum(np.linalg.norm(a - b) < r for a in x for b, r in zip(y, radii, strict=True)) / (5 * len(x))


def coverage_by_pairs(x, y):
    return np.mean([any(np.linalg.norm(a - b) < radius(y, j, 5) for a in x) for j, b in enumerate(y)])


EQUATIONS = [
    (evaluation.FrechetDistance, frechet_by_sqrtm),
    (evaluation.KernelDistance, kernel_by_pairs),
    (evaluation.CMMD, cmmd_by_pairs),
    (evaluation.Precision, precision_by_pairs),
    (evaluation.Recall, lambda x, y: precision_by_pairs(y, x)),
    (evaluation.Density, density_by_pairs),
    (evaluation.Coverage, coverage_by_pairs),
]


@pytest.mark.parametrize(("metric", "equation"), EQUATIONS)
def test_is_the_equation_of_the_paper_in_one_batch_or_several(metric, equation):
    x, y = drawn(41, FAR), drawn(33, seed=1)
    streamed = metric(None, y)
    for batch in (x[:20], x[20:39], keras.ops.convert_to_tensor(x[39:])):
        streamed.update_state(batch)
    assert streamed.result() == pytest.approx(equation(x.astype("float64"), y.astype("float64")), rel=1e-6)
    assert streamed.result() == updated(metric(None, evaluation.Reference(y)), x).result()
    assert isinstance(streamed.result(), float)


@pytest.mark.once
def test_frechet_distance_of_gaussians_is_known():
    """Commuting covariances: |m - o|^2 + sum of (std - std')^2; singular ones too."""
    distance = evaluation.frechet_distance(
        [1.0, 2.0, 0.0], np.diag([4.0, 1.0, 0.0]), np.zeros(3), np.diag([1.0, 9.0, 0.0])
    )
    assert distance == pytest.approx(5 + 1 + 4, abs=1e-9)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    covariance = turn @ np.diag([1.0, 2.0, 3.0, 4.0, 0.5]) @ turn.T
    assert evaluation.frechet_distance(np.ones(5), covariance, np.zeros(5), 4 * covariance) == pytest.approx(5 + 10.5)
    assert evaluation.frechet_distance(np.ones(5), covariance, np.ones(5), covariance) == pytest.approx(0, abs=1e-9)


@pytest.mark.once
def test_moments_without_groups_are_those_of_what_is_left():
    from kdiff.evaluation.frechet import _Moments
    from kdiff.evaluation.resampling import groups_of

    rows = drawn(50, A) + 100
    for (mean, covariance), group in zip(_Moments(rows, 7).without(), groups_of(50, 7), strict=True):
        left = np.delete(rows, group, 0).astype("float64")
        np.testing.assert_allclose(mean, left.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(left.T), rtol=1e-8, atol=1e-10)


@pytest.mark.once
def test_moments_of_a_file_are_a_reference(tmp_path):
    x, y = drawn(40, A), drawn(60)
    np.savez(tmp_path / "real.npz", mu=y.astype("float64").mean(0), sigma=np.cov(y.T.astype("float64")))
    read = evaluation.Reference.load(tmp_path / "real.npz")
    metric = updated(evaluation.FrechetDistance(None, read), x)
    assert metric.result() == pytest.approx(updated(evaluation.FrechetDistance(None, y), x).result(), rel=1e-9)
    assert metric.report().reference_n is None
    with pytest.raises(ValueError, match="only a mean and a covariance"):
        updated(evaluation.KernelDistance(None, read), x).result()
    np.savez(tmp_path / "other.npz", mean=1)
    with pytest.raises(ValueError, match=r"'mu', 'sigma'.*'mean'"):
        evaluation.Reference.load(tmp_path / "other.npz")


def third_moments(mean, covariance):
    cubes = np.einsum("i,j,k->ijk", mean, mean, mean)
    for letters in ("i,jk", "j,ik", "k,ij"):
        cubes = cubes + np.einsum(f"{letters}->ijk", mean, covariance)
    return cubes


def expected_kernel(a, b):
    """E (x.y / 3 + 1)^3 of independent Gaussians: their first three moments."""
    seconds = [np.outer(mean, mean) + covariance for mean, covariance in (a, b)]
    cubes = np.sum(third_moments(*a) * third_moments(*b))
    return cubes / 27 + 3 * np.sum(seconds[0] * seconds[1]) / 9 + a[0] @ b[0] + 1


def covered(intervals, truth):
    low, high = np.transpose(intervals)
    return np.mean((low <= truth) & (truth <= high))


def reports(make, n, draw=lambda n, seed: drawn(n, A, 2 * seed), repetitions=200):
    made = []
    for seed in range(repetitions):
        metric = make(drawn(n, seed=2 * seed + 1))
        metric.add(draw(n, seed))
        made.append(metric.report())
    return made


@pytest.mark.once
def test_intervals_of_the_frechet_distance_cover_the_truth():
    """Of the extrapolated one that is known; the score itself is biased, as its mean over the repetitions."""
    made = reports(lambda y: evaluation.FrechetDistance(None, y), 300)
    values = [report.value for report in made]
    truth = frechet_of(A, B)
    assert 0.9 <= covered([report.extrapolated_interval for report in made], truth) <= 0.99
    assert 0.9 <= covered([report.interval for report in made], np.mean(values)) <= 0.99
    extrapolated = [report.extrapolated for report in made]
    error = np.std(extrapolated) / 200**0.5
    assert abs(np.mean(extrapolated) - truth) < 3 * error < np.mean(values) - truth


@pytest.mark.once
def test_intervals_of_cmmd_cover_the_mean():
    made = reports(lambda y: evaluation.CMMD(None, y, sigma=1.0, normalized=False, groups=10), 80)
    values = [report.value for report in made]
    assert 0.9 <= covered([report.interval for report in made], np.mean(values)) <= 0.99


@pytest.mark.once
def test_intervals_of_the_frechet_distance_with_a_small_reference():
    """Of fewer examples than twice the number of groups: nearly all of the variance is theirs."""
    made = reports(lambda y: evaluation.FrechetDistance(None, y[:39]), 400, repetitions=100)
    values = [report.value for report in made]
    assert 0.88 <= covered([report.interval for report in made], np.mean(values)) <= 1.0
    assert np.mean([report.standard_error for report in made]) == pytest.approx(np.std(values), rel=0.3)


def frechet_of(a, b):
    """Of which one covariance is the identity."""
    return np.sum((a[0] - b[0]) ** 2) + np.sum((np.sqrt(np.linalg.eigvalsh(a[1])) - 1) ** 2)


@pytest.mark.once
def test_intervals_of_the_kernel_distance_cover_the_truth():
    made = reports(lambda y: evaluation.KernelDistance(None, y, groups=10), 80)
    truth = expected_kernel(A, A) + expected_kernel(B, B) - 2 * expected_kernel(A, B)
    values = [report.value for report in made]
    assert abs(np.mean(values) - truth) < 3 * np.std(values) / 200**0.5
    assert 0.9 <= covered([report.interval for report in made], truth) <= 0.99


def uncertain(n, seed):
    return 2 * np.random.default_rng(seed).standard_normal((n, 5))


@pytest.mark.thorough
@pytest.mark.once
@pytest.mark.parametrize("metric", [evaluation.Precision, evaluation.Recall, evaluation.Density, evaluation.Coverage])
def test_intervals_of_neighbours_cover_the_mean(metric):
    made = reports(lambda y: metric(None, y, k=3), 300)
    values = [report.value for report in made]
    assert 0.9 <= covered([report.interval for report in made], np.mean(values)) <= 0.99


@pytest.mark.once
def test_intervals_of_the_inception_score_cover_the_mean():
    made = reports(lambda _: evaluation.InceptionScore(splits=1, from_logits=True), 200, uncertain)
    values = [report.value for report in made]
    assert 0.9 <= covered([report.interval for report in made], np.mean(values)) <= 0.99


@pytest.mark.once
def test_coverage_of_equal_distributions_is_known():
    values = [
        updated(evaluation.Coverage(None, drawn(40, seed=2 * i)), drawn(50, seed=2 * i + 1)).result() for i in range(60)
    ]
    assert abs(np.mean(values) - evaluation.Coverage.expected(50, 40)) < 3 * np.std(values) / 60**0.5
    assert evaluation.Coverage.expected(20000, 20000, 3) == pytest.approx(0.875, abs=1e-4)  # Naeem et al.'s 1 - 2^-k


@pytest.mark.once
def test_inception_score_of_sure_and_unsure_classifiers():
    """One class a sample, all alike: as many as there are classes; the same answer to all: 1; between, by a loop."""
    sure = np.tile(np.eye(5, dtype="float32"), (20, 1))
    assert updated(evaluation.InceptionScore(), sure).result() == pytest.approx(5)
    assert updated(evaluation.InceptionScore(), np.full((40, 5), 0.2)).result() == pytest.approx(1)
    logits = uncertain(62, 0)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[:20], p[20:41], p[41:]):
        q = part.mean(0)
        scores.append(math.exp(np.mean([stats.entropy(row, q) for row in part])))
    metric = updated(evaluation.InceptionScore(splits=3, from_logits=True), logits)
    assert metric.result() == pytest.approx(np.mean(scores), rel=1e-9)
    assert updated(evaluation.InceptionScore(splits=3), p).result() == pytest.approx(np.mean(scores), rel=1e-9)
    with pytest.raises(ValueError, match="from_logits=True"):
        evaluation.InceptionScore().update_state(logits)


def normal(x, center, variance):
    return math.exp(-np.sum((x - center) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** (len(x) / 2)


def mixture_by_pairs(rows, centers, variances):
    return np.log([np.mean([normal(x, c, s) for c, s in zip(centers, variances, strict=True)]) for x in rows])


@pytest.mark.once
def test_feature_likelihood_is_that_of_the_mixture_whose_variances_fit_best():
    """No other optimiser gets further from there."""
    rows, centers = drawn(30, A, dtype="float64"), drawn(4, seed=1, dtype="float64")
    variances = fitted_variances(rows, centers, 3000, 1e-13)
    expected = mixture_by_pairs(rows, centers, variances)
    np.testing.assert_allclose(mixture_log_likelihood(rows, centers, variances), expected, rtol=1e-9)
    middle = 0.9 * (rows - rows.mean(0))

    def loss(logs):
        near = np.exp(mixture_by_pairs(rows, centers, np.exp(logs[:-1])))
        far = [normal(x, 0, math.exp(logs[-1])) for x in middle]
        return -np.log(near + far).mean()

    start = optimize.minimize_scalar(lambda value: loss(np.append(np.log(variances), value))).x
    start = np.append(np.log(variances), start)
    best = optimize.minimize(loss, start, method="L-BFGS-B", options={"maxiter": 20})
    assert best.fun > loss(start) - 1e-6
    assert loss(start) < loss(start + 0.1) - 1e-4


@pytest.mark.once
def test_feature_likelihood_divergence_is_a_difference_of_mixtures():
    """All halves of so small a training set are tried: which one the metric draws is its own affair."""
    samples, train, test = drawn(3, A, dtype="float64"), drawn(4, seed=1, dtype="float64"), drawn(6, A, 2, "float64")
    metric = evaluation.FeatureLikelihoodDivergence(None, train, test)
    found = updated(metric, samples).result()
    samples, train, rows = ((part - test.mean(0)) / test.std(0, ddof=1) for part in (samples, train, test))
    scores = []
    for half in itertools.combinations(range(4), 2):
        rest = [i for i in range(4) if i not in half]
        best = mixture_by_pairs(rows, train[list(half)], fitted_variances(train[rest], train[list(half)]))
        scores.append(100 / 3 * (best - mixture_by_pairs(rows, samples, fitted_variances(train, samples))).mean())
    assert min(abs(np.array(scores) / found - 1)) < 1e-6


@pytest.mark.once
def test_feature_likelihood_does_not_share_what_is_of_one_metric():
    """The training set may, the held-out set not, though its memory may be used again."""
    reference, samples = evaluation.Reference(drawn(40)), drawn(20, A)
    for seed in range(6):
        test = drawn(30, seed=seed) * (1 + seed)
        found, alone = (
            updated(evaluation.FeatureLikelihoodDivergence(None, of, test), samples).result()
            for of in (reference, evaluation.Reference(drawn(40)))
        )
        assert found == alone


@pytest.mark.once
def test_feature_likelihood_sees_copies_that_no_distance_sees():
    train, test, fresh = (drawn(300, seed=seed) for seed in range(3))
    copies = train[:150] + 1e-3 * drawn(150, seed=9)

    def score(samples):
        return updated(evaluation.FeatureLikelihoodDivergence(None, train, test), samples).result()

    assert score(fresh[:150]) == pytest.approx(0, abs=20)
    assert score(copies) > score(fresh[:150]) + 100
    assert score(fresh[:150] + 2) > score(fresh[:150]) + 20
    distances = [updated(evaluation.FrechetDistance(None, test), rows).result() for rows in (copies, fresh[:150])]
    assert abs(distances[0] - distances[1]) < 0.1


@pytest.mark.once
def test_clip_score_and_retrieval_are_their_equations():
    images, texts = drawn(12, seed=0), drawn(12, A, seed=1)
    cosines = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in texts] for x in images])
    score = evaluation.CLIPScore()
    score.update_state(images[:5], texts[:5])
    score.update_state(images[5:], texts[5:])
    assert score.result() == pytest.approx(100 * np.mean([max(cosines[i, i], 0) for i in range(12)]), rel=1e-6)
    places = [sum(cosines[i, j] > cosines[i, i] for j in range(12)) for i in range(12)]
    top = updated(evaluation.Retrieval(k=2, pool=None), images, texts)
    assert top.result() == np.mean([place < 2 for place in places])
    pool = updated(evaluation.Retrieval(pool=3), images, texts)  # with each of the pairs of others
    won = [
        all(cosines[i, j] <= cosines[i, i] for j in pair)
        for i in range(12)
        for pair in itertools.combinations([j for j in range(12) if j != i], 2)
    ]
    assert pool.result() == pytest.approx(np.mean(won), rel=1e-9)
    assert updated(evaluation.Retrieval(pool=10), images, images).result() == 1.0
    same = np.ones_like(texts)  # all are equally near: chance
    for k, of in ((1, None), (2, 4)):
        found = updated(evaluation.Retrieval(k=k, pool=of), images, same).result()
        assert found == pytest.approx(k / (of or 12), rel=1e-9)


@pytest.mark.once
def test_intervals_of_pairs_cover_the_truth():
    """E max(cos, 0) of two directions in the plane at independent angles is 1 / pi."""
    made = []
    for seed in range(200):
        metric = evaluation.CLIPScore()
        metric.update_state(*np.random.default_rng(seed).standard_normal((2, 60, 2)))
        made.append(metric.report())
    assert 0.9 <= covered([report.interval for report in made], 100 / np.pi) <= 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_report_says_what_the_score_is_worth(metric):
    train, test, samples = drawn(500, seed=0), drawn(300, seed=1), drawn(210, A, 2)
    made = updated(metric(None, train, test, groups=4), samples).report()
    assert made.interval[0] < made.value < made.interval[1]
    assert (made.n, made.reference_n) == (210, 500)
    assert made.standard_error > 0
    text = str(made)
    assert text.startswith(metric.key)
    if metric is evaluation.FeatureLikelihoodDivergence:
        assert made.baseline is None
        return
    assert made.baseline_n == 210
    chosen = np.sort(np.random.default_rng(0).permutation(300)[:210])
    assert made.baseline == pytest.approx(updated(metric(None, train, groups=4), test[chosen]).result(), rel=1e-6)
    assert abs(made.baseline - made.value) > 1e-3 * abs(made.value)
    assert "real examples" in text
    assert ("infinitely many" in text) == (metric is evaluation.FrechetDistance)


@pytest.mark.once
def test_report_needs_enough_for_each_part_of_it():
    few = updated(evaluation.FrechetDistance(None, drawn(50)), drawn(11, A)).report()
    assert few.extrapolated is None  # a half has fewer than twice as many rows as features
    two = updated(evaluation.FrechetDistance(None, drawn(50)), drawn(2, A)).report()
    assert np.isfinite(two.value)
    assert np.isnan(two.standard_error)
    wide = evaluation.FrechetDistance(None, drawn(50))
    narrow = updated(wide, drawn(40, A)).report(0.5)
    assert narrow.interval[0] > wide.report(0.95).interval[0]
    with pytest.raises(ValueError, match=r"`level` must be a number in \[0.0, 0.99"):
        wide.report(1.0)


BAD = [
    (
        lambda m: m.update_state(np.zeros((3, 2, 1))),
        r"shape \(count, features\); received float64 of the shape \(3, 2, 1\)",
    ),
    (lambda m: m.update_state(np.full((3, 3), np.nan)), "NaN"),
    (lambda m: m.update_state(np.zeros((3, 4))), r"received: \[4, 3\]"),
    (lambda m: m.result(), "fd: at least 2 samples are needed; received 0"),
    (lambda m: evaluation.FrechetDistance(None, np.zeros((5, 2)), np.zeros((5, 3))), r"\[2, 3\]"),
    (lambda m: evaluation.FrechetDistance(None, groups=1), "`groups` must be a whole number of at least 2"),
    (lambda m: evaluation.Precision(None, np.zeros((5, 2)), k=0), "`k`"),
    (lambda m: updated(evaluation.Coverage(None, np.zeros((5, 3))), drawn(40)).result(), "received 5"),
    (lambda m: evaluation.KernelDistance(gamma=-1.0), "`gamma`"),
    (lambda m: updated(evaluation.CMMD(None, drawn(3)), drawn(9)).result(), "4 real examples are needed"),
    (lambda m: evaluation.CMMD(sigma=0.0), "`sigma`"),
    (lambda m: updated(evaluation.CMMD(None, drawn(9)), np.zeros((9, 3))).result(), "zero and has no direction"),
    (lambda m: evaluation.FeatureLikelihoodDivergence(None, np.zeros((5, 2))), "`held_out`"),
    (lambda m: updated(evaluation.FrechetDistance(), np.zeros((5, 2))).result(), "a `reference` is required"),
    (lambda m: evaluation.CLIPScore().update_state(np.ones((3, 2)), np.ones((3, 4))), r"\(3, 2\) and \(3, 4\)"),
    (lambda m: evaluation.CLIPScore().update_state(np.zeros((3, 2)), np.ones((3, 2))), "is zero and has no direction"),
    (lambda m: evaluation.Retrieval(k=3, pool=3), "`pool`"),
    (lambda m: evaluation.Reference(), "pass features, or a mean"),
    (lambda m: updated(evaluation.FrechetDistance(None, drawn(1)), drawn(9)).result(), "needs at least 2 examples"),
    (lambda m: evaluation.FrechetDistance(None, {"x": drawn(9)}), r"must have 'image'; received: \['x'\]"),
    (lambda m: compiled_model(metrics=[m]), "pass it to `evaluation.EvaluationCallback`"),
    (lambda m: evaluation.Reference(mean=np.zeros(2), covariance=np.zeros((3, 3))), r"\(2,\) and \(3, 3\)"),
]


@pytest.mark.once
@pytest.mark.parametrize(("mistake", "message"), BAD)
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake(evaluation.FrechetDistance(None, drawn(9)))


def test_is_no_metric_to_compile():
    metric = evaluation.FrechetDistance(None, drawn(9))
    with pytest.raises(TypeError, match="on the host"):
        metric.update_state(keras.KerasTensor((4, 3)))
    with pytest.raises(NotImplementedError, match="create it anew"):
        metric.get_config()
    with pytest.raises(TypeError, match="must be a function"):
        evaluation.FrechetDistance("inception")


def test_reset_forgets():
    metric = updated(evaluation.FrechetDistance(None, drawn(30)), drawn(20, A))
    first = metric.result()
    metric.reset_state()
    assert metric.n == 0
    assert metric(drawn(20, A)) == first


@pytest.mark.once
def test_a_batch_as_fit_takes_it_is_a_reference():
    x = drawn(9)
    wanted = updated(evaluation.FrechetDistance(None, x), drawn(8)).result()
    for batch in ({"image": x, "label": np.arange(9)}, (x, np.arange(9)), [{"image": x[:4]}, {"image": x[4:]}]):
        assert updated(evaluation.FrechetDistance(None, batch), drawn(8)).result() == pytest.approx(wanted)


@pytest.mark.once
def test_files_that_are_no_moments(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    for name, message in (("one.npy", "has a single array"), ("junk.npz", "not a complete")):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            evaluation.Reference.load(tmp_path / name)
