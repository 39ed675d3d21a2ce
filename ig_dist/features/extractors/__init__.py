"""Extractors: images to the features that scores are computed from."""
