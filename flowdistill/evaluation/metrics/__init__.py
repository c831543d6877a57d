"""Metrics behind one protocol, one file each."""

from flowdistill.evaluation.metrics.base import (
    ARROWS,
    METRICS,
    Asked,
    Column,
    Expected,
    MeasuredImages,
    Metric,
    all_metrics,
    ranking_metric,
    register_metric,
)

__all__ = [
    "ARROWS",
    "METRICS",
    "Asked",
    "Column",
    "Expected",
    "MeasuredImages",
    "Metric",
    "all_metrics",
    "ranking_metric",
    "register_metric",
]
