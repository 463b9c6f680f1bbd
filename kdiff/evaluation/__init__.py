"""Evaluation of samples by scores of their features, each with a confidence interval and the score of real examples.

    fd = evaluation.FrechetDistance(features, reference=train, held_out=test)
    fd.update_state(model.sample(5000))
    print(fd.report())
    fd 3.18 [2.97, 3.4], n = 5000 against 20000; infinitely many: 1.35 [1.13, 1.57]; real examples: 2.03, n = 5000; ...

No single metric suffices: the Frechet distance compares the first two moments; precision and density measure fidelity,
recall and coverage diversity; the feature likelihood divergence also detects copies of training data. All depend on the
features, so compare only scores with the same features, the same n, and the same reference.

It needs the extra `evaluation`: SciPy for linear algebra, scikit-learn for kernels and neighbours.
"""

from kdiff.evaluation.base import FeatureMetric, Report, SampleMetric
from kdiff.evaluation.caching import cached_reference
from kdiff.evaluation.callback import EvaluationCallback
from kdiff.evaluation.efficientnet import EfficientNetLite0
from kdiff.evaluation.extractors import Extractor, Images, clip_vision, dinov2
from kdiff.evaluation.feature_likelihood import FeatureLikelihoodDivergence
from kdiff.evaluation.frechet import FrechetDistance, frechet_distance
from kdiff.evaluation.inception import InceptionFID
from kdiff.evaluation.inception_score import InceptionScore
from kdiff.evaluation.kernels import CMMD, KernelDistance
from kdiff.evaluation.neighbors import Coverage, Density, Precision, Recall
from kdiff.evaluation.pairs import CLIPScore, Retrieval
from kdiff.evaluation.reference import Reference

__all__ = [
    "CMMD",
    "CLIPScore",
    "Coverage",
    "Density",
    "EfficientNetLite0",
    "EvaluationCallback",
    "Extractor",
    "FeatureLikelihoodDivergence",
    "FeatureMetric",
    "FrechetDistance",
    "Images",
    "InceptionFID",
    "InceptionScore",
    "KernelDistance",
    "Precision",
    "Recall",
    "Reference",
    "Report",
    "Retrieval",
    "SampleMetric",
    "cached_reference",
    "clip_vision",
    "dinov2",
    "frechet_distance",
]
