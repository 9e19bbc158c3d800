"""The parts a page is made of. Every function takes plain text and escapes it, unless a parameter is called `html`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape as _escape
from importlib import resources
from pathlib import Path

from moekit.errors import UserError
from moekit.report import style

# Nothing but the page itself: a browser that obeys this cannot be made to fetch or run anything by a sample's text.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def text(value: object) -> str:
    """`value` as text content."""
    return _escape(str(value), quote=False)


def page(title: str, html: str) -> str:
    """A whole document around `html`."""
    css = (resources.files("moekit.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{css}\n{style.palette_css()}\n</style>\n</head>\n"
        f"<body>\n{html}\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, lead: str, html: str) -> str:
    """A section that the navigation can jump to."""
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n<h2 id="{anchor}-title">{text(title)}</h2>\n'
        f'<p class="lead">{text(lead)}</p>\n{html}\n</section>'
    )


def note(message: str) -> str:
    """A remark set apart: mostly what is missing."""
    return f'<p class="note">{text(message)}</p>'


def figure(title: str, see: str, worry: str, html: str, *, table: str = "", wide: bool = False) -> str:
    """A picture with one sentence on what it shows, one on what would be bad ("" for none), and its numbers."""
    alarm = f"<em>Worry if</em> {text(worry)}" if worry else ""
    numbers = f"<details><summary>Numbers</summary>{table}</details>" if table else ""
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><h3>{text(title)}</h3>{text(see)} "
        f"{alarm}</figcaption>{html}{numbers}</figure>"
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1) -> str:
    """A table of data: the first column names the row, the first `text_columns` are aligned left."""

    def cell(tag: str, i: int, value: object) -> str:
        kind = "" if i < text_columns else ' class="n"'
        scope = ' scope="row"' if tag == "th" else ""
        return f"<{tag}{scope}{kind}>{text(value)}</{tag}>"

    head = "".join(
        f'<th scope="col"{"" if i < text_columns else " class=n"}>{text(h)}</th>' for i, h in enumerate(headers)
    )
    body = "\n".join(
        "<tr>" + "".join(cell("td" if i else "th", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def definitions(items: Mapping[str, str]) -> str:
    """A two-column table of names and texts."""
    rows = "\n".join(
        f'<tr><th scope="row">{text(k)}</th><td class="text">{text(v)}</td></tr>' for k, v in items.items()
    )
    return f'<div class="scroll"><table class="data"><tbody>\n{rows}\n</tbody></table></div>'


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (label, value, remark); the first is the main one."""
    cells = "".join(
        f"<div{' class=main' if i == 0 else ''}><dt>{text(label)}</dt>"
        f"<dd>{text(value)}<small>{text(remark)}</small></dd></div>"
        for i, (label, value, remark) in enumerate(items)
    )
    return f'<dl class="tiles">{cells}</dl>'


def heat(
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    *,
    kind: str = "",
    side: Sequence[str] = (),
    side_title: str = "",
    label_width: str = "4.2rem",
) -> str:
    """A heat map that is a table: each cell is (CSS class, text), so that it can be read as well as seen.

    Args:
        corner: what the rows are.
        columns: column headers.
        rows: (header, cells); a row may be shorter than the header.
        kind: "matrix" (roomy, with texts), "dense" (colours only; the texts are for readers of the page's source and
            screen readers) or "".
        side: an uncoloured text at the end of each row.
        side_title: its header.
        label_width: CSS width of the row headers.
    """
    tail = f'<col style="width:{label_width}">' if side else ""
    spread = f"<colgroup><col style='width:{label_width}'><col span={max(1, len(columns))}>{tail}</colgroup>"
    head = f'<th class="corner" scope="col">{text(corner)}</th>'
    head += "".join(f'<th class="x" scope="col">{text(c)}</th>' for c in columns)
    head += f'<th scope="col">{text(side_title)}</th>' if side else ""
    body = []
    for i, (name, cells) in enumerate(rows):
        line = "".join(f"<td class={css}>{text(value)}</td>" for css, value in cells)
        line += "<td></td>" * (len(columns) - len(cells))
        line += f'<td class="side">{text(side[i])}</td>' if side else ""
        body.append(f'<tr><th scope="row" title="{style.attribute(name)}">{text(name)}</th>{line}</tr>')
    return (
        f'<table class="heat {kind}">{spread}<thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(body)
        + "</tbody></table>"
    )


def scale(classes: Sequence[str], left: str, right: str, remark: str = "") -> str:
    """The legend of a heat map."""
    bar = "".join(f'<i class="{c}"></i>' for c in classes)
    more = f"<span>{text(remark)}</span>" if remark else ""
    return (
        f'<div class="scale"><span>{text(left)}</span><span class="bar" aria-hidden="true">{bar}</span>'
        f"<span>{text(right)}</span>{more}</div>"
    )


def write_text(path: Path, content: str) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a half.

    Raises:
        UserError: if the folder cannot be written to or the disk is full; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8", errors="replace"))
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}. Make room or choose another folder.") from error
    return path
