"""Measuring generated images: seeded generation, features, distances, precision and recall, reports."""

from flowdistill.evaluation.evaluate import PromptsInTurn, evaluate, prompt_conditions, student_sampler, teacher_sampler
from flowdistill.evaluation.evaluator import Evaluator, evaluate_models
from flowdistill.evaluation.generation import generate
from flowdistill.evaluation.metrics.kernel import kernel_distance
from flowdistill.evaluation.metrics.precision_recall import precision_recall
from flowdistill.evaluation.moments import Moments, frechet_distance
from flowdistill.evaluation.reference import Reference, load_reference
from flowdistill.evaluation.report import Report, Row
from flowdistill.features.extractor import FeatureExtractor, load_features

__all__ = [
    "Evaluator",
    "FeatureExtractor",
    "Moments",
    "PromptsInTurn",
    "Reference",
    "Report",
    "Row",
    "evaluate",
    "evaluate_models",
    "frechet_distance",
    "generate",
    "kernel_distance",
    "load_features",
    "load_reference",
    "precision_recall",
    "prompt_conditions",
    "student_sampler",
    "teacher_sampler",
]
