"""A trained run behind a port of this machine: a page for the browser, and JSON. Nothing but the standard library."""

from moekit.serving.requests import Limits
from moekit.serving.server import serve

__all__ = ["Limits", "serve"]
