"""One Slurm cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.slurm_cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if lacks := missing():
        pytest.skip(f"a Slurm cluster needs {lacks}")
    with SlurmCluster() as started:
        yield started
