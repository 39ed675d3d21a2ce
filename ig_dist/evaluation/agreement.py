"""Label agreement: does a classifier see the class that was asked for?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ig_dist.errors import ConfigError
from ig_dist.evaluation.features import pixel_extractor

if TYPE_CHECKING:
    from sklearn.svm import SVC

CLASSIFIER = "scikit-learn SVC(C=10, gamma='scale') on pixels / 127.5 - 1, trained on the reference"


def train_classifier(batches: Iterable[tuple[NDArray[np.uint8], NDArray[np.int32]]]) -> SVC:
    """A support vector classifier of real images (B, H, W, C) with labels (B,), for images of a few pixels."""
    from sklearn.svm import SVC

    extractor = pixel_extractor()
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            "label_agreement needs at least two classes in the reference: use evaluate.metrics=[fd_pixel]"
        )
    return SVC(C=10, gamma="scale").fit(extractor.extract(images), labels)


def label_agreement(classifier: SVC, units: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> float:
    """Share of images (B, H, W, C) that the classifier puts into the class (B,) that was asked for."""
    extractor = pixel_extractor()
    agree = [classifier.predict(extractor.extract(images)) == labels for images, labels in units]
    return float(np.concatenate(agree).mean())
