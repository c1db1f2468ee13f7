"""Cutoffs: the ids at or above them are those that the reference's filters keep.

Masses are float32 here and float64 there. Where the mass above some id is within `NEAR` of top_p
the kernel may keep it or not; the kept ids lie between those of top_p - NEAR and top_p + NEAR, and
where these two agree, which is nearly everywhere, they are settled.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels.triton.target_law import cutoffs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = 1e-5

Filters = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p


def kept(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    law = reference.target_law(x, temperature, top_k, min(max(top_p, 1e-9), 1.0), min_p)
    assert law is not None
    return law > 0


def run(rows: Tensor, filters: list[Filters], **changes: Any) -> Tensor:
    """float32 `[n]` for rows `[n, V]`, a sequence each."""
    columns = zip(*filters, strict=True)
    types = (torch.float32, torch.int32, torch.float32, torch.float32)
    each = [torch.tensor(c, dtype=t, device=DEVICE) for c, t in zip(columns, types, strict=True)]
    given = dict(zip(("temperature", "top_k", "top_p", "min_p"), each, strict=True))
    given["live"] = torch.ones(len(rows), dtype=torch.int32, device=DEVICE)
    return cutoffs(rows[:, None].to(DEVICE), **{**given, **changes})[:, 0].to(rows.device)


def check(rows: Tensor, filters: list[Filters], unclear: int = 0) -> None:
    """Kept ids by the rule above; at most so many rows where it leaves a choice."""
    got = run(rows, filters)
    choices = 0
    for x, cutoff, (temperature, top_k, top_p, min_p) in zip(rows, got, filters, strict=True):
        top_p = torch.tensor(top_p).item()  # as it is in float32
        min_p = torch.tensor(min_p).item()
        mine = (x.float() >= cutoff) & (x > -torch.inf)
        few = kept(x, temperature, top_k, top_p - NEAR * (top_p < 1), min_p)
        most = kept(x, temperature, top_k, top_p + NEAR * (top_p < 1), min_p)
        settings = (x.dtype, len(x), temperature, top_k, top_p, min_p)
        assert not (few & ~mine).any(), settings
        assert not (mine & ~most).any(), settings
        choices += int(not torch.equal(few, most))
    assert choices <= unclear


def filters_of(vocab: int) -> list[Filters]:
    return [
        (1.0, 1, 1.0, 0.0), (0.7, 3, 1.0, 0.0), (1.0, vocab - 1, 1.0, 0.0),
        (1.3, vocab, 1.0, 0.0), (1.0, vocab + 7, 0.5, 0.0), (1.0, 0, 1e-6, 0.0),
        (0.8, 0, 0.9, 0.0), (2.0, 0, 0.3, 0.0), (1.0, 0, 0.9999, 0.0), (1.0, 0, 1.0, 1.0),
        (1.0, 0, 1.0, 0.07), (0.6, vocab // 2, 0.8, 0.0), (1.0, vocab // 2, 0.95, 0.02),
        (30.0, vocab // 3 + 1, 0.7, 0.5), (1e-6, 2, 0.9, 0.0), (1e6, 0, 0.3704, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 17, 1000])
def test_filters(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    filters = filters_of(vocab)
    if DEVICE == "cpu":  # all of them, over the dtypes
        filters = filters[DTYPES.index(dtype) :: 3] + filters[-2:]
    # At 0.9999 the rule leaves a choice in both wider rows.
    check((torch.randn(len(filters), vocab) * 3).to(dtype), filters, unclear=int(vocab > 5))


def test_nothing_is_cut_where_nothing_is_filtered() -> None:
    x = torch.randn(5, 17)
    off = [(1.0, 0, 1.0, 0.0), (1.0, 17, 1.0, 0.0), (0.0, 3, 0.5, 0.5), (1.0, 99, 1.0, 0.0),
           (1.0, 3, 0.5, 0.5)]  # fmt: skip
    live = torch.tensor([1, 1, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    assert (run(x, off, live=live) == -torch.inf).all()
    none = {"top_k": None, "top_p": None, "min_p": None}
    assert (run(x, off, **none) == -torch.inf).all()
    assert run(x, off, live=live, bonus=1)[4] > -torch.inf


def test_equals_stand_together() -> None:
    """Ties at the threshold, of 0 and -0 too; all alike; and what -inf leaves."""
    x = torch.tensor([
        [1.0, 3.0, 0.0, 3.0, 3.0, -1.0], [0.0, -0.0, 2.0, -0.0, -1.0, 0.0],
        [0.5] * 6, [-torch.inf, 2.0, -torch.inf, 1.0, 1.0, 0.0],
        [-torch.inf, -torch.inf, 7.0, -torch.inf, -torch.inf, -torch.inf],
    ])  # fmt: skip
    cases = [
        ((1.0, 1, 1.0, 0.0), [3, 2, 0.5, 2, 7]), ((1.0, 2, 1.0, 0.0), [3, 0, 0.5, 1, -torch.inf]),
        ((1.0, 0, 1e-6, 0.0), [3, 2, 0.5, 2, 7]), ((0.7, 0, 1.0, 1.0), [3, 2, 0.5, 2, 7]),
        ((1.0, 4, 1.0, 0.0), [1, 0, 0.5, 0, -torch.inf]),
    ]  # fmt: skip
    for filters, want in cases if DEVICE == "cuda" else cases[1:3]:
        assert run(x, [filters] * 5).tolist() == want


def test_a_mass_that_is_nearly_the_threshold() -> None:
    """Of 8 equal groups each holds 1/8: the rule allows either side, the kernel takes one."""
    x = torch.arange(8).repeat_interleave(3).neg().float()[None] * 1e-4
    for share in (0.125, 0.5, 0.875):
        check(x, [(1.0, 0, share, 0.0)], unclear=1)


def test_bad_rows_do_no_harm() -> None:
    x = torch.randn(4, 40)
    x[0, 3], x[1], x[2, 39] = torch.nan, -torch.inf, torch.inf
    got = run(x, [(1.0, 5, 0.7, 0.1)] * 4)
    assert torch.equal(got[3:], run(x[3:], [(1.0, 5, 0.7, 0.1)]))


def test_a_sample_that_misleads() -> None:
    """Over 8,192 ids the bracket is guessed: here from ids unlike the others, on either side."""
    vocab = 40_000
    seen = (torch.arange(4096) // 64) * (vocab // 64) + torch.arange(4096) % 64
    x = torch.randn(2, vocab)
    x[0, seen] += 9.0
    x[1, seen] -= 9.0
    filters = [(1.0, 9_000, 1.0, 0.0), (1.0, 0, 0.6, 0.0)]
    check(x.bfloat16(), filters)
    check(x, filters[::-1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [8193, 32_003, 128_256, 151_936])
def test_real_sizes(vocab: int, dtype: torch.dtype) -> None:
    """Rows from flat to peaked. Of flat ones a few ids of 1e-5 of the mass may go either way."""
    torch.manual_seed(vocab)
    filters = [*filters_of(vocab), (1.0, 50, 0.9, 0.0), (0.7, 9_000, 0.99, 0.0),
               (1.0, 0, 0.95, 0.001), (1.0, 20_000, 1.0, 0.0)]  # fmt: skip
    for first in range(3):
        scale = torch.tensor([0.3, 3.0, 12.0]).roll(first).repeat(7)[: len(filters), None]
        rows = torch.randn(len(filters), vocab) * scale
        check(rows.to(dtype).cuda(), filters, unclear=len(filters))


@pytest.mark.gpu
def test_a_row_is_the_same_in_any_batch() -> None:
    torch.manual_seed(3)
    x = torch.randn(64, 128_256, device="cuda").mul(3).bfloat16()
    filters = [(1.0, 50 * (i % 3), 0.5 + 0.007 * i, 0.0) for i in range(64)]
    together = run(x, filters)
    for rows in ([0], [63], list(range(63, -1, -1)), [5, 9]):
        assert torch.equal(run(x[rows], [filters[i] for i in rows]), together[rows])
    shared = x.view(8, 8, -1)
    live = torch.full((8,), 7, dtype=torch.int32, device="cuda")
    each = (torch.ones(8, device="cuda"), None, torch.full((8,), 0.9, device="cuda"), None)
    wide = cutoffs(shared, live, *each)
    assert (wide[:, 7] == -torch.inf).all()
    one = cutoffs(shared[3:4], live[3:4], *(e if e is None else e[3:4] for e in each))
    assert torch.equal(one, wide[3:4])
