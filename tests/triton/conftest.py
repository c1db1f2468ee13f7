"""What kernel tests share: the interpreter's products, how verifiers are launched, small splits."""

from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter

from eesd_kernels.triton import rows

NEVER, ALWAYS = 0, 1 << 60


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter `tl.dot` is a BLAS's, in some of which a row's bits follow its place; here
    each element is summed in ascending order, as an element of a tensor core's product is."""

    def dot(_: Any, a: Any, b: Any, d: Any, *_how: Any) -> Any:
        x, y, total = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype), d.data.copy()
        for k in range(x.shape[-1]):
            total += x[..., k, None] * y[..., k, None, :]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=[ALWAYS, NEVER], ids=["race in all rows", "race in one"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FOLD_BELOW", request.param)
    if not request.param:  # and each program takes several splits; of several that race, one waits
        monkeypatch.setattr(rows, "PROGRAMS", 1)
        monkeypatch.setattr(rows, "RACING", 16)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Splits of so many ids, so that a small vocabulary has several."""
    return lambda block: monkeypatch.setattr(rows, "SPLIT", block)
