"""What the server of forks (``workers``) imports and loads, once for all processes that it forks."""

import contextlib

import sklearn.svm  # noqa: F401

import tests.distributed.workers  # noqa: F401
from ig_dist.errors import ConfigError
from ig_dist.evaluation.extractors.extractor import get_extractor

with contextlib.suppress(ConfigError):  # where it is not installed the tests say so
    get_extractor("efficientnet_lite0")
