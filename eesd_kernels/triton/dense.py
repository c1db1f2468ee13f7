"""Dense draft laws `[B, K, V]` for verify_linear: three more passes, over rows that use them.

The sums W of the weights; for block rows the mass of `max(a p - q, 0)`; and the race over the
stopped row with that as its weights, beside one over p for where nothing is left. Sparse laws need
none of this (`rows.py`); dense ones are for drafts from elsewhere and are read here once each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton import rows
from eesd_kernels.triton.levels import BLOCK_LAW, stands
from eesd_kernels.triton.random import race_noise, words_of_block
from eesd_kernels.triton.rows import (
    ARRIVED,
    DEPTH,
    PLACE,
    ROW,
    SCALE,
    STOP,
    SUM,
    TAKE,
    TOP,
)
from eesd_kernels.triton.splits import (
    NO_ID,
    TARGET,
    exponent,
    finite_or_zero,
    load_split,
    mass_of,
    merge,
    winner,
)


@triton.jit
def _weights_kernel(q_ptr, length_ptr, sums_ptr, drafts, vocab, splits, BLOCK: tl.constexpr):
    b, row, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if row < tl.load(length_ptr + b):
        ids = split * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(q_ptr + (b * drafts + row) * vocab + ids, mask=ids < vocab, other=0.0)
        tl.store(sums_ptr + (b * drafts + row) * splits + split, tl.sum(w, 0))


@triton.jit
def _levels_kernel(
    logits_ptr, stride_b, stride_r, q_ptr, draft_ids_ptr, length_ptr, law_ptr, temperature_ptr,
    cutoff_ptr, partial_ptr, sums_ptr, levels_ptr, drafts, vocab, splits, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """a, top and normaliser / W of the block rows' levels; a is 0 in the others."""
    b = tl.program_id(0).to(tl.int64)
    level, split = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    length = tl.minimum(tl.load(length_ptr + b), drafts)
    temperature = tl.load(temperature_ptr + b)
    block = (tl.load(law_ptr + b) == BLOCK_LAW) & (temperature > 0)
    c = exponent(temperature)
    drafted = level < length
    listed = drafted[:, None] & (split < splits)[None, :]
    t = tl.load(draft_ids_ptr + b * drafts + level, mask=drafted, other=-1)
    known = (t >= 0) & (t < vocab)
    t = tl.where(known, t, 0)
    at = logits_ptr + b * stride_b + level.to(tl.int64) * stride_r + t
    x = tl.load(at, mask=known, other=float("-inf")).to(tl.float32)
    if cutoff_ptr is not None:
        cutoff = tl.load(cutoff_ptr + b * (drafts + 1) + level, mask=drafted, other=0.0)
        x = tl.where(x < cutoff, float("-inf"), x)
    w_t = tl.load(q_ptr + (b * drafts + level) * vocab + t, mask=known, other=0.0)
    at = sums_ptr + (b * drafts + level)[:, None] * splits + split[None, :]
    w_all = tl.sum(tl.load(at, mask=listed, other=0.0).to(tl.float64), 1)
    at = partial_ptr + (b * (drafts + 1) + level)[:, None] * 4 * splits + split[None, :]
    tops = tl.load(at + TOP * splits, mask=listed, other=float("-inf"))
    sums = tl.load(at + SUM * splits, mask=listed, other=0.0)
    top, norm = merge(tops, sums, c, 1)
    growth = mass_of(x, top, c) * w_all / (w_t.to(tl.float64) * norm.to(tl.float64))
    a = tl.where(block, stands(growth, level, length), 0.0)
    at = levels_ptr + (b * drafts + level) * 3
    tl.store(at, a.to(tl.float32), mask=level < drafts)
    tl.store(at + 1, top, mask=level < drafts)
    tl.store(at + 2, (norm / w_all).to(tl.float32), mask=level < drafts)


@triton.jit
def _left(x, top, c, scale, take, w):
    """p's `exp((x - top) / T)` and what `scale p - q` leaves of it, in its units."""
    p = tl.exp2((x - finite_or_zero(top)) * c)
    return p, tl.maximum(scale * p - take * w, 0.0)


@triton.jit
def _mass_kernel(
    logits_ptr, stride_b, stride_r, q_ptr, length_ptr, temperature_ptr, cutoff_ptr, levels_ptr,
    mass_ptr, drafts, vocab, splits, BLOCK: tl.constexpr,
):  # fmt: skip
    b, row, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    at = levels_ptr + (b * drafts + row) * 3
    scale = tl.load(at)
    if row < tl.load(length_ptr + b):
        left = 0.0  # of an a that is 0 in float32, and not always in the walk
        if scale > 0:
            c = exponent(tl.load(temperature_ptr + b))
            cutoff = float("-inf")
            if cutoff_ptr is not None:
                cutoff = tl.load(cutoff_ptr + b * (drafts + 1) + row)
            row_ptr = logits_ptr + b * stride_b + row.to(tl.int64) * stride_r
            ids, x = load_split(row_ptr, cutoff, split * BLOCK, vocab, BLOCK)
            w = tl.load(q_ptr + (b * drafts + row) * vocab + ids, mask=ids < vocab, other=0.0)
            _, rest = _left(x, tl.load(at + 1), c, scale, tl.load(at + 2), w)
            left = tl.sum(rest, 0)
        tl.store(mass_ptr + (b * drafts + row) * splits + split, left)


@triton.jit
def _dense_race_kernel(
    logits_ptr, stride_b, stride_r, q_ptr, temperature_ptr, cutoff_ptr, seed_ptr, position_ptr,
    base_ptr, partial_ptr, stop_ptr, excluded_ptr, candidate_ptr, token_ids_ptr, drafts, vocab,
    splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    stop = stop_ptr + b * STOP
    row = tl.load(stop + ROW)
    if row >= 0:
        c = exponent(tl.load(temperature_ptr + b))
        cutoff = float("-inf")
        if cutoff_ptr is not None:
            cutoff = tl.load(cutoff_ptr + b * (drafts + 1) + row)
        row_ptr = logits_ptr + b * stride_b + row.to(tl.int64) * stride_r
        first = split * BLOCK
        ids, x = load_split(row_ptr, cutoff, first, vocab, BLOCK)
        some = tl.arange(0, SPLITS)
        tops = partial_ptr + ((b * (drafts + 1) + row) * 4 + TOP) * splits + some
        top = tl.max(tl.load(tops, mask=some < splits, other=float("-inf")), 0)
        scale = tl.load(stop + SCALE).to(tl.float32, bitcast=True)
        take = tl.load(stop + TAKE).to(tl.float32, bitcast=True)
        read = tl.where(take > 0, vocab, 0)
        w = tl.load(q_ptr + (b * drafts + row) * vocab + ids, mask=ids < read, other=0.0)
        p, left = _left(x, top, c, scale, take, w)
        left = tl.where(ids == tl.load(excluded_ptr + b), 0.0, left)
        place = tl.load(position_ptr + b) + tl.load(stop + DEPTH) + 1
        noise = race_noise(
            words_of_block(first, place, tl.load(base_ptr + b), TARGET, tl.load(seed_ptr + b),
                           BLOCK)
        )  # fmt: skip
        key, who = winner(tl.where(left > 0, noise / left, float("inf")), ids, 0)
        rest_key, rest = winner(tl.where(p > 0, noise / p, float("inf")), ids, 0)
        mine = candidate_ptr + b * 4 * splits
        tl.store(mine + split, key.to(tl.int32, bitcast=True))
        tl.store(mine + splits + split, who)
        tl.store(mine + 2 * splits + split, rest_key.to(tl.int32, bitcast=True))
        tl.store(mine + 3 * splits + split, rest)
        tl.debug_barrier()  # the block's stores stand before its arrival
        if tl.atomic_add(stop + ARRIVED, 1, sem="acq_rel") == splits - 1:
            live = some < splits
            best = tl.full((), float("inf"), tl.float32)
            token = tl.full((), 0, tl.int32)
            for race in tl.static_range(1, -1, -1):  # over p, then over what is left
                at = mine + 2 * race * splits + some
                keys = tl.load(at, mask=live, other=0x7F800000, cache_modifier=".cg")
                them = tl.load(at + splits, mask=live, other=NO_ID, cache_modifier=".cg")
                best, chosen = winner(keys.to(tl.float32, bitcast=True), them, 0)
                token = tl.where(best < float("inf"), chosen, token)
            tl.store(token_ids_ptr + b * (drafts + 1) + tl.load(stop + PLACE), token)


def weights(q: Tensor, draft_length: Tensor, splits: int) -> Tensor:
    """W in parts, float32 `[B, K, S]`; rows beyond the draft's length are not written."""
    batch, drafts, vocab = q.shape
    sums = q.new_empty(batch, drafts, splits)
    block, warps = rows.split_of(vocab)
    if drafts:
        _weights_kernel[(batch, drafts, splits)](
            q, draft_length, sums, drafts, vocab, splits, BLOCK=block, num_warps=warps
        )
    return sums


def masses(
    logits: Tensor,
    q: Tensor,
    draft_ids: Tensor,
    draft_length: Tensor,
    law: Tensor,
    temperature: Tensor,
    cutoff: Tensor | None,
    partial: Tensor,
    sums: Tensor,
) -> Tensor:
    """The masses of `max(a p - q, 0)` times the rows' normalisers, in parts.

    Args:
        partial: of `rows.statistics`. sums: of `weights`.

    Returns:
        float32 `[B, K, S]`, 0 in rows that no block rule reads; rows from the length on are not
        written.
    """
    batch, drafts, vocab = q.shape
    splits = sums.shape[2]
    left, levels = torch.empty_like(sums), q.new_empty(batch, drafts, 3)
    block, warps = rows.split_of(vocab)
    if drafts:
        _levels_kernel[(batch,)](
            logits, logits.stride(0), logits.stride(1), q, draft_ids, draft_length, law,
            temperature, cutoff, partial, sums, levels, drafts, vocab, splits,
            ROWS=triton.next_power_of_2(drafts + 1), SPLITS=triton.next_power_of_2(splits),
            num_warps=warps,
        )  # fmt: skip
        _mass_kernel[(batch, drafts, splits)](
            logits, logits.stride(0), logits.stride(1), q, draft_length, temperature, cutoff,
            levels, left, drafts, vocab, splits, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return left


def race(
    logits: Tensor,
    q: Tensor,
    temperature: Tensor,
    cutoff: Tensor | None,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    partial: Tensor,
    stop: Tensor,
    excluded: Tensor,
    token_ids: Tensor,
) -> None:
    """`rows.race` over `max(SCALE p - TAKE q, 0)` without one excluded id; `excluded [B, 1]`."""
    batch, width, vocab = logits.shape
    (block, warps), splits = rows.split_of(vocab), partial.shape[3]
    candidate = torch.empty(batch, 4, splits, dtype=torch.int32, device=logits.device)
    _dense_race_kernel[(batch, splits)](
        logits, logits.stride(0), logits.stride(1), q, temperature, cutoff, seed, position, base,
        partial, stop, excluded, candidate, token_ids, width - 1, vocab, splits, BLOCK=block,
        SPLITS=triton.next_power_of_2(splits), num_warps=warps,
    )  # fmt: skip
