"""The generated corpus of the default settings."""

import pytest

from moekit.babel import Babel


@pytest.fixture(scope="module")
def babel() -> Babel:
    return Babel()
