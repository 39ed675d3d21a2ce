"""ig_dist: diffusion transformers with Internal Guidance, trained, sampled and scored exactly.

    import ig_dist
    pipe = ig_dist.load("runs/digits")
    pipe(labels=[3, 7], ig_scale=1.4)

The verbs of the command line are functions with the same defaults: ``encode``, ``train``, ``sample``, ``evaluate``,
``sweep``, ``write_report``. What they need is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ig_dist.api import load as load
    from ig_dist.api import sample as sample
    from ig_dist.api import sweep as sweep
    from ig_dist.api import train as train
    from ig_dist.config import Config as Config
    from ig_dist.encoding.run import encode as encode
    from ig_dist.errors import IgDistError as IgDistError
    from ig_dist.evaluation.evaluate import evaluate as evaluate
    from ig_dist.pipeline import Pipeline as Pipeline
    from ig_dist.report.page import write_report as write_report
    from ig_dist.sampling.pictures import grid as grid

__version__ = "0.1.0"
_PLACES = {
    "Config": "config",
    "IgDistError": "errors",
    "Pipeline": "pipeline",
    "encode": "encoding.run",
    "evaluate": "evaluation.evaluate",
    "grid": "sampling.pictures",
    "load": "api",
    "sample": "api",
    "sweep": "api",
    "train": "api",
    "write_report": "report.page",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ig_dist' has no attribute {name!r}")
    return getattr(import_module(f"ig_dist.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
