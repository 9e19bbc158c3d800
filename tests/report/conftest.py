"""What is shown names moekit in a word, as on a machine where it is installed, wherever the tests run."""

from collections.abc import Iterator

import pytest

from moekit import shell


@pytest.fixture(autouse=True, scope="module")
def moekit_is_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shell, "program", lambda: shell.NAME)
        yield
