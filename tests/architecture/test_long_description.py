"""The long description of the package: README.md without links that an index of packages cannot follow."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling", reason="the build back end is not installed")
sys.path.insert(0, str(ROOT))
from hatch_build import Readme, without_relative_links  # noqa: E402

LINK = re.compile(r"\]\(([^()\s]+)\)")


def test_links_become_absolute_or_their_text() -> None:
    text = (
        "A [b `c`](d/e.md#f), [x](https://x.y/z), [top](#top) ![p](q.png).\n\n"
        "[![alt](a.png)](b.html)\n\n```md\n[k](l)\n```\n"
    )
    assert without_relative_links(text) == ("A b `c`, [x](https://x.y/z), [top](#top) .\n\n```md\n[k](l)\n```\n")
    assert without_relative_links(text, "https://h/r/") == (
        "A [b `c`](https://h/r/d/e.md#f), [x](https://x.y/z), [top](#top) ![p](https://h/r/q.png).\n\n"
        "[![alt](https://h/r/a.png)](https://h/r/b.html)\n\n```md\n[k](l)\n```\n"
    )


@pytest.mark.parametrize("base", ["", "https://example.org/moekit"])
def test_readme_has_no_relative_link_in_the_metadata(base: str) -> None:
    metadata: dict[str, object] = {}
    Readme(str(ROOT), {"base-url": base}).update(metadata)
    readme = metadata["readme"]
    assert isinstance(readme, dict)
    assert readme["content-type"] == "text/markdown"
    targets = LINK.findall(readme["text"])
    assert targets
    assert all(re.match(r"https://|#", target) for target in targets)
    assert ("](https://example.org/moekit/docs/sample-report.html)" in readme["text"]) == bool(base)
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in readme["text"].splitlines() if line.startswith("#")] == [
        line for line in written.splitlines() if line.startswith("#")
    ]
    assert "`moekit run gshard`" in readme["text"]
