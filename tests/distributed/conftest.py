"""Processes that the tests of this folder share: starting them is what costs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.rank_pool import RankPools


@pytest.fixture(scope="package")
def pools() -> Iterator[RankPools]:
    started = RankPools()
    yield started
    started.close()
