"""What the server of forks (``workers``) imports and loads, once for all processes that it forks."""

import contextlib

import matplotlib.backends.backend_agg  # noqa: F401
import scipy.linalg  # noqa: F401
import sklearn.svm  # noqa: F401
import torch._dynamo  # noqa: F401  (a model's first weights on the meta device ask for it)

import tests.forked  # noqa: F401
from ig_dist.errors import ConfigError
from ig_dist.evaluation.extractors.extractor import get_extractor

with contextlib.suppress(ConfigError):  # where it is not installed the tests say so
    get_extractor("efficientnet_lite0")
