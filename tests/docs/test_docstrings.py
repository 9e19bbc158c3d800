"""Examples in docstrings give what they say they give."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import moekit

MODULES = [info.name for info in pkgutil.walk_packages(moekit.__path__, "moekit.", onerror=lambda _: None)]


@pytest.mark.parametrize("name", ["moekit", *MODULES])
def test_doctests(name: str) -> None:
    if name.startswith("moekit.kernels") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is for Linux on x86-64")
    if name.endswith(".__main__"):
        pytest.skip("a command, not a module")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags, report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the output above"
