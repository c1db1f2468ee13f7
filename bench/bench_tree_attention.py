"""Attention of a block over the KV cache beside PyTorch's SDPA with a boolean mask: lines, trees.

bf16, and some fp16; lengths and rows the same in a batch; the context counts the block. K and V
rotate past three times the L2. SDPA gets the heads of a group as rows, so that it reads K and V
once and without copies, its mask is made beforehand, and for pages it reads a contiguous cache.
flash_attn and FlashInfer (the quicker of its kernels for one sequence, masks packed beforehand) are
measured where they can be imported, and where they have the form.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import Call, arguments, input_sets, measure, print_table, read_bandwidth
from bench.results import write_results
from eesd_kernels import reference
from eesd_kernels.tree_attention import tree_attention_op

MODELS = {  # heads, KV heads, head size
    "7b": (32, 32, 128), "13b": (40, 40, 128), "3-8b": (32, 8, 128), "70b": (64, 8, 128),
    "64 wide": (32, 8, 64), "80 wide": (32, 32, 80), "96 wide": (32, 32, 96),
    "256 wide": (16, 8, 256),
}  # fmt: skip
FLASHINFER = ("flashinfer fa2", "flashinfer fa3")  # both of its kernels for one sequence
TOLERANCE = 8e-3  # of a head's result, error over size: bf16 weights, and a bf16 result


class Case(NamedTuple):
    model: str
    batch: int
    rows: int
    context: int
    tree: bool = False
    page: int = 0  # slots; 0: contiguous
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16


CASES = [
    *(Case("7b", 1, rows, context) for context in (4096, 8192, 32768) for rows in (1, 6, 16)),
    *(Case("13b", 1, rows, 1024) for rows in (1, 6, 16)),
    *(Case(model, 1, rows, 8192) for model in ("3-8b", "70b") for rows in (1, 6, 16)),
    *(Case(model, 1, nodes, 4096, tree=True) for model in ("13b", "3-8b") for nodes in (32, 64)),
    Case("7b", 1, 6, 8192, page=16), Case("3-8b", 1, 32, 8192, tree=True, page=16),
    Case("7b", 1, 6, 8192, page=256), Case("3-8b", 8, 32, 4096, tree=True, page=256),
    Case("3-8b", 1, 1, 32768, window=4096), Case("3-8b", 1, 6, 32768, window=4096),
    *(Case(model, 8, rows, 4096) for model in ("13b", "3-8b") for rows in (1, 6)),
    Case("3-8b", 8, 6, 4096, page=16),
    *(Case(f"{size} wide", 1, rows, 4096, rows == 32) for size in (64, 80, 96, 256)
      for rows in (1, 6, 32)),
    *(Case("7b", 1, rows, 4096, rows == 32, dtype=torch.float16) for rows in (1, 6, 32)),
    Case("3-8b", 8, 6, 4096, page=16, dtype=torch.float16),
]  # fmt: skip


class Inputs(NamedTuple):
    """One set: the op's arguments, where it writes, and what the peers read."""

    given: tuple[Any, ...]
    out: Tensor
    k: Tensor  # contiguous
    v: Tensor
    packed_mask: Tensor  # of [T, S], eight bits a byte, the lowest first
    folded_mask: Tensor  # [group T, S]


def path(node: int) -> list[int]:
    """Of a binary tree, from the root."""
    return [*path((node - 1) // 2), node] if node else [0]


def mask_of(case: Case) -> Tensor:
    """What each row sees of the context."""
    length = case.context - case.rows
    sees = torch.ones(case.rows, case.context, dtype=torch.bool)
    position = torch.arange(case.context)
    for i in range(case.rows):
        line = path(i) if case.tree else list(range(i + 1))
        sees[i, length:] = False
        sees[i, [length + j for j in line]] = True
        if case.window:
            sees[i] &= position > length + i - case.window
    return sees.cuda()


def inputs(case: Case, mask: Tensor) -> Inputs:
    heads, kv_heads, size = MODELS[case.model]

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=case.dtype, device="cuda").normal_()

    q = normal(case.batch, case.rows, heads, size)
    k, v = (normal(case.batch, case.context, kv_heads, size) for _ in range(2))
    table, caches = None, (k, v)
    if case.page:
        order = torch.randperm(case.batch * case.context // case.page, device="cuda")
        caches = tuple(x.view(-1, case.page, kv_heads, size)[order] for x in (k, v))
        table = order.argsort().int().view(case.batch, -1)
    ancestry = None
    if case.tree:
        bits = [sum(1 << j for j in path(i)) for i in range(case.rows)]
        bits = [b - (b >> 63 << 64) for b in bits]  # node 63's is the sign
        ancestry = torch.tensor([bits] * case.batch, device="cuda")
    each = torch.full((case.batch,), case.rows, dtype=torch.int32, device="cuda")
    given = (
        q, *caches, case.context - each, each, size**-0.5, ancestry, table, case.window
    )  # fmt: skip
    folded_mask = mask.repeat(heads // kv_heads, 1)
    bits = mask.view(-1, 8) << torch.arange(8, device="cuda")
    packed_mask = bits.sum(1).to(torch.uint8)
    return Inputs(given, torch.empty_like(q), k, v, packed_mask, folded_mask)


def ours(case: Inputs) -> None:
    torch.ops.eesd.tree_attention.out(*case.given, out0=case.out)


def sdpa(case: Inputs) -> Tensor:
    """Rows `[B, Hkv, group T, D]`: a group's heads read the same K and V."""
    q = case.given[0]
    batch, rows, heads, size = q.shape
    folded = q.transpose(1, 2).reshape(batch, case.k.shape[2], -1, size)
    out = scaled_dot_product_attention(
        folded, case.k.transpose(1, 2), case.v.transpose(1, 2), attn_mask=case.folded_mask
    )
    return out.reshape(batch, heads, rows, size).transpose(1, 2)


def size_of_error(got: Tensor, want: Tensor) -> float:
    """The largest of any row and head, over its size."""
    return float(((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max())


def in_double(case: Inputs) -> Tensor:
    q, _, _, lengths, num_rows, scale, ancestry, _, window = case.given
    inner = (x.double() for x in (q, case.k, case.v))
    return reference.tree_attention(*inner, lengths, num_rows, scale, ancestry, None, window)


def rows_are_equal(case: Inputs, together: Tensor) -> bool:
    """Whether rows of the last sequence have the same bits alone, nodes behind their ancestors, and
    sequences in the opposite order."""
    q, k, v, lengths, num_rows, scale, ancestry, table, window = case.given
    b, one = len(q) - 1, num_rows[:1] * 0 + 1
    back = [None if x is None else x.flip(0).contiguous() for x in (q, lengths, num_rows, ancestry)]
    caches = (k, v) if table is not None else (k.flip(0), v.flip(0))
    turned = tree_attention_op(
        back[0], *caches, *back[1:3], scale, back[3],
        None if table is None else table.flip(0).contiguous(), window,
    )  # fmt: skip
    if not torch.equal(turned.flip(0), together):
        return False
    if table is None:
        k, v = k[b:], v[b:]
    for i in range(q.shape[1]):
        before, keys, values, pages = i, k, v, table
        if ancestry is not None:  # in place, in a contiguous cache
            nodes = int(lengths[b]) + torch.tensor(path(i), device="cuda")
            before, pages = len(nodes) - 1, None
            keys, values = case.k[b:].clone(), case.v[b:].clone()
            for mine, source in ((keys, case.k), (values, case.v)):
                mine[0, nodes[0] : nodes[0] + len(nodes)] = source[b, nodes]
        alone = tree_attention_op(
            q[b:, i : i + 1].contiguous(), keys, values, lengths[b:] + before, one, scale, None,
            None if pages is None else pages[b:].contiguous(), window,
        )  # fmt: skip
        if not torch.equal(alone[0, 0], together[b, i]):
            return False
    return True


def bytes_moved(case: Case) -> int:
    """K and V that any row sees, once; q and the result; masks, pages, lengths and rows."""
    heads, kv_heads, size = MODELS[case.model]
    seen = min(case.context, (case.window or case.context) + case.rows - 1)
    numbers = 2 * seen * kv_heads * size + 2 * case.rows * heads * size
    pages = 4 * -(-seen // case.page) if case.page else 0
    return case.batch * (2 * numbers + 8 * case.rows * case.tree + pages + 4 * 2)


def peers() -> dict[str, Callable[[Case, Inputs], Tensor | None]]:
    """Functions of those that can be imported; None for a form that they do not have."""
    found: dict[str, Callable[[Case, Inputs], Tensor | None]] = {}
    try:
        from flash_attn import flash_attn_func

        def flash(case: Case, x: Inputs) -> Tensor | None:
            if case.tree:
                return None
            window = (case.window - 1, 0) if case.window else (-1, -1)
            return flash_attn_func(x.given[0], x.k, x.v, causal=True, window_size=window)

        found["flash_attn"] = flash
    except Exception as error:
        print(f"flash_attn: n/a ({type(error).__name__})")
    try:
        from flashinfer import single_prefill_with_kv_cache

        def single(case: Case, x: Inputs, backend: str) -> Tensor | None:
            if case.batch > 1 or MODELS[case.model][2] != 128 or case.dtype is torch.float16:
                return None  # each head size and dtype is a minute of compiling
            how: dict[str, Any] = {"causal": True}
            if case.tree:
                how = {"packed_custom_mask": x.packed_mask}
            if case.window:
                how["window_left"] = case.window - 1
            q, k, v = x.given[0][0], x.k[0], x.v[0]
            return single_prefill_with_kv_cache(q, k, v, backend=backend, **how)[None]

        for name in FLASHINFER:
            found[name] = partial(single, backend=name.split()[1])
    except Exception as error:
        print(f"flashinfer: n/a ({type(error).__name__})")
    return found


def works(name: str, call: Callable[[], Tensor | None], want: Tensor) -> bool:
    """Whether a peer has this form, is right, and runs in a graph."""
    try:
        got = call()
        if got is None:
            return False
        assert size_of_error(got, want) < TOLERANCE, "another result"
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{name}: n/a ({type(error).__name__}: {str(error)[:80]})")
        return False
    return True


def main() -> None:
    """Measure, print and write `tree_attention.json`."""
    args = arguments(__doc__.splitlines()[0])
    if args.device != "cuda":
        print("tree_attention is measured on a CUDA GPU")
        return
    torch.manual_seed(0)
    bandwidth, others = read_bandwidth(), {"sdpa": lambda _, x: sdpa(x), **peers()}
    results: list[dict[str, Any]] = []
    for case in CASES:
        moved, mask = bytes_moved(case), mask_of(case)
        sets = [inputs(case, mask) for _ in range(input_sets(moved, "cuda"))]
        want = in_double(sets[0])
        ours(sets[0])
        close = size_of_error(sets[0].out, want) < TOLERANCE
        equal = rows_are_equal(sets[0], sets[0].out)
        contenders: dict[str, list[Call]] = {"us": [lambda s=s: ours(s) for s in sets]}
        for name, peer in others.items():
            if works(name, lambda p=peer, c=case, s=sets[0]: p(c, s), want):
                contenders[name] = [lambda s=s, p=peer, c=case: p(c, s) for s in sets]
        times = measure(contenders, "cuda", quick=args.quick)
        mine = times.pop("us")
        flashinfer: dict[str, Any] = {}
        for us, name in sorted((times.pop(n).us, n) for n in FLASHINFER if n in times)[:1]:
            flashinfer = {"us_flashinfer": round(us, 3), "x_flashinfer": round(mine.us / us, 4),
                          "flashinfer": name.split()[1]}  # fmt: skip
        heads, kv_heads, size = MODELS[case.model]
        results.append({
            "shape": case.model, "B": case.batch, "T": case.rows, "Hq": heads, "Hkv": kv_heads,
            "D": size, "context": case.context, "window": case.window,
            "dtype": str(case.dtype).removeprefix("torch."),
            "draft": "tree" if case.tree else "linear",
            "cache": "paged" if case.page else "contiguous", "page": case.page or None,
            **mine.row(), "bytes": moved,
            "ceiling_share": round(moved / bandwidth / mine.us, 4),
            **{f"us_{name}": round(t.us, 3) for name, t in times.items()},
            **{f"x_{name}": round(mine.us / t.us, 4) for name, t in times.items()},
            **flashinfer,
            "rows_equal": equal, "close": close,
        })  # fmt: skip
        del sets, contenders, want
    print_table(results)
    print(f"read bandwidth {bandwidth * 1e-6:.3f} TB/s")
    logs = [math.log(r["x_sdpa"]) for r in results if "x_sdpa" in r]
    print(f"x_sdpa, geometric mean of {len(logs)}: {math.exp(sum(logs) / max(1, len(logs))):.4f}")
    print(write_results("tree_attention", results, out=args.out))


if __name__ == "__main__":
    main()
