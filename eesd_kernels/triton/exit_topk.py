"""RMSNorm, LM head, top-k and logsumexp in one pass over the weight, and no logits in memory.

Three launches, each set off before the end of the last (programmatic dependent launch):
- *prepare*, one program a row: the row normalised. More of them fill its records with poison.
- *scan*, one program a tile of the weight and of up to 64 rows: the loop of `linear`, and of each
  group of ids the best DEPTH logits, a bound of all others (the next best) and the sum of
  exponentials: 24 or 32 bytes for 64 logits. First over the 16 ids that a warp holds, by shuffles,
  then over the warps in two exchanges.
- *merge*, one program a row: the k best of all that is listed. A group whose bound and whole list
  are above the k-th best may hide more: its logits are computed anew, which 1 row in 5,000 needs
  (32,000 logits in random order, k = 8), and any row may. For k up to 8 one warp takes the records
  as they come, while scan still runs: what is no longer poison has been written.

Bound by reading the weight, `2 V H` bytes in bfloat16. A product's columns do not see each other,
H is summed in ascending order, exponentials are added as integers and keys compared exactly, so a
row has the same bits in any batch and any row tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels.triton.exit_merge import IN_TURN, POISON, merge
from eesd_kernels.triton.exit_scan import Config, config_of, depth_of, scan
from eesd_kernels.triton.launch import overlap
from eesd_kernels.triton.rms_norm import norm_row, tile_of
from eesd_kernels.triton.sample_draft import log2_up

ROW_TILES = (16, 32, 64)


@triton.jit
def _prepare_kernel(
    x_ptr, norm_ptr, out_ptr, lists_ptr, stride, size, groups, eps, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row normalised by the first of its programs; if merge polls, its records are poisoned by
    the others, so that the first takes no longer for it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if part == 0:
        norm_row(x_ptr + row * stride, norm_ptr, out_ptr + row * size, size, eps, WHOLE, BLOCK)
    else:
        at = (part - 1) * BLOCK + tl.arange(0, BLOCK)
        poison = tl.full([BLOCK], POISON, tl.int64)
        tl.store(lists_ptr + row * (4 * groups) + at, poison, mask=at < 4 * groups)


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
    poll: bool | None = None,
) -> bool:
    """Fill `out`; False for arguments left to the reference.

    `draft` is temperature, law, seed, position, base, parent of a draw of n children, which also
    fills `out[3:]`. `config`, `row_tile` and `poll` are for measuring; left out, the shapes and the
    device decide.
    """
    rows, (vocab, size) = hidden.shape[0], lm_head.shape
    float64 = norm_weight is not None and norm_weight.dtype is torch.float64
    if hidden.dtype is torch.float64 or float64 or not size:
        return False
    if not rows:
        return True
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, lm_head))
    width, halves = weight.element_size(), weight.element_size() == 2 == x.element_size()
    row_tile = row_tile or next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])
    aligned = (weight.data_ptr() | weight.stride(0) * width | size * width) % 16 == 0
    config = config or config_of(halves and aligned, row_tile)
    groups, log_k, pdl = triton.cdiv(vocab, config.group), log2_up(k), overlap(x)
    poll = pdl["PDL"] if poll is None else poll
    poll = poll and log_k <= IN_TURN and norm_weight is not None

    lists = torch.empty(rows, groups, 4, dtype=torch.int64, device=x.device)
    if norm_weight is not None:
        normed = x.new_empty(rows, size)
        block, warps = tile_of(size)
        _prepare_kernel[(rows, 1 + (triton.cdiv(4 * groups, block) if poll else 0))](
            x, norm_weight.contiguous(), normed, lists, x.stride(0), size, groups, eps,
            WHOLE=size <= block, BLOCK=block, num_warps=warps, **pdl,
        )  # fmt: skip
        x = normed
    depth = depth_of(log_k)
    scan(x, weight, lists, config, row_tile, depth)
    merge(x, weight, lists, k, out, draft, n, config, depth, poll)
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
