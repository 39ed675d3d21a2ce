"""What the server of forks (``forked``) imports and loads, once for all processes that it forks."""

import contextlib

import matplotlib.backends.backend_agg  # noqa: F401
import s3fs  # noqa: F401
import scipy.linalg  # noqa: F401
import sklearn.svm  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401

import tests.forked  # noqa: F401
from ig_dist.errors import ConfigError
from ig_dist.features.extractors.extractor import get_extractor

with contextlib.suppress(ConfigError):  # where it is not installed the tests say so
    get_extractor("efficientnet_lite0")
