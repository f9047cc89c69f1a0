"""One set of processes for all cases: starting PyTorch takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simllm.validation.execution.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool(4, timeout_s=240) as ranks:
        yield ranks
