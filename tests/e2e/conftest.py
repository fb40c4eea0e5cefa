"""A small tokenized dataset for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.tokenize_setup import TokenizeSetup


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return TokenizeSetup(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def made(prepared):
    """A finished dataset; not to be changed."""
    return prepared.run("made")


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "tokens"))
