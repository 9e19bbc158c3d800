"""What the value of an option is: YAML, of which nothing that looks odd is more than a mistake."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "moekit"
"""The mode of parsers whose values are read so; jsonargparse's own is left to others."""


def _value(text: str) -> Any:
    """What jsonargparse makes of YAML.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return get_loader("yaml")(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Values such as `!!int` and `!!bool x` make PyYAML look into tables and empty texts.
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no YAML: {error}") from None


set_loader(MODE, _value, exceptions=(yaml.YAMLError, ValueError))
