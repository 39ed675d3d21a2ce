"""What fields of the config may hold, and what its groups share."""

import json
from typing import Annotated, Any, ClassVar, Self

import fsspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ig_dist.terminal.extras import missing


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


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
Url = Annotated[str, AfterValidator(_known_protocol)]


class Group(BaseModel):
    """Fields with their descriptions; unknown keys are refused, and keys of a choice that was not made."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
    keys_of: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Keys that mean something for some values of another key only: that key, and its values."""

    @model_validator(mode="after")
    def _keys_of_the_choice(self) -> Self:
        group = type(self).__name__.removesuffix("Config").lower()
        for key, (choice, *values) in self.keys_of.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and getattr(self, choice) not in values:
                raise ValueError(
                    f"{group}.{key}={_plain(getattr(self, key))} needs {group}.{choice}={' or '.join(values)}, it is"
                    f" {getattr(self, choice)}: set {group}.{choice}={values[0]} or {group}.{key}={_plain(default)}"
                )
        return self


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
