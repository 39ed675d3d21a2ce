"""Extractors: images to the features that scores are computed from."""

from ig_dist.features.extractors.extractor import EXTRACTORS, Extractor, get_extractor

__all__ = ["EXTRACTORS", "Extractor", "get_extractor"]
