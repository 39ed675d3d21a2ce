"""Numbers and protocol values as the report's reader wants them."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ig_dist.config.describe import guidance_name

Facts = list[tuple[str, str]]  # names and values
HASHES = re.compile(r"[0-9a-f]{16,}(, [0-9a-f]{16,})*")
LONG = 90  # characters of a value that fit on a line of the page
SHORT = 36  # characters of one that fits into a column


def number(value: float, digits: int = 4) -> str:
    """Significant digits without trailing zeros; thousands separated, powers of ten where they are shorter."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    text = score(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text else text


def compact(value: float, digits: int = 4) -> str:
    """A count that fits where space is short: in millions or billions from ten of them on."""
    for size, suffix in ((1e9, " B"), (1e6, " M")):
        if value >= 10 * size:
            return f"{value / size:,.1f}{suffix}"
    return number(value, digits)


def score(value: float, digits: int = 4) -> str:
    """Significant digits, zeros kept, so that a column of them lines up."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.{min(9, max(0, digits - 1 - math.floor(math.log10(abs(value)))))}f}"


def images_text(counts: Iterable[int | None]) -> str:
    """Numbers of images, e.g. ``N = 50,000``; empty where none is known."""
    known = sorted({count for count in counts if count})
    if not known:
        return ""
    return f"N = {known[0]:,}" if len(known) == 1 else f"N = {known[0]:,} to {known[-1]:,}"


def plain(value: Any) -> str:
    """A value of a protocol as text."""
    if isinstance(value, list) and all(isinstance(term, dict) and "kind" in term for term in value):
        return guidance_name(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def items(mapping: Mapping[str, Any]) -> Facts:
    """Values of a protocol as text; a mapping within it is opened."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update({f"{key} {part}": v for part, v in value.items()} if isinstance(value, dict) else {key: value})
    return [(key, plain(value)) for key, value in flat.items()]


def fits_a_column(key: str, value: Any) -> bool:
    """Whether a value of a protocol is short, and says something without being looked up."""
    text = plain(value)
    return not (key.endswith(("sha256", "_rule")) or key == "plan" or HASHES.fullmatch(text) or len(text) > SHORT)


def protocol_parts(protocol: Mapping[str, Any]) -> dict[str, Facts]:
    """What a reader looks for, ``shown``, and the hashes, rules and long texts, ``more``."""
    first = {key: value for key, value in protocol.items() if key in ("guidance", "reference")}
    first |= {key: value for key, value in protocol.items() if fits_a_column(key, value)}
    return {"shown": items(first), "more": items({k: v for k, v in protocol.items() if k not in first})}


def folded(value: str) -> str:
    """What stands for a long value until it is opened; empty: it is short enough to stand there itself."""
    if HASHES.fullmatch(value) and len(value) > 16:
        return ", ".join(f"{part[:12]}…" for part in value.split(", "))
    head = value[: LONG - 20]
    return f"{(head.rpartition(' ')[0] or head).rstrip(' ,;')} …" if len(value) > LONG else ""
