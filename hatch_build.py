"""The long description of the package: README.md with no relative link, which an index of packages cannot follow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\[\]]*\]\([^()]*\))*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


class Readme(MetadataHookInterface):
    """Sets the dynamic field ``readme``; the option ``base-url`` says where the repository's files can be read."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        base = str(self.config.get("base-url", ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(text, base)}


def without_relative_links(text: str, base_url: str = "") -> str:
    """Markdown whose relative links begin with `base_url`; without one they become their text, and pictures go."""

    def link(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        label = _LINK.sub(link, label)
        if re.match(r"[a-z]+:|#", target):
            return f"{picture}[{label}]({target})"
        if base_url:
            return f"{picture}[{label}]({base_url.rstrip('/')}/{target})"
        return "" if picture else label

    parts = _FENCE.split(text)  # code, which is as it is, has the odd places
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))
