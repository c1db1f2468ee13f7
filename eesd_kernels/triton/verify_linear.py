"""verify_linear from logits: statistics of the live rows, then one walk a sequence and one race.

Every level of a one-by-one draft is tested at once, and the walk is the first rejection among
them; only the block rule's a_i go level by level. The walk's few numbers are float64, made of
float32 sums. There are two launches, and the second starts while the first ends and waits for its
results only; where rows are few (`rows.FOLD_BELOW`), all have raced in the first. A dense q takes
more of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton import dense, rows
from eesd_kernels.triton.launch import overlap
from eesd_kernels.triton.levels import BLOCK_LAW, above_zero, at_level, stands
from eesd_kernels.triton.random import accept_uniform, words_of, words_of_ids
from eesd_kernels.triton.rows import (
    ARRIVED,
    DEPTH,
    ID,
    KEY,
    PLACE,
    ROW,
    SCALE,
    STOP,
    SUM,
    TAKE,
    TOP,
    race_row,
)
from eesd_kernels.triton.splits import (
    COUPLED,
    DETERMINISTIC,
    NO_ID,
    TARGET,
    exponent,
    from_l2,
    key_of,
    mass_of,
    merge,
    merge_races,
    pick,
    raw_split,
    some_from_l2,
    winner,
)
from eesd_kernels.triton.target_law import cutoffs

ACCEPT = tl.constexpr(3)  # the purpose of a test's noise


@triton.jit
def _walk_kernel(
    logits_ptr, stride_b, stride_r, draft_ids_ptr, length_ptr, q_ids_ptr, q_probs_ptr, law_ptr,
    temperature_ptr, cutoff_ptr, seed_ptr, position_ptr, base_ptr, partial_ptr, weights_ptr,
    left_ptr, stop_ptr, excluded_ptr, record_ptr, accepted_ptr, token_ids_ptr, status_ptr,
    drafts, vocab, splits, k, ROWS: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr,
    LOOP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Where races are not folded and q is not dense, every program of a sequence walks, and they
    race over the row where they stop. The last one writes the results."""
    SPARSE: tl.constexpr = q_ids_ptr is not None
    DENSE: tl.constexpr = q_ids_ptr is None and q_probs_ptr is not None
    RACES: tl.constexpr = not (FOLD or DENSE)
    b, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    level, col, split = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    # Loads in two waves: settings and drafts, then the logits that these point to.
    length = tl.minimum(tl.maximum(from_l2(length_ptr + b), 0), drafts)
    temperature, law = from_l2(temperature_ptr + b), from_l2(law_ptr + b)
    seed, position, base = from_l2(seed_ptr + b), from_l2(position_ptr + b), from_l2(base_ptr + b)
    t = some_from_l2(draft_ids_ptr + b * drafts + level, level < drafts, -1)
    if SPARSE:
        at = (b * drafts + level)[:, None] * k + col[None, :]
        listed = (level < drafts)[:, None] & (col < k)[None, :]
        ids = some_from_l2(q_ids_ptr + at, listed, -1)
        w = some_from_l2(q_probs_ptr + at, listed, 0.0)
    if cutoff_ptr is not None:
        cutoff = some_from_l2(cutoff_ptr + b * (drafts + 1) + level, level <= drafts, 0.0)
    drafted = level < length
    t = tl.where(drafted, t, -1)
    known = (t >= 0) & (t < vocab)
    row_ptr = logits_ptr + b * stride_b + level.to(tl.int64) * stride_r
    x_t = some_from_l2(row_ptr + tl.where(known, t, 0), known, float("-inf")).to(tl.float32)
    # The drafted one's weight, and its place among the law's ids: WIDTH where it cannot be drawn.
    child = tl.where(known, 0, WIDTH)
    if SPARSE:  # [ROWS, WIDTH]: the laws' ids, weights and target logits
        inside = drafted[:, None] & (ids >= 0) & (ids < vocab)
        at = row_ptr[:, None] + tl.where(inside, ids, 0)
        x = some_from_l2(at, inside, float("-inf")).to(tl.float32)
        ids, w = tl.where(inside, ids, -1), tl.where(inside, w, 0.0)
        child = tl.min(tl.where(inside & (ids == t[:, None]), col[None, :], WIDTH), 1)
        w_t = tl.sum(tl.where(col[None, :] == child[:, None], w, 0.0), 1).to(tl.float64)
        w_all = tl.sum(w.to(tl.float64), 1)
        unit = 1.0 / w_all
    if cutoff_ptr is not None:
        x_t = tl.where(x_t < cutoff, float("-inf"), x_t)
        if SPARSE:
            x = tl.where(x < cutoff[:, None], float("-inf"), x)
    # By matching: the token of a row is known, and a draft token stands iff it is that token.
    c, greedy = exponent(temperature), (temperature > 0) == 0
    matching = greedy | (law == COUPLED)
    fixed = (law == DETERMINISTIC) | (q_probs_ptr is None)
    block = (law == BLOCK_LAW) & (matching == 0) & (fixed == 0)
    place = position + level + tl.where(block, 0, 1)
    word, _, _, _ = words_of(tl.zeros_like(level), place, base, ACCEPT, seed)
    u = accept_uniform(word).to(tl.float64)
    if DENSE:
        at = (b * drafts + level)[:, None] * splits + split[None, :]
        listed = drafted[:, None] & (split < splits)[None, :]
        w_all = tl.sum(some_from_l2(weights_ptr + at, listed, 0.0).to(tl.float64), 1)
        q_row = q_probs_ptr + (b * drafts + level) * vocab
        w_t = some_from_l2(q_row + tl.where(known, t, 0), known, 0.0).to(tl.float64)

    if PDL:
        tl.extra.cuda.gdc_wait()
        if not RACES:  # programs that wait would take the place of those that race
            tl.extra.cuda.gdc_launch_dependents()
    at = partial_ptr + (b * (drafts + 1) + level)[:, None] * 4 * splits + split[None, :]
    live = (level <= length)[:, None] & (split < splits)[None, :]
    tops = tl.load(at + TOP * splits, mask=live, other=float("-inf"))
    sums = tl.load(at + SUM * splits, mask=live, other=0.0)
    keys = tl.load(at + KEY * splits, mask=live, other=float("inf"))
    who = tl.load(at + ID * splits, mask=live, other=0.0).to(tl.int32, bitcast=True)
    top, normaliser = merge(tops, sums, c, 1)
    bad = (normaliser > 0) == 0
    norm, p_t = normaliser.to(tl.float64), mass_of(x_t, top, c)
    key = tl.full((ROWS,), float("inf"), tl.float32)
    if greedy or not (FOLD or law == COUPLED):
        token = tl.min(tl.where(tops == top[:, None], who, NO_ID), 1)
    else:
        key, token = merge_races(keys, tops, who, top, c, 1)

    # One by one: every level tested, the first that falls is m.
    passes = tl.where(matching, token == t, known & (u * norm < p_t))
    if SPARSE or DENSE:
        drawn = (child < WIDTH) & (w_all != 0)
        tested = drawn & (u * w_t * norm < p_t * w_all)
        passes = tl.where(matching | fixed, passes, tested)
    m = tl.min(tl.where(drafted & passes & (bad == 0), ROWS, level), 0)
    failed = tl.max((bad & (level == m)).to(tl.int32), 0) > 0
    takes = tl.full((), 1, tl.int1)  # the rejected token takes its law out of p
    scale = tl.full((), 1.0, tl.float64)
    if SPARSE or DENSE:
        takes = fixed | (tl.max((drawn & (level == m)).to(tl.int32), 0) > 0)
        if block:
            a = stands(p_t * w_all / (w_t * norm), level, length)
            ends = (child == WIDTH) | (w_t == 0) | (a == 0)
            last = tl.min(tl.where(drafted & (ends == 0), ROWS, level), 0)
            if SPARSE:
                p = mass_of(x, top[:, None], c)
                outside = above_zero(norm - tl.sum(p, 1))
                r = above_zero(a[:, None] * p - w * (unit * norm)[:, None])
                left = tl.sum(tl.where(inside, r, 0.0), 1) + a * outside
            else:
                parts = left_ptr + (b * drafts + level)[:, None] * splits + split[None, :]
                left = tl.sum(tl.load(parts, mask=listed, other=0.0).to(tl.float64), 1)
            tested = tl.where(level == last, u < a, u * (left + norm * (1.0 - a)) < left)
            m = tl.max(tl.where(tested & (level <= last), level, 0), 0)
            failed = tl.max((bad & ((level < last) | (level == m))).to(tl.int32), 0) > 0
            takes, scale = m < last, at_level(a, level, m)

    # Row m's ids that the walk weighs itself: of p, r is left on them, and scale outside.
    here, weighed = level == m, (m < length) & (matching == 0)
    ids_m = tl.where(col == 0, tl.max(tl.where(here & known & weighed, t, -1), 0), -1)
    if SPARSE:  # noqa: SIM102, known when it is compiled, and fixed is not
        if fixed == 0:
            ids_m = tl.max(tl.where(here[:, None] & weighed, ids, -1), 0)
    top_m, norm_m = at_level(top, level, m), at_level(norm, level, m)
    racing = (matching | failed) == 0
    if RACES:  # on its way meanwhile
        row_m = logits_ptr + b * stride_b + m.to(tl.int64) * stride_r
        raw = raw_split(row_m, program * BLOCK, tl.where(racing, vocab, 0), BLOCK)
        tops_ptr = partial_ptr + ((b * (drafts + 1) + m) * 4 + TOP) * splits
        top_raw = tl.load(tops_ptr + program)
    last = program == tl.num_programs(1) - 1
    inside_key, inside_id = tl.full([], float("inf"), tl.float32), tl.full([], NO_ID, tl.int32)
    rest_id, scale_m = inside_id, scale
    if not DENSE:  # noqa: SIM102
        if last:
            p_m = mass_of(tl.where(col == 0, at_level(x_t, level, m), float("-inf")), top_m, c)
            r = tl.zeros((WIDTH,), tl.float64)
            if SPARSE:  # noqa: SIM102
                if fixed == 0:
                    p_m = mass_of(tl.sum(tl.where(here[:, None], x, 0.0), 0), top_m, c)
                    w_m = tl.sum(tl.where(here[:, None], w, 0.0), 0)
                    r = scale * p_m - w_m * (at_level(unit, level, m) * norm_m)
                    child_m = tl.sum(tl.where(here, child, 0), 0)
                    r = tl.where((col == child_m) & (block == 0), 0.0, above_zero(r))
                    left_m = tl.sum(tl.where(ids_m >= 0, r, 0.0), 0)
                    takes = takes & (left_m == left_m)  # NaN: a law without sense takes nothing
                    r, scale_m = tl.where(takes, r, p_m), tl.where(takes, scale, 1.0)
            some_m = tl.where(ids_m >= 0, ids_m, 0)
            noise = words_of_ids(some_m, position + m + 1, base, TARGET, seed)
            listed_m = tl.where(ids_m >= 0, ids_m, NO_ID)
            inside_key, inside_id = winner(key_of(noise, tl.where(ids_m >= 0, r, 0.0)), listed_m, 0)
            rest_id = inside_id
            if inside_key == float("inf"):
                _key, rest_id = winner(key_of(noise, tl.where(ids_m >= 0, p_m, 0.0)), listed_m, 0)

    next_token = tl.sum(tl.where(here, token, 0), 0)
    if DENSE:
        take = tl.full((), 0.0, tl.float64)
        if fixed == 0:
            sum_m = at_level(w_all, level, m)
            takes = takes & (sum_m - sum_m == 0)
            take, scale_m = tl.where(takes, norm_m / sum_m, 0.0), tl.where(takes, scale, 1.0)
            ids_m = tl.where(takes & (block == 0), ids_m, -1)
        next_token = tl.where(matching, next_token, -1)  # a launch of its own races for it
        stop = stop_ptr + b * STOP
        tl.store(stop + ROW, tl.where(racing, m, -1))
        tl.store(stop + PLACE, m)
        tl.store(stop + DEPTH, m)
        tl.store(stop + SCALE, scale_m.to(tl.float32).to(tl.int32, bitcast=True))
        tl.store(stop + TAKE, take.to(tl.float32).to(tl.int32, bitcast=True))
        tl.store(stop + ARRIVED, 0)
        tl.store(excluded_ptr + b * k + col, ids_m, mask=col < k)
    else:
        least, outside_id = at_level(key, level, m), next_token
        if RACES:  # noqa: SIM102
            if racing:
                if cutoff_ptr is not None:
                    cutoff_ptr += b * (drafts + 1) + m
                least, outside_id = race_row(
                    raw, top_raw, row_m, cutoff_ptr, tops_ptr, top_m, ids_m, position + m + 1,
                    base, seed, c, record_ptr + b * splits, vocab, splits, program,
                    tl.num_programs(1), LOOP, BLOCK, SPLITS,
                )  # fmt: skip
        if matching == 0:
            weight = scale_m.to(tl.float32)
            next_token = pick(least, outside_id, weight, inside_key, inside_id, rest_id)
    if last:
        tokens = tl.where(level < m, t, tl.where(here, next_token, -1))
        tokens = tl.where(failed, -1, tokens)
        tl.store(token_ids_ptr + b * (drafts + 1) + level, tokens, mask=level <= drafts)
        tl.store(accepted_ptr + b, tl.where(failed, 0, m))
        tl.store(status_ptr + b, failed.to(tl.int32))


def verify_linear(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_length: Tensor,
    q_ids: Tensor | None,
    q_probs: Tensor | None,
    law: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...] | None:
    if target_logits.dtype is torch.float64 or (q_ids is not None and q_ids.shape[2] == 0):
        return None
    logits = target_logits if target_logits.stride(2) == 1 else target_logits.contiguous()
    draft_ids, length, law = (x.contiguous() for x in (draft_ids, draft_length, law))
    temperature, seed, position, base = (
        x.contiguous() for x in (temperature, seed, position, base)
    )
    batch, width, vocab = logits.shape
    accepted, token_ids, status = out or (
        length.new_empty(batch), length.new_empty(batch, width), length.new_empty(batch),
    )  # fmt: skip
    if batch == 0:
        return accepted, token_ids, status
    q_ids = None if q_ids is None else q_ids.contiguous()
    q_probs = None if q_probs is None else q_probs.contiguous()
    dense_q = q_probs if q_ids is None else None
    k = 1 if q_ids is None else max(1, q_ids.shape[2])
    cutoff = None
    if not (top_k is None and top_p is None and min_p is None):
        cutoff = cutoffs(logits, length, temperature, top_k, top_p, min_p, bonus=1)

    fold = dense_q is None and rows.folds(logits)
    partial = rows.new_partial(logits)
    splits = partial.shape[3]
    weights = left = stop = excluded = records = None
    if dense_q is not None:
        weights = dense.weights(dense_q, length, splits)
        stop, excluded = length.new_empty(batch, STOP.value), length.new_empty(batch, k)
    elif not fold:
        records = rows.new_records(partial)
    rows.statistics(
        logits, length, law, temperature, seed, position, base, partial, bonus=1, cutoff=cutoff,
        fold=fold, child_ids=draft_ids, q_ids=q_ids, records=records,
    )  # fmt: skip
    if dense_q is not None and weights is not None:
        left = dense.masses(
            logits, dense_q, draft_ids, length, law, temperature, cutoff, partial, weights
        )
    levels, across = triton.next_power_of_2(width), triton.next_power_of_2(splits)
    listed = triton.next_power_of_2(k)
    tile = levels * max(across, listed)
    warps = 1 if tile <= 512 else 4 if tile <= 1024 else 8
    programs, how = 1, {"LOOP": False, "BLOCK": 1, "SPLITS": across, "num_warps": warps}
    if records is not None:
        programs, how = rows.racing(logits, warps)
    _walk_kernel[(batch, programs)](
        logits, logits.stride(0), logits.stride(1), draft_ids, length, q_ids, q_probs, law,
        temperature, cutoff, seed, position, base, partial, weights, left, stop, excluded, records,
        accepted, token_ids, status, width - 1, vocab, splits, k, ROWS=levels, WIDTH=listed,
        FOLD=fold, **how, **overlap(logits, dense_q is None),
    )  # fmt: skip
    if dense_q is not None and stop is not None and excluded is not None:
        dense.race(
            logits, dense_q, temperature, cutoff, seed, position, base, partial, stop, excluded,
            token_ids,
        )  # fmt: skip
    return accepted, token_ids, status
