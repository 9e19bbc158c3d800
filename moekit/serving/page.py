"""The page of a server: one file, with a policy that lets nothing else run in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any


class Page:
    """The page of a run.

    Args:
        name: of the run.
        described: what the page is told of it.

    Attributes:
        body: the page in UTF-8.
        policy: its Content-Security-Policy: its own script and style by their hashes, and requests to its server.
    """

    def __init__(self, name: str, described: Mapping[str, Any]) -> None:
        page = resources.files("moekit.serving").joinpath("page.html").read_text(encoding="utf-8")
        [style], [script] = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script"))
        # In a script element only "<" could end it.
        data = json.dumps(described, ensure_ascii=False).replace("<", "\\u003c")
        self.body = page.replace("__NAME__", escape(name)).replace("__RUN__", data).encode("utf-8", errors="replace")
        self.policy = (
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
