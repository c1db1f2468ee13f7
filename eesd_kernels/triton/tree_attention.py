"""Attention of a block of rows over the cache, split over the context at absolute chunks of keys.

A program takes a head of the cache, a tile of rows (the T rows and the heads of a group, side by
side) and a chunk. Rows are the left operand of both products, at most 32 of them: tensor cores then
work from registers (mma.sync) and the loop is one of loads, which bound it. Each row's maximum, sum
and accumulator go to scratch, where a second kernel adds a row's chunks up. The scratch,
`4 (D + 2) B Hq T` bytes for each chunk of the capacity, and nothing else is allocated, by torch's
allocator, which under graph capture means once. K and V must have q's dtype. Short contexts have
few chunks and want short ones; long ones would pay for them in the scratch. So chunks are half as
long before an absolute position (`fine`).

A row has the same bits alone (T = 1), in a block of any size, and as a tree node whose ancestors
are those tokens, because

- chunks, and tiles of keys within them, begin at absolute positions and are taken in ascending
  order, whoever takes them; a key's position in a tree is `length` plus its depth. From the chunk
  of position `length` on a tree's nodes therefore have programs of their own, few nodes each: the
  tiles before `length` are taken once for all, then each node's in turn, with its ancestors as if
  they stood in slots length, length + 1, ...: for it they do what T = 1 would do there;
- what a row does not see adds exact zeros: its weight is 0, and values are finite, since those that
  are not are read as 0 and make NaN of the scores of the rows that see them. A tile of which a row
  sees nothing keeps its maximum, multiplies by exp2(0) = 1 and adds zeros;
- rows of a product do not see each other, and it sums over its inner side in ascending order; the
  sum of weights is such a product, with ones. So the width of the row tile does not show, nor a
  row's place in it, nor how warps share a tile;
- the compiler may not fuse a product with a sum (it might in one variant and not in another), and
  the second kernel has one variant for all sizes that vary from call to call.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eesd_kernels.triton.launch import architecture, overlap

NODES = tl.constexpr(64)  # of a tree at most: bits of an ancestry mask
OWN = tl.constexpr(8)  # nodes of a program of the last chunks: their tiles come one after another
FEWEST_SLOTS = 8  # programs over the context of a row tile, in large batches too: lengths differ
COMBINED = 4096  # numbers in flight in a program of the second kernel
LARGEST_HEAD = 256
UNBOUNDED = 2**31 - 1  # a window that hides nothing


class Tiles(NamedTuple):
    """How one head shape is tiled. Bits depend on `chunk`, `fine` and `keys` alone."""

    chunk: int  # keys
    keys: int  # of a tile
    rows: int  # widest tile of rows
    warps: int
    stages: int
    programs: int  # at most, but for `FEWEST_SLOTS`; chunks beyond are looped over
    registers: int = 255  # of a thread; left alone ptxas spills some to fit more programs
    fine: int = 0  # of chunks: those before this position are half as long, whole tiles still


@triton.jit
def _extent(lengths_ptr, num_rows_ptr, b, T, capacity):
    """Cached tokens and live rows of a sequence, within the cache whatever was given."""
    live = tl.maximum(tl.minimum(tl.load(num_rows_ptr + b), tl.minimum(T, capacity)), 0)
    return tl.maximum(tl.minimum(tl.load(lengths_ptr + b), capacity - live), 0), live


@triton.jit
def _chunk_of(key, CHUNK: tl.constexpr, FINE: tl.constexpr):
    return tl.where(key < FINE, key // (CHUNK // 2), key // CHUNK + FINE // CHUNK)


@triton.jit
def _begin_of(chunk, CHUNK: tl.constexpr, FINE: tl.constexpr):
    return tl.where(chunk < 2 * (FINE // CHUNK), chunk * (CHUNK // 2), chunk * CHUNK - FINE)


@triton.jit
def _start_of(tile, first, slots, CHUNK: tl.constexpr, KEYS: tl.constexpr):
    """Where a program's tile begins: CHUNK keys from first on, the next `slots` CHUNKs further."""
    EACH: tl.constexpr = CHUNK // KEYS
    return first + (tile // EACH * slots * EACH + tile % EACH) * KEYS


@triton.jit
def _ancestors(ancestry_ptr, node, inside):
    """For node `[N, 1]` or a scalar: 1 where j is the node or an ancestor of it, `[N, NODES]`."""
    return _members(tl.load(ancestry_ptr + node, mask=inside, other=0), node)


@triton.jit
def _members(bits, node):
    """The same of the node's mask."""
    j = tl.arange(0, NODES)[None, :]
    return tl.where(j <= node, (bits >> j) & 1, 0).to(tl.int32)


@triton.jit
def _load_tile(
    cache_ptr, stride, page, offset, inside, STRIDES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """K or V `[KEYS, BLOCK_D]`, zeros outside. stride is of pages, STRIDES of slots, heads, D."""
    d = tl.arange(0, BLOCK_D)
    at = page * stride + offset.to(tl.int64) * STRIDES[0]
    if D < BLOCK_D:
        inside = inside[:, None] & (d < D)[None, :]
    else:
        inside = inside[:, None]
    at = at[:, None] + (d * STRIDES[2])[None, :]
    return tl.load(cache_ptr + at, mask=inside, other=0.0).to(DOT)


@triton.jit
def _add_tile(q, k, v, seen, top, total, acc, scale):
    """One step of the softmax: q `[ROWS, BLOCK_D]`; k, v `[KEYS, BLOCK_D]`; seen `[ROWS, KEYS]`.

    top `[ROWS]` is the running maximum (base 2), total `[ROWS, 16]` the sum of weights in each
    column, acc `[ROWS, BLOCK_D]`. A value that is not finite makes NaN of the rows that see it.
    """
    finite = tl.where(tl.abs(v) < float("inf"), v, 0.0).to(v.dtype)
    bad = tl.dot(tl.zeros(q.shape, q.dtype), tl.trans(v), input_precision="ieee")
    s = tl.dot(q, tl.trans(k), bad, input_precision="ieee") * scale
    s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    level = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s - level[:, None]).to(v.dtype)
    fade = tl.exp2(top - level)[:, None]
    ones = tl.full([k.shape[0], 16], 1.0, v.dtype)
    total = tl.dot(p, ones, total * fade, input_precision="ieee")
    acc = tl.dot(p, finite, acc * fade, input_precision="ieee")
    return new, total, acc


@triton.jit(do_not_specialize=["window", "T", "chunks", "row_tiles", "slots", "capacity"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, num_rows_ptr, ancestry_ptr, table_ptr, tops_ptr, totals_ptr,
    accs_ptr, q_strides, k_stride, v_stride, table_stride, scale, window, T, chunks, row_tiles,
    slots, capacity,
    K_STRIDES: tl.constexpr, V_STRIDES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, FINE: tl.constexpr,
    KEYS: tl.constexpr, PAGE: tl.constexpr, TREE: tl.constexpr, WINDOW: tl.constexpr,
    PDL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A slot's chunks of a tile of rows; behind those programs the tree nodes' own."""
    head, work = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length, live = _extent(lengths_ptr, num_rows_ptr, b, T, capacity)

    own = False
    slot, first_row, end_row = work // row_tiles, work % row_tiles * ROWS, live * GROUP
    if TREE:
        PER: tl.constexpr = min(ROWS, OWN * GROUP)
        own = work >= slots * row_tiles
        first_row = tl.where(own, (work - slots * row_tiles) * PER, first_row)
        end_row = tl.where(own, tl.minimum(end_row, first_row + PER), end_row)
        slot, slots = tl.where(own, 0, slot), tl.where(own, 1, slots)
    if first_row >= end_row:
        return
    row = first_row + tl.arange(0, ROWS)
    in_rows = row < end_row
    d = tl.arange(0, BLOCK_D)
    # Row r is the r mod GROUP-th head of the group, of node r div GROUP.
    at = b * q_strides[0] + (row // GROUP).to(tl.int64) * q_strides[1]
    at += (head * GROUP + row % GROUP) * q_strides[2]
    q = tl.load(
        q_ptr + (at[:, None] + (d * q_strides[3])[None, :]),
        mask=in_rows[:, None] & (d < D)[None, :], other=0.0,
    ).to(DOT)  # fmt: skip

    position = length + row // GROUP
    if TREE:
        ancestry_ptr += b * T
        masks = tl.load(ancestry_ptr + row // GROUP, mask=in_rows, other=0)
        depth = tl.sum(_ancestors(ancestry_ptr, (row // GROUP)[:, None], in_rows[:, None]), 1) - 1
        position = length + depth
        node, nodes = first_row // GROUP, (tl.minimum(first_row + ROWS, end_row) - 1) // GROUP
        nodes += 1 - node
    low, high = length * 0, tl.max(tl.where(in_rows, position, 0), 0) + 1
    if TREE:
        border = _begin_of(_chunk_of(length, CHUNK, FINE), CHUNK, FINE)
        low = tl.where(own, border, low)
        high = tl.where(own, high, tl.minimum(high, border))
    if WINDOW:
        first = tl.min(tl.where(in_rows, position, capacity), 0)
        low = tl.maximum(low, first - window + 1) // KEYS * KEYS

    if PAGE:
        table_ptr += b * table_stride
    k_ptr += head.to(tl.int64) * K_STRIDES[1]
    v_ptr += head.to(tl.int64) * V_STRIDES[1]
    parts = (b * tl.num_programs(0) + head) * chunks  # of the scratch, T * GROUP rows each
    # Tiles of this slot, `skip` to `tiles`: of one chunk, or of every `slots`-th run of CHUNK keys.
    chunk, first = _chunk_of(low, CHUNK, FINE) + slot, (low // CHUNK + slot) * CHUNK
    skip, tiles = tl.maximum(low - first, 0) // KEYS, length * 0
    if high > low:
        if _chunk_of(high - 1, CHUNK, FINE) - _chunk_of(low, CHUNK, FINE) < slots:
            first, skip = tl.maximum(_begin_of(chunk, CHUNK, FINE), low), length * 0
            end = tl.minimum(_begin_of(chunk + 1, CHUNK, FINE), high)
            tiles = tl.cdiv(tl.maximum(end - first, 0), KEYS)
        elif first < high:
            runs = tl.cdiv(high - first, CHUNK * slots)
            over = first + ((runs - 1) * slots + 1) * CHUNK - high
            tiles = runs * (CHUNK // KEYS) - tl.maximum(over, 0) // KEYS
    steps = tl.maximum(tiles - skip, 0)
    if TREE:
        shared = steps
        if own:
            shared = tl.maximum(length // KEYS * KEYS - first, 0) // KEYS - skip
            shared = tl.minimum(tl.maximum(shared, 0), steps)
            steps = shared + (steps - shared) * nodes
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS, 16], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, steps):
        tile, after, mine = step, step + 1, in_rows
        if TREE:  # a tile's nodes come one after the other
            turn = tl.maximum(step - shared, 0)
            now = node + turn % nodes
            mine = (step < shared) | (row // GROUP == now)
            tile = tl.minimum(step, shared) + turn // nodes
            after = tl.minimum(after, shared) + tl.maximum(after - shared, 0) // nodes
        start = _start_of(tile + skip, first, slots, CHUNK, KEYS)
        chunk = _chunk_of(start, CHUNK, FINE)
        after = _chunk_of(_start_of(after + skip, first, slots, CHUNK, KEYS), CHUNK, FINE)
        key = start + tl.arange(0, KEYS)
        inside = key < high
        offset = key
        if TREE:  # noqa: SIM102, a constant and what is only known in the kernel
            if step >= shared:
                leader = tl.maximum(now * GROUP, first_row)
                line = _members(tl.sum(tl.where(row == leader, masks, 0), 0), now)
                place = tl.where(line == 1, tl.cumsum(line, 1) - 1, -1)
                here = place == (key - length)[:, None]
                ancestor = tl.sum(tl.where(here, tl.arange(0, NODES)[None, :], 0), 1)
                offset = tl.where(key < length, key, length + ancestor)
        if PAGE:
            page = tl.load(table_ptr + offset // PAGE, mask=inside, other=0).to(tl.int64)
            offset = offset % PAGE
        else:  # a contiguous cache is one page a sequence
            page = b
        k = _load_tile(k_ptr, k_stride, page, offset, inside, K_STRIDES, D, BLOCK_D, DOT)
        v = _load_tile(v_ptr, v_stride, page, offset, inside, V_STRIDES, D, BLOCK_D, DOT)
        seen = (key[None, :] <= position[:, None]) & mine[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        top, total, acc = _add_tile(q, k, v, seen, top, total, acc, scale)
        if (step + 1 == steps) | (after != chunk):  # the loads of the next chunk are on their way
            at = (parts + chunk) * T * GROUP + row
            tl.store(tops_ptr + at, top, mask=in_rows)
            tl.store(totals_ptr + at, tl.max(total, 1), mask=in_rows)
            held = in_rows[:, None] & (d < D)[None, :]
            tl.store(accs_ptr + (at[:, None] * D + d[None, :]), acc, mask=held)
            top = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS, 16], tl.float32)
            acc = tl.zeros([ROWS, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["window", "T", "chunks", "capacity"])
def _combine_kernel(
    tops_ptr, totals_ptr, accs_ptr, out_ptr, lengths_ptr, num_rows_ptr, ancestry_ptr, window, T,
    chunks, capacity,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, FINE: tl.constexpr, TILE: tl.constexpr, TREE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row and head: its chunks, TILE at a time, at absolute places of the tile."""
    node, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    out_ptr += (b * T * HEADS + tl.program_id(0)) * D
    length, live = _extent(lengths_ptr, num_rows_ptr, b, T, capacity)
    if PDL:  # what stands above was there before the first kernel, which waited for it
        gdc_wait()
    if node >= live:
        tl.store(out_ptr + d, tl.zeros([BLOCK_D], tl.float32), mask=d < D)
        return
    position = length + node
    if TREE:
        position = length + tl.sum(_ancestors(ancestry_ptr + b * T, node, True)) - 1
    first = _chunk_of(tl.maximum(position - window + 1, 0), CHUNK, FINE)
    last = _chunk_of(position, CHUNK, FINE)
    base = (b * (HEADS // GROUP) + head // GROUP) * chunks
    top, total = -float("inf"), 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(first // TILE, last // TILE + 1):
        chunk = tile * TILE + tl.arange(0, TILE)
        inside = (chunk >= first) & (chunk <= last)
        at = (base + chunk) * T * GROUP + node * GROUP + head % GROUP
        tops = tl.load(tops_ptr + at, mask=inside, other=-float("inf"))
        totals = tl.load(totals_ptr + at, mask=inside, other=0.0)
        accs = tl.load(
            accs_ptr + (at[:, None] * D + d[None, :]), mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(tops, 0))
        level = tl.where(new == -float("inf"), 0.0, new)
        weight, fade = tl.exp2(tops - level), tl.exp2(top - level)
        total = total * fade + tl.sum(weight * totals, 0)
        acc = acc * fade + tl.sum(weight[:, None] * accs, 0)
        top = new
    tl.store(out_ptr + d, acc / total, mask=d < D)


@lru_cache(maxsize=64)
def tiles_of(kv_heads: int, head_size: int, dtype: torch.dtype, arch: int) -> Tiles:
    """The tiles of a head shape on one architecture; nothing else decides them.

    On an H200, one row of 40 heads at 1,024 tokens: 18.7 us in chunks of 512, 12.8 of 256. 16 rows
    of 32 heads at 4,096: 23.6 and 27.0 us, with fine chunks up to 1,024 24.3. Four warps a tile are
    up to 2% slower than two (bench/results/h200/sweeps/tree_attention.txt).
    """
    if dtype is torch.float32:  # exact products on the plain cores: small tiles, or they spill
        return Tiles(256, 16, 16, 4 if head_size <= 128 else 8, 1, 512)
    if head_size <= 128:
        return Tiles(512, 32, 32, 2, 4, 264, 255, 1024)
    return Tiles(512, 32, 32, 8, 3, 264, 255, 1024)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None,
    block_table: Tensor | None,
    window: int,
    out: Tensor,
    tiles: Tiles,
) -> None:
    batch, rows, heads, head_size = q.shape
    kv_heads = k_cache.shape[2]
    group, page = heads // kv_heads, 0 if block_table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if block_table is None else page * block_table.shape[1]
    chunks = triton.cdiv(capacity, tiles.chunk) + triton.cdiv(
        min(capacity, tiles.fine), tiles.chunk
    )  # of the fine ones there may be half a chunk less
    tile = min(tiles.rows, max(16, triton.next_power_of_2(rows * group)))
    row_tiles = triton.cdiv(rows * group, tile)
    slots = max(FEWEST_SLOTS, tiles.programs // (batch * kv_heads * row_tiles))
    slots = min(slots, chunks)
    own = 0 if ancestry is None else triton.cdiv(rows * group, min(tile, OWN.value * group))
    single = q.dtype is torch.float32 or q.device.type == "cpu"  # the interpreter's bf16 is wrong
    tops = torch.empty(batch, rows, heads, chunks, dtype=torch.float32, device=q.device)
    totals = torch.empty_like(tops)
    accs = torch.empty(*tops.shape, head_size, dtype=torch.float32, device=q.device)
    common = {
        "GROUP": group,
        "D": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "CHUNK": tiles.chunk,
        "FINE": tiles.fine,
        "TREE": ancestry is not None,
        "enable_fp_fusion": False,
        **overlap(q),
    }
    _attend_kernel[(kv_heads, slots * row_tiles + own, batch)](
        q, k_cache, v_cache, lengths, num_rows, ancestry, block_table, tops, totals, accs,
        q.stride(), k_cache.stride(0), v_cache.stride(0),
        0 if block_table is None else block_table.stride(0), scale * math.log2(math.e), window,
        rows, chunks, row_tiles, slots, capacity,
        K_STRIDES=k_cache.stride()[1:], V_STRIDES=v_cache.stride()[1:], ROWS=tile,
        KEYS=tiles.keys, PAGE=page, WINDOW=window < UNBOUNDED,
        DOT=tl.float32 if single else tl.bfloat16 if q.dtype is torch.bfloat16 else tl.float16,
        # In pages and trees a thread has addresses to keep as well: fewer numbers each.
        num_warps=max(tiles.warps, 4 if page or own else 0), maxnreg=tiles.registers,
        # The page's number is loaded as many stages ahead of K and V as they are of their use.
        num_stages=2 * tiles.stages - 1 if page else tiles.stages,
        **common,
    )  # fmt: skip
    _combine_kernel[(rows * heads, batch)](
        tops, totals, accs, out, lengths, num_rows, ancestry, window, rows, chunks, capacity,
        HEADS=heads, TILE=COMBINED // common["BLOCK_D"], num_warps=4,
        **common,
    )  # fmt: skip


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None = None,
    block_table: Tensor | None = None,
    window: int | None = None,
    *,
    out: tuple[Tensor, ...] | None = None,
    tiles: Tiles | None = None,
) -> Tensor | None:
    """The op; `tiles` other than the head shape's own are for sweeps and tests."""
    if q.dtype is torch.float64 or k_cache.dtype is not q.dtype or q.shape[3] > LARGEST_HEAD:
        return None
    y = out[0] if out else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if y.numel():
        _launch(
            q, k_cache, v_cache, lengths.contiguous(), num_rows.contiguous(), scale,
            None if ancestry is None else ancestry.contiguous(),
            None if block_table is None else block_table.contiguous(),
            UNBOUNDED if window is None else window, y,
            tiles or tiles_of(k_cache.shape[2], q.shape[3], q.dtype, architecture(q.device)),
        )  # fmt: skip
    return y
