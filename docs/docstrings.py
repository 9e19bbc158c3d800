"""For the site only: what our docstrings mean, told to griffe, which reads them for the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """`Example:` becomes the section that griffe knows, `Source:` and `Differs:` paragraphs of their own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^( *)(Source|Differs): ", r"\1**\2:** ", text, flags=re.MULTILINE)
