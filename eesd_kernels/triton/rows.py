"""Rows of logits `[B, R, V]`, split over the vocabulary: what both verifiers do with them.

`statistics` over every live row, the verifier's own walk, and a race over the row where the walk
stopped: by programs that have all walked, or by `race` behind a walk that takes longer.

A *split* is `BLOCK` consecutive ids of one row, in the registers of one program and read once; they
begin at multiples of BLOCK and are merged in ascending order, so a row has the same bits in any
batch. Where rows are few, `statistics` races in every row at once and the walk finishes alone
(`FOLD`): the keys are the same bits, so the ids are too.

Planes of `partial`, float32 `[B, R, 4, S]`, S splits a row (`TOP`, `SUM`, `KEY`, `ID`):
- top: the largest kept logit, -inf where the split has none.
- sum: of `exp((x - top) / T)` over kept ids; NaN where the split holds NaN or +inf.
- key: the smallest `E_x exp((top - x) / T)`; +inf: no race, or nobody in it. Smallest over all
  splits after `* exp((top of the row - top) / T)` is `argmin E_x / p(x)`.
- id (int32 bits): of that key. In rows of temperature 0: the lowest id of the split's top.

A *stop*, int32 `[B, STOP]`, is what a walk tells the `race` of a sequence (fields below). Keys are
in units of the row's `E / exp((x - top) / T)`, so an id of probability r has the key
`E / (r * normaliser)` with the normaliser that `merge` gives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.launch import architecture, overlap
from eesd_kernels.triton.splits import (
    COUPLED,
    DETERMINISTIC,
    EACH,
    children_of,
    depth_of,
    exponent,
    finite_or_zero,
    first_of,
    ids_of,
    lifted,
    lowered,
    pick,
    race_split,
    raw_split,
    sum_of,
    without,
)

SPLIT = 2048  # ids of a split, or more:
MOST_SPLITS = 64  # the walk has those of a row in registers
FOLD_BELOW = 1 << 21  # logits: with 1.5 M a race in all rows costs no more, with 2.3 M it does
PROGRAMS = 768  # of `statistics`: of more splits, each takes several, unless it races in all rows
RACING = 528  # that race, likewise: so many have their place at once
REGISTERS = 1 << 16  # of a program, at most

TOP, SUM, KEY, ID = (tl.constexpr(i) for i in range(4))

STOP = tl.constexpr(8)
ROW = tl.constexpr(0)  # the row to race over; -1: none, the walk has written the token
PLACE = tl.constexpr(1)  # where its token goes in token_ids
DEPTH = tl.constexpr(2)  # noise stands at position + depth + 1, round base `base` (or 0: coupled)
SCALE = tl.constexpr(3)  # float32: the weight of p outside the excluded ids, 1 but for block rows
INSIDE_KEY = tl.constexpr(4)  # float32: the best key among the excluded ids by what is left of p
TAKE = INSIDE_KEY  # float32, for dense laws, which exclude: what of q is taken out of p
INSIDE_ID = tl.constexpr(5)  # its id
REST_ID = tl.constexpr(6)  # the winner where nothing is left anywhere: by p, among the excluded ids
ARRIVED = tl.constexpr(7)  # of dense laws: splits that have raced, 0 when the walk ends
EMPTY = tl.constexpr(-1)  # a record of a race that is not written yet; others are not below 0


@triton.jit
def _statistics_kernel(
    logits_ptr, stride_b, stride_r, live_ptr, law_ptr, temperature_ptr, cutoff_ptr, seed_ptr,
    position_ptr, base_ptr, child_ptr, parent_ptr, q_ids_ptr, partial_ptr, record_ptr, rows, vocab,
    splits, children, q_rows, k, BONUS: tl.constexpr, FOLD: tl.constexpr, LOOP: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every `num_programs(2)`-th split of a row, from the program's own on; one if not LOOP."""
    b, row, program = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_ptr = logits_ptr + b * stride_b + row.to(tl.int64) * stride_r
    live, law = tl.load(live_ptr + b), tl.load(law_ptr + b)
    temperature, seed = tl.load(temperature_ptr + b), tl.load(seed_ptr + b)
    position, base = tl.load(position_ptr + b), tl.load(base_ptr + b)
    raw = raw_split(row_ptr, program * BLOCK, vocab, BLOCK)
    if record_ptr is not None:
        every = tl.arange(0, SPLITS)
        emptied = (every < splits) & (row + program == 0)
        tl.store(record_ptr + b * splits + every, tl.full([SPLITS], EMPTY, tl.int64), mask=emptied)
    depth = row
    if FOLD:  # what the race reads of a row waits for nothing
        if parent_ptr is None:
            child = tl.load(child_ptr + b * children + row, mask=row < children, other=-1)
        if q_ids_ptr is not None:
            some, list_ptr = tl.arange(0, WIDTH), q_ids_ptr + (b * q_rows + row) * k
            listed = tl.load(list_ptr + some, mask=(some < k) & (row < q_rows), other=-1)
        if parent_ptr is not None:
            depth = depth_of(parent_ptr + b * rows, row)
    if row < tl.maximum(live, 0) + BONUS:
        c, sampled = exponent(temperature), temperature > 0
        racing, place = sampled & (FOLD | (law == COUPLED)), position + 1
        if racing:
            if parent_ptr is not None and not FOLD:
                depth = depth_of(parent_ptr + b * rows, row)
            place, base = place + depth, tl.where(law == COUPLED, 0, base)
        step = tl.num_programs(2) if LOOP else 1
        for split in range(program, splits if LOOP else program + 1, step):
            first = split * BLOCK
            if LOOP:  # on its way meanwhile
                later = raw_split(row_ptr, first + step * BLOCK, vocab, BLOCK)
            x = raw.to(tl.float32)
            if cutoff_ptr is not None:  # NaN stays
                x = tl.where(x < tl.load(cutoff_ptr + b * rows + row), float("-inf"), x)
            if racing:
                top, d = lowered(x, c)
                total = sum_of(tl.exp2(d))
                if FOLD:  # noqa: SIM102, but for the ids that the walk weighs itself
                    if law != COUPLED and row < live:
                        if law == DETERMINISTIC or q_ids_ptr is None:
                            if parent_ptr is None:
                                d = tl.where(ids_of(first, BLOCK) == child, float("-inf"), d)
                            else:
                                theirs = children_of(
                                    row, child_ptr + b * rows, parent_ptr + b * rows, live, CHILDREN
                                )
                                d = without(d, first, theirs, BLOCK)
                        elif q_ids_ptr is not None:
                            d = without(d, first, listed, BLOCK)
                key, who = race_split(d, first, place, base, seed, BLOCK)
            else:
                top, d = lowered(x, c)
                total = sum_of(tl.exp2(d))
                key, who = float("inf"), tl.full([], 0, tl.int32) + first
                if not sampled:
                    who = first_of(x == top, first, BLOCK)
            at = partial_ptr + (b * rows + row) * 4 * splits + split
            tl.store(at + TOP * splits, top)
            tl.store(at + SUM * splits, total)
            tl.store(at + KEY * splits, key)
            tl.store(at + ID * splits, who.to(tl.float32, bitcast=True))
            if LOOP:
                raw = later


@triton.jit
def _written(record_ptrs, others, best):
    """The others' records as they are now, EMPTY or not; best in the other lanes."""
    return tl.load(record_ptrs, mask=others, other=best, volatile=True)


@triton.jit
def race_row(
    raw, top, row_ptr, cutoff_ptr, tops_ptr, row_top, listed, position, base, seed, c, record_ptr,
    vocab, splits, program, programs, LOOP: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Race over every `programs`-th split of a row, from the `program`-th on; one if not LOOP.

    The best of each program is a record, EMPTY before: key and id in one word, which is written
    whole. The last program waits for those of the others. It keeps none of them from its place on
    the GPU: programs begin in the order of their numbers (on which CUB's scan relies as well).

    raw, top: of the program's first split. cutoff_ptr, tops_ptr: of the row. row_top: its top.
    listed: ids that do not race. record_ptr: `[S]` int64.

    Returns, in the last program, the row's best key and its id.
    """
    best = tl.full([], 2**63 - 1, tl.int64)
    for split in range(program, splits if LOOP else program + 1, programs):
        first, after = split * BLOCK, split + programs
        if LOOP:  # on their way meanwhile
            later = raw_split(row_ptr, after * BLOCK, vocab, BLOCK)
            later_top = tl.load(tops_ptr + after, mask=after < splits, other=0.0)
        x = raw.to(tl.float32)
        if cutoff_ptr is not None:
            x = tl.where(x < tl.load(cutoff_ptr), float("-inf"), x)
        below = (x - finite_or_zero(top)) * c
        below = without(below, first, listed, BLOCK)
        key, who = race_split(below, first, position, base, seed, BLOCK)
        bits = lifted(key, top, row_top, c).to(tl.int32, bitcast=True)
        best = tl.minimum(best, (bits.to(tl.int64) << 32) | who)
        if LOOP:
            raw, top = later, later_top
    if program < programs - 1:
        tl.store(record_ptr + program, best)
    else:
        # A record a lane: lanes that shared one could see it come at different times, and part.
        every = tl.arange(0, SPLITS if SPLITS > 32 else 32)
        others = every < programs - 1
        records = _written(record_ptr + every, others, best)
        while tl.min(records, 0) == EMPTY:
            records = _written(record_ptr + every, others, best)
        best = tl.minimum(best, tl.min(records, 0))
    return (best >> 32).to(tl.int32).to(tl.float32, bitcast=True), best.to(tl.int32)


@triton.jit
def _race_kernel(
    logits_ptr, stride_b, stride_r, temperature_ptr, cutoff_ptr, seed_ptr, position_ptr, base_ptr,
    partial_ptr, stop_ptr, excluded_ptr, record_ptr, token_ids_ptr, rows, width, vocab, splits,
    count, LOOP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    b, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    programs, stop = tl.num_programs(1), stop_ptr + b * STOP
    if PDL:  # and no release: programs that wait would take the place of those that race
        tl.extra.cuda.gdc_wait()
    row = tl.load(stop + ROW)
    seed, base = tl.load(seed_ptr + b), tl.load(base_ptr + b)
    position, c = tl.load(position_ptr + b), exponent(tl.load(temperature_ptr + b))
    if row >= 0:
        row_ptr = logits_ptr + b * stride_b + row.to(tl.int64) * stride_r
        some, every = tl.arange(0, COUNT), tl.arange(0, SPLITS)
        tops_ptr = partial_ptr + ((b * rows + row) * 4 + TOP) * splits
        raw, top = raw_split(row_ptr, program * BLOCK, vocab, BLOCK), tl.load(tops_ptr + program)
        tops = tl.load(tops_ptr + every, mask=every < splits, other=float("-inf"))
        listed = tl.load(excluded_ptr + b * count + some, mask=some < count, other=-1)
        position += tl.load(stop + DEPTH) + 1
        if cutoff_ptr is not None:
            cutoff_ptr += b * rows + row
        least, token = race_row(
            raw, top, row_ptr, cutoff_ptr, tops_ptr, tl.max(tops, 0), listed, position, base, seed,
            c, record_ptr + b * splits, vocab, splits, program, programs, LOOP, BLOCK, SPLITS,
        )  # fmt: skip
        if program == programs - 1:
            token = pick(
                least, token, tl.load(stop + SCALE).to(tl.float32, bitcast=True),
                tl.load(stop + INSIDE_KEY).to(tl.float32, bitcast=True),
                tl.load(stop + INSIDE_ID), tl.load(stop + REST_ID),
            )  # fmt: skip
            tl.store(token_ids_ptr + b * width + tl.load(stop + PLACE), token)


def split_of(vocab: int) -> tuple[int, int]:
    """ids of a split, warps of its program: a function of V alone."""
    split = max(SPLIT, triton.next_power_of_2(triton.cdiv(vocab, MOST_SPLITS)))
    return split, max(1, split // EACH.value // 32)


def splits_of(vocab: int) -> int:
    """Splits of a row."""
    return triton.cdiv(vocab, split_of(vocab)[0])


def folds(logits: Tensor) -> bool:
    """Whether racing in every row costs less than a launch for the row where the walk stops."""
    return logits.numel() < FOLD_BELOW


def rows_apart(logits: Tensor) -> bool:
    """Whether rows begin anywhere, so that each logit is loaded by itself, from more addresses."""
    return (logits.stride(0) | logits.stride(1)) % 16 != 0


def all_registers(warps: int) -> int:
    """Of a thread, the most that it can have and a program of so many warps still start."""
    return min(255, REGISTERS // (32 * warps))


def new_partial(logits: Tensor) -> Tensor:
    """Room for what `statistics` writes."""
    batch, rows, vocab = logits.shape
    return torch.empty(batch, rows, 4, splits_of(vocab), dtype=torch.float32, device=logits.device)


def statistics(
    logits: Tensor,
    live: Tensor,
    law: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    partial: Tensor,
    *,
    bonus: int,
    cutoff: Tensor | None = None,
    parent: Tensor | None = None,
    fold: bool = False,
    child_ids: Tensor | None = None,
    q_ids: Tensor | None = None,
    records: Tensor | None = None,
) -> None:
    """Fill the planes of every row r < live + bonus; other rows stay as they were.

    Args:
        logits: `[B, R, V]`, its last dimension contiguous; all else contiguous.
        live: `[B]` int32, draft lengths (bonus 1) or numbers of nodes (bonus 0).
        cutoff: `[B, R]` float32, the smallest kept logit of each row.
        parent: `[B, R]` int32 of a tree; None: row r has depth r.
        fold: race in all rows of temperature above 0, not in the coupled ones alone, over the ids
            that the walk does not weigh itself: in rows r < live without `q_ids [B, Q, k]` of the
            row, where the law is deterministic or q_ids None without the row's children, which are
            `child_ids [B, Q]` (linear: that of row r at r; tree: of node i at i).
        records: `[B, S]` int64, emptied for a race behind.
    """
    batch, rows, vocab = logits.shape
    (block, warps), splits = split_of(vocab), partial.shape[3]
    children = child_ids.shape[1] if child_ids is not None else 1
    q_rows, k = q_ids.shape[1:] if q_ids is not None else (0, 1)
    programs = splits if fold else max(1, min(splits, PROGRAMS // (batch * rows)))
    programs = triton.cdiv(splits, triton.cdiv(splits, programs))  # of as many splits each
    loop, arch = programs < splits, architecture(logits.device)
    spills = logits.dtype is torch.float32 or arch >= 100 or (loop and rows_apart(logits))
    _statistics_kernel[(batch, rows, programs)](
        logits, logits.stride(0), logits.stride(1), live, law, temperature, cutoff, seed, position,
        base, child_ids, parent, q_ids, partial, records, rows, vocab, splits, children, q_rows, k,
        BONUS=bonus, FOLD=fold, LOOP=loop, BLOCK=block,
        SPLITS=triton.next_power_of_2(splits), CHILDREN=triton.next_power_of_2(children),
        WIDTH=triton.next_power_of_2(k), num_warps=warps,
        # All: else ptxas spills a word to fit a program more. 64: a tree's would have 95, and fewer
        # programs would run at once.
        maxnreg=all_registers(warps) if spills else 64 if loop and arch >= 90 else None,
        **overlap(logits),
    )  # fmt: skip


def racing(logits: Tensor, warps: int = 1) -> tuple[int, dict[str, int | bool]]:
    """Programs of a sequence that race over a row, and how they are launched.

    Args:
        warps: that a program needs for what else it does.
    """
    batch, _, vocab = logits.shape
    (block, enough), splits = split_of(vocab), splits_of(vocab)
    programs = max(1, min(splits, RACING // batch))
    programs = triton.cdiv(splits, triton.cdiv(splits, programs))  # of as many splits each
    return programs, {
        "LOOP": programs < splits, "BLOCK": block, "SPLITS": triton.next_power_of_2(splits),
        "num_warps": max(warps, enough),
        "maxnreg": all_registers(max(warps, enough)) if rows_apart(logits) else 128,
    }  # fmt: skip


def new_records(partial: Tensor) -> Tensor:
    """Room for what the programs that race over a row of each sequence tell one another."""
    return partial.new_empty(partial.shape[0], partial.shape[3], dtype=torch.int64)


def race(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    partial: Tensor,
    stop: Tensor,
    excluded: Tensor,
    records: Tensor,
    token_ids: Tensor,
    *,
    cutoff: Tensor | None = None,
) -> None:
    """Race over the row of each stop, outside its excluded ids, and write the token.

    Launched right behind the walk, which must not let it start before its own wait for
    `statistics` is over: `gdc_launch_dependents` after `gdc_wait`, or not at all.

    Args:
        stop: int32 `[B, STOP]`. excluded: int32 `[B, E]`, -1: none; both by the walk.
        records: as `statistics` emptied them. token_ids: int32 `[B, W]`, contiguous.
    """
    batch, rows, vocab = logits.shape
    splits, count, (programs, how) = partial.shape[3], excluded.shape[1], racing(logits)
    _race_kernel[(batch, programs)](
        logits, logits.stride(0), logits.stride(1), temperature, cutoff, seed, position, base,
        partial, stop, excluded, records, token_ids, rows, token_ids.shape[1], vocab, splits, count,
        COUNT=triton.next_power_of_2(count), **how, **overlap(logits),
    )  # fmt: skip
