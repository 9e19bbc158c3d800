"""How numbers are said: one place, so that terminal, page and markdown agree."""

from __future__ import annotations

import math
from pathlib import Path

MISSING = "\u2013"


def fixed(value: float | None, digits: int = 1) -> str:
    """``31.2``; a dash where there is no number."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """Three significant digits with k, M or B: ``12.3 M``."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled) * 1.0005)))}f} {unit}"
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def memory(value: float | None) -> str:
    """Bytes as ``1.23 GiB``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value / 2**30:.2f} GiB"


def seconds(value: float | None) -> str:
    """``12.3 ms`` or ``1.23 s``; a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as ``1.2 %``; a value that is small but not nothing says so."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 0 < value < 0.5 * 10 ** (-digits - 2):
        return f"< {10**-digits:.{digits}f} %"
    return f"{100 * value:.{digits}f} %"


def significant(value: float | None) -> str:
    """A loss, a rate: four significant digits, without an exponent where that stays short."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def perplexity(value: float | None) -> str:
    """A perplexity: two digits after the point below 100, none above, short beyond ten thousand."""
    if value is None or value < 100:
        return fixed(value, 2)
    return fixed(value, 0) if value < 1e4 else short(value)


def duration(seconds: float | None) -> str:
    """``8.4 min``, ``42 s`` or ``3.2 h``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """``1 expert``, ``3 experts``, ``no experts``."""
    return f"{format(number, ',') if number else 'no'} {noun}{'' if number == 1 else 's'}"


def nearby(path: Path) -> str:
    """`path` as one would type it: from the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
