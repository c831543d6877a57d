"""Frozen feature networks, by name or path: for distances between image sets and for losses."""

from flowdistill.features.extractor import FeatureExtractor, load_features

__all__ = ["FeatureExtractor", "load_features"]
