"""What fields of the config may hold, and what its groups share."""

from __future__ import annotations

from typing import Annotated

import fsspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ig_dist.terminal.extras import missing

Positive = Annotated[int, Field(gt=0)]


NonNegative = Annotated[int, Field(ge=0)]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Seed = Annotated[int, Field(ge=0, lt=2**63)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


def _known_protocol(url: str) -> str:
    protocol = fsspec.utils.get_protocol(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        if protocol in ("s3", "s3a") and isinstance(error, ImportError):
            raise ValueError(missing("s3", f"{url} needs")) from None
        raise ValueError(" ".join(str(error).split())) from None
    return url


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"interval is {list(interval)}; write low <= high")
    return interval


Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


Url = Annotated[str, AfterValidator(_known_protocol)]


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Group(BaseModel):
    """Fields with their descriptions; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
