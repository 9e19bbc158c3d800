"""A view becomes a page or markdown: the templates, what they may call, and the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moekit import atomic
from moekit.report import samples, style, wording
from moekit.report.view import View

_LONGEST = 400  # characters of a text in markdown
_FILTERS: dict[str, Callable[..., Any]] = {
    "code": lambda text: Markup(f"`{text.replace('`', chr(39))}`"),
    "count": wording.count,
    **{f.__name__: f for f in (samples.compared, samples.cut, samples.languages, samples.marked, samples.rest)},
}


def html(view: View) -> str:
    """A page that needs nothing else; whatever is not of the template is escaped."""
    css = (resources.files("moekit.report") / "page.css").read_text(encoding="utf-8")
    return _rendered("page.html", view=view, css=Markup(f"{css}\n{style.palette_css()}")).lstrip()


def markdown(view: View, *, samples_per_direction: int = 2) -> str:
    """Headline, findings, tables and samples as GitHub-flavoured markdown; texts stand for themselves."""
    text = _rendered("run.md", view=view, samples_per_direction=samples_per_direction)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def literal(value: object) -> Markup:
    """`value` so that markdown shows it as it is, on one line; markup stays."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} more characters)"
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def save(path: Path, text: str) -> Path:
    """Write a page whole or not at all; half a surrogate pair, which a sample may hold, becomes a question mark.

    Raises:
        UserError: if the folder cannot be written to or the disk is full.
    """
    atomic.write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def _rendered(template: str, **given: Any) -> str:
    environment = Environment(
        loader=PackageLoader("moekit.report", ""),
        autoescape=True,
        finalize=literal if template.endswith(".md") else None,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= _FILTERS
    return environment.get_template(template).render(given)
