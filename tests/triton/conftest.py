"""What the tests of both verifiers share: how many launches they take, and how small a split is."""

from collections.abc import Callable

import pytest

from eesd_kernels.triton import rows

NEVER, ALWAYS = 0, 1 << 60


@pytest.fixture(params=[ALWAYS, NEVER], ids=["race in all rows", "race in one"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FOLD_BELOW", request.param)
    if not request.param:  # and each program takes several splits
        monkeypatch.setattr(rows, "PROGRAMS", 1)
        monkeypatch.setattr(rows, "RACING", 1)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Splits of so many ids, so that a small vocabulary has several."""
    return lambda block: monkeypatch.setattr(rows, "SPLIT", block)
