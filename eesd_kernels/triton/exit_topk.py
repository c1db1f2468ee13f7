"""RMSNorm, LM head, top-k and logsumexp in one pass over the weight, and no logits in memory.

Three launches, each set off before the end of the last (programmatic dependent launch):
- *prepare*, one program a row: the row normalised, and its seats cleared.
- *scan*, one program a tile of the weight and of up to 64 rows: the loop of `linear`, the tile's
  largest logit and its sum of exponentials; then, one by one, the logits that may be among the
  row's K best, K the power of two from k on.
- *merge*, one program a row: the K best lie in the K groups whose own best are the greatest.

A logit may be among the K best where it reaches the row's floor: the least of K seats, each the
largest logit yet of a K-th part of the groups. Seats only rise, and a logit under the floor has K
better ones, so what a program happens to see decides how much it writes, and no result.

Bound by reading the weight, `2 V H` bytes in bfloat16. A product's columns do not see each other,
H is summed in ascending order, exponentials are added as integers and keys compared exactly, so a
row has the same bits in any batch and any row tile.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.keys import best_keys, id_of, ordered, pack, value_of
from eesd_kernels.triton.launch import architecture, overlap, shared_memory
from eesd_kernels.triton.linear import product
from eesd_kernels.triton.rms_norm import norm_row, tile_of
from eesd_kernels.triton.sample_draft import draw, log2_up
from eesd_kernels.triton.splits import NO_ID, from_l2

ROW_TILES = (16, 32, 64)
MOST_GROUPS = 4096  # merged at once
LOWEST = tl.constexpr(-(2**31))
UNIT = tl.constexpr(float(1 << 24))  # at most 2^7 of them: a uint32 holds the sum of a group


class Config(NamedTuple):
    """How a weight is read. `group` decides bits, and may follow V, H and k alone."""

    block_v: int
    block_h: int
    warps: int
    stages: int
    group: int = 64  # ids that share a maximum, a sum and a list
    floor: bool = True
    refresh: bool = True
    pdl: bool = True
    head: bool = True  # the first launch overlaps what came before
    early: bool = True  # merge is set off at the start of scan, not behind its loop
    ahead: int = 256  # columns of the first tiles, fetched into the L2 while prepare runs
    merge_warps: int = 0  # 0: by the number of groups
    rounds: int = 4  # up to 2^this many candidates are merged one after the other


HALVES = Config(64, 128, 4, 6)
SINGLES = Config(32, 32, 4, 3, 32)  # no tensor cores: float32 products are exact ones


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def _sum_of_exponentials(x, axis: tl.constexpr):
    """The sum of up to 128 numbers in [0, 1], each rounded to a 2^-24th."""
    whole = tl.fma(tl.minimum(x, 1.0), UNIT, 0.5).to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.sum(whole, axis).to(tl.float32) * (1.0 / UNIT)


@triton.jit
def _both(x, y):
    """Two float32 in an int64."""
    low = y.to(tl.uint32, bitcast=True).to(tl.int64)
    return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def _any(x):
    """Of a tile that every warp holds: an axis at a time, without shared memory."""
    return tl.max(tl.max(x.to(tl.int32), 1), 0)


@triton.jit
def _prepare_kernel(
    x_ptr, norm_ptr, out_ptr, seats_ptr, stride, size, eps, K: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tl.store(seats_ptr + row * K + tl.arange(0, K), tl.full([K], LOWEST, tl.int32))
    if norm_ptr is not None:
        norm_row(x_ptr + row * stride, norm_ptr, out_ptr + row * size, size, eps, WHOLE, BLOCK)


@triton.jit
def _floor_of(seats_ptr, row, live, K: tl.constexpr):
    """The least seat of each row, as `ordered` has it."""
    ptrs = seats_ptr + row[:, None] * K + tl.arange(0, K)[None, :]
    return tl.min(tl.load(ptrs, mask=live[:, None], other=0, cache_modifier=".cg"), 1)


@triton.jit
def _fetch_ahead(w_ptrs, BYTES: tl.constexpr):
    """The first bytes of rows of the weight into the L2: a hint, nothing waits for it."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0", "=r,l,r",
        [w_ptrs.to(tl.int64), tl.full(w_ptrs.shape, BYTES, tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "ahead"])
def _scan_kernel(
    x_ptr, w_ptr, seats_ptr, stats_ptr, lists_ptr, R, V, H, groups, ahead, stride_x,
    stride_w, DOT: tl.constexpr, EVEN_V: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, FLOOR: tl.constexpr, REFRESH: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a tile of the weight and of the rows."""
    N: tl.constexpr = BLOCK_V // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    in_rows = row < R
    row = row.to(tl.int64)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = ids < V
    w_ptrs = w_ptr + ids.to(tl.int64)[:, None] * stride_w
    if PDL:
        if AHEAD:  # noqa: SIM102, one is known at compile time
            if tile < ahead:
                nearest = tl.minimum(ids, V - 1).to(tl.int64)
                _fetch_ahead(w_ptr + nearest * stride_w, AHEAD)
        tl.extra.cuda.gdc_wait()
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    acc = product(
        x_ptr + row[None, :] * stride_x, w_ptrs, in_rows, in_v, H, DOT, EVEN_V, EVEN_H, BLOCK_V,
        BLOCK_H, ROWS,
    )  # fmt: skip
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    floor = tl.full([ROWS], LOWEST, tl.int32)
    if FLOOR:
        floor = _floor_of(seats_ptr, row, in_rows, K)

    # x [N, GROUP, ROWS]; NaN: not a candidate, or no longer one
    x = tl.where(acc == acc, acc, float("inf"))
    if not EVEN_V:
        x = tl.where(in_v[:, None], x, float("nan"))
    x = x.reshape([N, GROUP, ROWS])
    top = tl.max(x, 1)
    group = tile * N + tl.arange(0, N)
    live = (group < groups)[:, None] & in_rows[None, :]
    if FLOOR:
        seat = (row * K)[None, :] + (group % K)[:, None]
        tl.atomic_max(seats_ptr + seat, ordered(top), mask=live, sem="relaxed")
    e = tl.exp(x - _finite_or_zero(top)[:, None, :])
    if not EVEN_V:
        e = tl.where(x == x, e, 0.0)
    cell = (row * groups)[None, :] + group[:, None]
    tl.store(stats_ptr + cell, _both(top, _sum_of_exponentials(e, 1)), mask=live)

    # Each list descends and ends with 0, but for those whose first is under the floor.
    ids = ids.reshape([N, GROUP, 1])
    list_ptrs = lists_ptr + (row * (K * groups))[None, :] + group[:, None]
    n = 0
    asked, going = live, live & (ordered(top) >= floor[None, :])
    while (n < K) & (_any(going) > 0):
        if FLOOR and REFRESH:  # noqa: SIM102
            if (n & (n + 1)) == 0:  # 0, 1, 3, ..: other programs have ended since
                floor = _floor_of(seats_ptr, row, in_rows, K)
        first = tl.min(tl.where(x == top[:, None, :], ids, NO_ID), 1)
        key = tl.where(going, pack(top, first), 0).to(tl.int64, bitcast=True)
        tl.store(list_ptrs + n * groups, key, mask=asked)
        x = tl.where(ids == first[:, None, :], float("nan"), x)
        top = tl.max(x, 1)
        asked = going
        going = going & (top == top) & (ordered(top) >= floor[None, :])
        n += 1
    if n < K:
        tl.store(list_ptrs + n * groups, tl.zeros([N, ROWS], tl.int64), mask=asked)


@triton.jit
def _listed(lists_ptr, group, depth, there, groups, K: tl.constexpr):
    """The keys at one depth of the chosen groups' lists `[K]`."""
    ptrs = lists_ptr + depth.to(tl.int64) * groups + group
    return tl.load(ptrs, mask=there & (depth < K), other=0).to(tl.uint64, bitcast=True)


@triton.jit
def _best_in_turn(x, ids, K: tl.constexpr):
    """Keys of the K greatest of x, int32 above LOWEST, one after the other."""
    at = tl.arange(0, K)
    chosen = tl.zeros([K], tl.uint64)
    for i in range(K):
        top = tl.max(x, 0)
        first = tl.min(tl.where(x == top, ids, NO_ID), 0)
        key = tl.where(top > LOWEST, (first ^ -1).to(tl.uint32, bitcast=True), 0).to(tl.uint64)
        chosen = tl.where(at == i, key, chosen)
        x = tl.where(ids == first, LOWEST, x)
    return chosen


@triton.jit(do_not_specialize=["k", "n"])
def _merge_kernel(
    stats_ptr, lists_ptr, values_ptr, ids_ptr, lse_ptr, groups, k, n, temperature_ptr, law_ptr,
    seed_ptr, position_ptr, base_ptr, parent_ptr, child_ptr, q_ptr, LOG_G: tl.constexpr,
    LOG_K: tl.constexpr, ROUNDS: tl.constexpr, DRAW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: its groups into its k best and logsumexp; then the draw, if any."""
    K: tl.constexpr = 1 << LOG_K
    row = tl.program_id(0).to(tl.int64)
    node = 0
    if DRAW:
        temperature, law = from_l2(temperature_ptr + row), from_l2(law_ptr + row)
        seed, position = from_l2(seed_ptr + row), from_l2(position_ptr + row)
        base = from_l2(base_ptr + row)
        if parent_ptr is not None:
            node = from_l2(parent_ptr + row)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best, total = float("-inf"), 0.0
    chosen = tl.zeros([K], tl.uint64)
    for start in range(0, groups, 1 << LOG_G):
        group = start + tl.arange(0, 1 << LOG_G)
        there = group < groups
        stats = tl.load(stats_ptr + row * groups + group, mask=there, other=0)
        tops = (stats >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tops = tl.where(there, tops, float("-inf"))
        sums = stats.to(tl.uint32).to(tl.float32, bitcast=True)
        if ROUNDS:
            chosen = _best_in_turn(tl.where(there, ordered(tops), LOWEST), group, K)
        else:
            some = best_keys(tl.where(there, pack(tops, group), 0), LOG_G, LOG_K)
            if start == 0:
                chosen = some
            else:
                chosen = best_keys(tl.join(chosen, some).reshape([2 * K]), LOG_K + 1, LOG_K)
        before, best = best, tl.maximum(best, tl.max(tops, 0))
        zero = _finite_or_zero(best)
        total = total * tl.exp(before - zero) + tl.sum(sums * tl.exp(tops - zero), 0)
    # Each list's first is its group's best, and so these are in order.
    there, group = chosen != 0, id_of(chosen)
    lists_ptr += row * (K * groups)
    depth = row.to(tl.int32) * 0
    top = _listed(lists_ptr, group, depth, there, groups, K)
    x0 = _listed(lists_ptr, group, depth + 1, there, groups, K)
    x1 = _listed(lists_ptr, group, depth + 2, there, groups, K)
    x2 = _listed(lists_ptr, group, depth + 3, there, groups, K)
    bar = tl.min(top, 0)
    while tl.max(x0, 0) > bar:
        # What stands below a key that is under the bar was perhaps never written.
        x1 = tl.where(x0 > bar, x1, 0)
        x2 = tl.where(x1 > bar, x2, 0)
        four = tl.join(tl.join(top, x0), tl.join(x1, x2)).reshape([4 * K])
        top = best_keys(four, LOG_K + 2, LOG_K)
        bar = tl.min(top, 0)
        depth += 3
        there = (x2 != 0) & (x2 >= bar)
        x0 = _listed(lists_ptr, group, depth + 1, there, groups, K)
        x1 = _listed(lists_ptr, group, depth + 2, there, groups, K)
        x2 = _listed(lists_ptr, group, depth + 3, there, groups, K)
    bad = tl.abs(best) == float("inf")
    at = tl.arange(0, K)
    values = tl.where(bad, float("nan"), value_of(top))
    ids = tl.where(bad, -1, tl.where(at < k, id_of(top), -1))
    tl.store(values_ptr + row * k + at, values, mask=at < k)
    tl.store(ids_ptr + row * k + at, ids, mask=at < k)
    lse = _finite_or_zero(best) + tl.log(total)
    tl.store(lse_ptr + row, tl.where(bad, float("nan"), lse))
    if DRAW:
        q, children = draw(values, ids, temperature, law, seed, position, base, node, LOG_K)
        tl.store(q_ptr + row * k + at, q, mask=at < k)
        tl.store(child_ptr + row * n + at, children, mask=at < n)


@lru_cache(maxsize=1024)
def config_of(vocab: int, size: int, log_k: int, halves: bool, row_tile: int) -> Config:
    """The configuration of a weight `[vocab, size]`, 2^log_k and a row tile."""
    return HALVES if halves else SINGLES


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    """How many; those of an H100 where nothing runs."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    out: tuple[Tensor, ...],
    draft: tuple[Tensor | None, ...] = (),
    n: int = 0,
    *,
    config: Config | None = None,
    row_tile: int | None = None,
) -> bool:
    """Fill `out`; False for arguments left to the reference.

    `draft` is temperature, law, seed, position, base, parent of a draw of n children, which also
    fills `out[3:]`. `config` and `row_tile` are for measuring; left out, the shapes decide.
    """
    rows, (vocab, size) = hidden.shape[0], lm_head.shape
    float64 = norm_weight is not None and norm_weight.dtype is torch.float64
    if hidden.dtype is torch.float64 or float64 or not size:
        return False
    if not rows:
        return True
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, lm_head))
    log_k, halves = log2_up(k), weight.element_size() == 2 == x.element_size()
    row_tile = row_tile or next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
    width, device = weight.element_size(), x.device
    aligned = (weight.data_ptr() | weight.stride(0) * width | size * width) % 16 == 0
    config = config or config_of(vocab, size, log_k, halves and aligned, row_tile)
    groups = triton.cdiv(vocab, config.group)
    # The interpreter's product of bfloat16 is wrong; on a GPU float32 is for float32 alone.
    single = not halves or device.type == "cpu"
    stage = config.block_h * (config.block_v * width + row_tile * x.element_size())
    pdl = overlap(x, config.pdl)

    block, warps = tile_of(size)
    normed = None if norm_weight is None else x.new_empty(rows, size)
    seats = torch.empty(rows, 1 << log_k, dtype=torch.int32, device=device)
    stats = torch.empty(rows, groups, dtype=torch.int64, device=device)
    lists = torch.empty(rows, 1 << log_k, groups, dtype=torch.int64, device=device)
    _prepare_kernel[(rows,)](
        x, None if norm_weight is None else norm_weight.contiguous(), normed, seats, x.stride(0),
        size, eps, K=1 << log_k, WHOLE=size <= block, BLOCK=block, num_warps=warps,
        **(pdl if config.head else {"PDL": pdl["PDL"]}),
    )  # fmt: skip
    x = x if normed is None else normed
    _scan_kernel[(triton.cdiv(rows, row_tile), triton.cdiv(vocab, config.block_v))](
        x, weight, seats, stats, lists, rows, vocab, size, groups,
        2 * _multiprocessors(device), x.stride(0), weight.stride(0),
        DOT=tl.float32 if single else tl.bfloat16 if x.dtype is torch.bfloat16 else tl.float16,
        EVEN_V=vocab % config.block_v == 0, EVEN_H=size % config.block_h == 0,
        BLOCK_V=config.block_v, BLOCK_H=config.block_h, ROWS=row_tile, GROUP=config.group,
        K=1 << log_k, FLOOR=config.floor, REFRESH=config.refresh,
        AHEAD=min(config.ahead, size) * width if aligned else 0, EARLY=config.early,
        num_warps=config.warps,
        # Else ptxas spills a word on sm_100 to fit a program more, for which no memory is left.
        maxnreg=255 if architecture(device) >= 100 and not single else None,
        num_stages=max(1, min(config.stages, (shared_memory(device) - 4096) // stage)), **pdl,
    )  # fmt: skip
    drawn = (*draft, *out[3:]) if draft else (None,) * 8
    log_g = max(log2_up(min(groups, MOST_GROUPS)), log_k)
    rounds = log_k <= config.rounds and groups <= MOST_GROUPS
    _merge_kernel[(rows,)](
        stats, lists, *out[:3], groups, k, n, *drawn,
        LOG_G=log_g, LOG_K=log_k, ROUNDS=rounds, DRAW=bool(draft),
        num_warps=config.merge_warps or max(1 if rounds else 4, min(8, (1 << log_g) // 512)),
        maxnreg=None if rounds or device.type == "cpu" else 255,  # else ptxas spills a word
        **pdl,
    )  # fmt: skip
    return True


def new_outputs(hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for values, ids and logsumexp."""
    rows, device = hidden.shape[0], hidden.device
    return (
        torch.empty(rows, k, dtype=torch.float32, device=device),
        torch.empty(rows, k, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def exit_topk(
    hidden: Tensor,
    lm_head: Tensor,
    k: int,
    norm_weight: Tensor | None,
    eps: float,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...] | None:
    out = out or new_outputs(hidden, k)
    return out if launch(hidden, lm_head, k, norm_weight, eps, out) else None
