"""How good and how varied generated images are, in the feature space of a judge.

Importing this package costs torch alone.
"""

from softdimo_fast.metrics.diversity import class_entropy
from softdimo_fast.metrics.evaluate import ImageMetrics, Judge, evaluate_images
from softdimo_fast.metrics.frechet import frechet_distance
from softdimo_fast.metrics.manifold import ManifoldMetrics, manifold_metrics

__all__ = [
    "ImageMetrics",
    "Judge",
    "ManifoldMetrics",
    "class_entropy",
    "evaluate_images",
    "frechet_distance",
    "manifold_metrics",
]
