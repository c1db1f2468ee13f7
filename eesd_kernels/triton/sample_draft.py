"""Children from a sparse exit law, one program a row: the k candidates stay in one warp.

`draw` is the whole op on registers; the end of `exit_draft` calls it too. Float32 inside: scores
are taken against the best value, so that those that can win lose no digits to the temperature.
"""

import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.laws import Law, Purpose
from eesd_kernels.triton.keys import best_keys, id_of, pack, sum_of_parts
from eesd_kernels.triton.random import log_race, words_of_ids

DETERMINISTIC = tl.constexpr(int(Law.DETERMINISTIC))
COUPLED = tl.constexpr(int(Law.COUPLED))
DRAFT = tl.constexpr(int(Purpose.DRAFT))
TARGET = tl.constexpr(int(Purpose.TARGET))


@triton.jit
def draw(values, ids, temperature, law, seed, position, base, node, LOG_K: tl.constexpr):
    """values, ids `[2^LOG_K]` (id -1: none) to q, and the ids in the order drawn, then -1."""
    K: tl.constexpr = 1 << LOG_K
    at = tl.arange(0, K)
    valid = (ids >= 0) & (values > float("-inf"))
    best = tl.max(tl.where(valid, values, float("-inf")), 0)
    hot = temperature > 0
    score = tl.where(valid, values - best, float("-inf"))
    score = tl.div_rn(score, tl.zeros_like(score) + tl.where(hot, temperature, 1.0))
    weight = tl.where(valid, tl.exp(score), 0.0)
    total = sum_of_parts(weight, 0)
    first = tl.min(tl.where(valid & (values == best), at, K), 0)
    one_hot = tl.where(at == first, 1.0, 0.0)
    q = tl.where(hot, weight / tl.where(total > 0, total, 1.0), one_hot)

    coupled = law == COUPLED
    words = words_of_ids(
        tl.maximum(ids, 0), position, tl.where(coupled, 0, base),
        tl.where(coupled, TARGET, DRAFT), seed, tl.where(coupled, 0, node),
    )  # fmt: skip
    racing = hot & (law != DETERMINISTIC)
    score = tl.where(racing, score - log_race(words), score)
    order = best_keys(tl.where(valid, pack(score, at), 0), LOG_K, LOG_K)
    place = tl.where(order == 0, 0, id_of(order))
    return q, tl.where(order == 0, -1, tl.gather(ids, place, 0))


@triton.jit(do_not_specialize=["k", "n"])
def _sample_draft_kernel(
    values_ptr, ids_ptr, temperature_ptr, law_ptr, seed_ptr, position_ptr, base_ptr, parent_ptr,
    child_ptr, q_ptr, stride_v, stride_i, k, n, LOG_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 1 << LOG_K)
    values = tl.load(values_ptr + row * stride_v + at, mask=at < k, other=float("-inf"))
    ids = tl.load(ids_ptr + row * stride_i + at, mask=at < k, other=-1)
    node = 0
    if parent_ptr is not None:
        node = tl.load(parent_ptr + row)
    q, children = draw(
        values, ids, tl.load(temperature_ptr + row), tl.load(law_ptr + row),
        tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(base_ptr + row), node, LOG_K,
    )  # fmt: skip
    tl.store(q_ptr + row * k + at, q, mask=at < k)
    tl.store(child_ptr + row * n + at, children, mask=at < n)


def log2_up(size: int) -> int:
    """The exponent of the least power of two that holds a size."""
    return (size - 1).bit_length()


def sample_draft(
    values: Tensor,
    ids: Tensor,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    rows, k = values.shape
    if out is None:
        out = ids.new_empty(rows, n), values.new_empty(rows, k)
    if rows:
        values, ids = (x if x.stride(1) == 1 else x.contiguous() for x in (values, ids))
        scalars = [x.contiguous() for x in (temperature, law, seed, position, base)]
        _sample_draft_kernel[(rows,)](
            values, ids, *scalars, None if parent is None else parent.contiguous(), *out,
            values.stride(0), ids.stride(0), k, n, LOG_K=log2_up(k), num_warps=1,
        )  # fmt: skip
    return out
