"""Calls of every Triton op on meta tensors of real models' shapes: `{op: {case: call}}`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eesd_kernels.triton.exit_draft import exit_draft
from eesd_kernels.triton.exit_topk import exit_topk
from eesd_kernels.triton.linear import BY_SHAPE, linear
from eesd_kernels.triton.rms_norm import rms_norm
from eesd_kernels.triton.rollback_kv import rollback_kv
from eesd_kernels.triton.rope_cache_write import rope_cache_write
from eesd_kernels.triton.sample_draft import sample_draft
from eesd_kernels.triton.swiglu import swiglu
from eesd_kernels.triton.target_law import cutoffs
from eesd_kernels.triton.tree_attention import tree_attention
from eesd_kernels.triton.verify_linear import verify_linear
from eesd_kernels.triton.verify_tree import verify_tree

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _swiglu() -> dict[str, Callable[[], object]]:
    return {str(t): partial(swiglu, meta(6, 27_648, dtype=t)) for t in FLOATS}


def _linear() -> dict[str, Callable[[], object]]:
    """Narrow and wide row tiles; shapes of every configuration, and one that nothing divides."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    shapes = [(5_120, 5_120), (1_000, 131)]
    forms = [
        (b, b, "norm residual"), (b, b, "norm swiglu"), (b, b, ""),
        (h, h, "swiglu"), (h, h, ""), (f, f, "norm residual"), (f, b, "swiglu"),
    ]  # fmt: skip
    cases = {
        f"{rows}x{outs}x{columns} {x} {weight} {form}": partial(
            linear,
            meta(rows, columns, dtype=x),
            meta(outs, columns, dtype=weight),
            meta(rows, outs, dtype=x) if "residual" in form else None,
            meta(columns, dtype=x) if "norm" in form else None,
            1e-5,
            "swiglu" in form,
        )
        for outs, columns in shapes
        for x, weight, form in forms
        for rows in (1, 20, 200)
    }
    for outs, columns in BY_SHAPE:
        for rows in (1, 20, 200):
            cases[f"{rows}x{outs}x{columns}"] = partial(
                linear, meta(rows, columns), meta(outs, columns), None, None, 1e-5, outs > 20_000
            )
    return cases


def _rms_norm() -> dict[str, Callable[[], object]]:
    sizes = (128, 5_120, 16_384, 20_000)
    return {
        f"{size} {t}": partial(rms_norm, meta(6, size, dtype=t), meta(size, dtype=t), 1e-5)
        for size in sizes
        for t in (torch.bfloat16, torch.float32)
    }


def _verify(
    batch: int, drafts: int, vocab: int, dtype: torch.dtype, q: str, filters: bool
) -> Callable[[], object]:
    """q: the number of ids of a sparse law, "dense", or "none"."""
    i32, f32 = torch.int32, torch.float32
    k = vocab if q == "dense" else int(q) if q != "none" else 0
    probs = meta(batch, drafts, k, dtype=f32) if k else None
    ids = meta(batch, drafts, k, dtype=i32) if k and q != "dense" else None
    each = {t: meta(batch, dtype=t) for t in (i32, f32, torch.int64)}
    filtered = (each[i32], each[f32], each[f32]) if filters else (None, None, None)
    return partial(
        verify_linear,
        meta(batch, drafts + 1, vocab, dtype=dtype), meta(batch, drafts, dtype=i32), each[i32],
        ids, probs, each[i32], each[f32], *filtered, each[torch.int64], each[i32], each[i32],
    )  # fmt: skip


def _verify_linear() -> dict[str, Callable[[], object]]:
    """Few rows, which race in the first launch, and many; the forms of q; awkward sizes."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (1, 5, 32_000, b, "8", False), (64, 5, 32_000, b, "8", False),
        (1, 5, 128_256, b, "8", True), (8, 5, 128_256, f, "8", True),
        (64, 5, 151_936, h, "64", False), (1, 16, 32_003, f, "64", True),
        (64, 16, 128_256, b, "64", True), (64, 0, 32_000, b, "8", False),
        (1, 5, 32_000, b, "none", False), (64, 5, 128_256, b, "none", True),
        (8, 5, 32_000, b, "dense", False), (8, 16, 128_256, f, "dense", True),
        (4, 1, 1000, f, "1", False), (64, 5, 50_257, b, "8", False), (64, 5, 50_257, h, "8", True),
        (8, 5, 262_147, b, "8", False), (8, 5, 262_208, f, "8", False),
    ]  # fmt: skip
    return {"x".join(map(str, case)): _verify(*case) for case in cases}


def _target_law() -> dict[str, Callable[[], object]]:
    i, f = meta(8, dtype=torch.int32), meta(8, dtype=torch.float32)
    cases = [(128_256, t, (i, f, f)) for t in FLOATS]
    cases += [(32_003, torch.float32, (i, f, f)), (128_256, torch.bfloat16, (None, f, None))]
    return {
        f"{vocab} {t} {sum(x is not None for x in filters)}": partial(
            cutoffs, meta(8, 6, vocab, dtype=t), i, f, *filters
        )
        for vocab, t, filters in cases
    }


def _tree(
    batch: int, nodes: int, vocab: int, dtype: torch.dtype, k: int, filters: bool
) -> Callable[[], object]:
    """k: the number of ids of a sparse law, 0: none."""
    i32, f32 = torch.int32, torch.float32
    ids = meta(batch, nodes, k, dtype=i32) if k else None
    probs = meta(batch, nodes, k, dtype=f32) if k else None
    node = meta(batch, nodes, dtype=i32)
    each = {t: meta(batch, dtype=t) for t in (i32, f32, torch.int64)}
    filtered = (each[i32], each[f32], each[f32]) if filters else (None, None, None)
    return partial(
        verify_tree, meta(batch, nodes, vocab, dtype=dtype), node, node, each[i32], ids, probs,
        each[i32], each[f32], *filtered, each[torch.int64], each[i32], each[i32],
    )  # fmt: skip


def _verify_tree() -> dict[str, Callable[[], object]]:
    """Few rows, which race in the first launch, and many; the largest tile; awkward sizes."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (1, 32, 32_000, b, 8, False), (64, 32, 128_256, b, 8, False), (8, 32, 128_256, f, 64, True),
        (1, 64, 32_003, f, 64, True), (64, 64, 151_936, h, 64, True), (1, 7, 32_003, b, 0, False),
    ]  # fmt: skip
    return {"x".join(map(str, case)): _tree(*case) for case in cases}


def _exit_topk() -> dict[str, Callable[[], object]]:
    """Narrow and wide row tiles, both ways to merge, a head that nothing divides, no norm."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    cases = [
        *((rows, 32_000, 4096, 8, b, b, True) for rows in (1, 20, 200)),
        *((rows, 32_000, 8192, 64, b, b, True) for rows in (1, 20, 200)),
        (1, 151_936, 5120, 8, b, b, True), (64, 128_256, 8192, 64, b, b, False),
        (1, 300_000, 512, 8, b, b, True), (3, 32_003, 1000, 1, h, h, True),
        (64, 32_003, 1001, 20, b, b, True), (64, 32_003, 1000, 8, f, f, True),
        (1, 1000, 20_000, 8, f, b, True), (1, 32_000, 4096, 8, f, b, True),
        (20, 32_000, 4096, 8, f, h, True), (1, 32_000, 4096, 8, f, f, True),
    ]  # fmt: skip
    apart = meta(32_000, 4100)[:, :4096]  # rows that are not 16 bytes apart
    unaligned = {f"{rows}x32000x4096 rows apart": partial(
        exit_topk, meta(rows, 4096), apart, 8, meta(4096), 1e-5) for rows in (1, 20)}  # fmt: skip
    return unaligned | {
        f"{rows}x{vocab}x{size} k {k} {x} {head} {'norm' if norm else ''}": partial(
            exit_topk, meta(rows, size, dtype=x), meta(vocab, size, dtype=head), k,
            meta(size, dtype=x) if norm else None, 1e-5,
        )
        for rows, vocab, size, k, x, head, norm in cases
    }  # fmt: skip


def _draw(rows: int, tree: bool) -> list[Tensor | None]:
    """seed, position, base, parent."""
    i32 = torch.int32
    position = meta(rows, dtype=i32)
    return [meta(rows, dtype=torch.int64), position, position, position if tree else None]


def _sample_draft() -> dict[str, Callable[[], object]]:
    f32, i32 = torch.float32, torch.int32
    return {
        f"{k} {tree}": partial(
            sample_draft, meta(6, k, dtype=f32), meta(6, k, dtype=i32), meta(6, dtype=f32),
            meta(6, dtype=i32), min(k, 4), *_draw(6, tree),
        )
        for k in (1, 5, 8, 64)
        for tree in (False, True)
    }  # fmt: skip


def _exit_draft() -> dict[str, Callable[[], object]]:
    cases = [(1, 32_000, 8, False), (64, 128_256, 64, True), (3, 151_936, 5, True)]
    return {
        f"{rows} {vocab} {k} {tree}": partial(
            exit_draft, meta(rows, 4096), meta(vocab, 4096), k, meta(4096), 1e-5,
            meta(rows, dtype=torch.float32), meta(rows, dtype=torch.int32), 2, *_draw(rows, tree),
        )
        for rows, vocab, k, tree in cases
    }  # fmt: skip


def _rollback_kv() -> dict[str, Callable[[], object]]:
    """13B, 70B and an awkward shape; contiguous, pages of 16, pages with the heads outermost."""
    cases = {}
    for layers, heads, size, t in (
        (40, 40, 128, torch.bfloat16), (80, 8, 128, torch.float32), (3, 3, 20, torch.float64),
    ):  # fmt: skip
        for batch in (1, 256):
            path, lengths = meta(batch, 32, dtype=torch.int32), meta(batch, dtype=torch.int32)
            table = meta(batch, 64, dtype=torch.int32)
            caches = {
                "contiguous": meta(layers, 2, batch, 1024, heads, size, dtype=t),
                "paged": meta(layers, 2, 999, 16, heads, size, dtype=t),
                "heads first": meta(layers, 2, 999, heads, 16, size, dtype=t).transpose(3, 4),
            }
            for form, cache in caches.items():
                cases[f"{layers}x{heads}x{size} {t} {batch} {form}"] = partial(
                    rollback_kv, cache, path, lengths, table if form != "contiguous" else None
                )
    return cases


def _rope_cache_write() -> dict[str, Callable[[], object]]:
    """13B, 70B, tables and caches of another dtype than qkv, sizes that are no power of two."""
    b, h, f, d = torch.bfloat16, torch.float16, torch.float32, torch.float64
    cases = {}
    for heads, kv_heads, size, types in (
        (40, 40, 128, (b, f, b)), (64, 8, 128, (b, b, b)), (32, 8, 64, (h, f, h)),
        (32, 32, 80, (f, f, b)), (8, 1, 256, (b, f, f)), (3, 1, 6, (f, d, d)),
    ):  # fmt: skip
        x, table, cache = types
        each, node = meta(6, dtype=torch.int32), meta(6, 32, dtype=torch.int32)
        angle = meta(4096, size // 2, dtype=table)
        k = meta(6, 1024, kv_heads, size, dtype=cache)
        pages = meta(999, 16, kv_heads, size, dtype=cache)
        qkv = meta(6, 32, (heads + 2 * kv_heads) * size, dtype=x)
        name = f"{heads}x{kv_heads}x{size} {x} {table} {cache}"
        call = partial(rope_cache_write, qkv, angle, angle)
        cases[f"{name} linear"] = partial(call, k, k, each, each)
        cases[f"{name} tree"] = partial(call, k, k, each, each, node)
        cases[f"{name} paged"] = partial(call, pages, pages, each, each, None, node)
    return cases


def _attention(
    dtype: torch.dtype, batch: int, rows: int, heads: int, kv_heads: int, size: int, form: str
) -> Callable[[], object]:
    """form: any of tree, paged, window."""
    i32 = torch.int32
    cache = meta(1024, 16, kv_heads, size, dtype=dtype)
    if "paged" not in form:
        cache = meta(batch, 8192, kv_heads, size, dtype=dtype)
    return partial(
        tree_attention, meta(batch, rows, heads, size, dtype=dtype), cache, cache,
        meta(batch, dtype=i32), meta(batch, dtype=i32), size**-0.5,
        meta(batch, rows, dtype=torch.int64) if "tree" in form else None,
        meta(batch, 512, dtype=i32) if "paged" in form else None,
        4096 if "window" in form else None,
    )  # fmt: skip


def _tree_attention() -> dict[str, Callable[[], object]]:
    """13B, Llama-3 8B and 70B, narrow and wide row tiles; every head size, form and dtype, the
    heaviest forms among every second case."""
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (b, 1, 1, 40, 40, 128, ""), (b, 8, 64, 40, 40, 128, ""), (b, 1, 16, 32, 8, 128, ""),
        (b, 8, 1, 64, 8, 128, ""), (b, 1, 16, 32, 8, 128, "paged"), (b, 1, 64, 64, 8, 128, ""),
        (b, 1, 16, 32, 8, 128, "tree"), (b, 8, 64, 40, 40, 128, "tree paged"),
        (b, 1, 64, 32, 8, 128, "tree paged window"), (b, 1, 1, 32, 8, 128, "window"),
        (b, 1, 6, 32, 32, 64, ""), (b, 1, 64, 32, 8, 64, "tree paged window"),
        (b, 1, 64, 32, 32, 96, "paged"), (b, 1, 16, 32, 32, 80, "tree"),
        (b, 1, 64, 8, 4, 256, "tree paged window"), (b, 1, 1, 8, 4, 256, ""),
        (h, 1, 64, 32, 8, 128, "tree paged window"), (h, 1, 6, 32, 32, 128, ""),
        (f, 1, 6, 32, 32, 128, ""), (f, 1, 64, 32, 8, 128, "tree paged window"),
        (f, 1, 1, 8, 4, 256, "window"), (f, 1, 16, 6, 2, 64, "tree"),
    ]  # fmt: skip
    return {"x".join(map(str, case)): _attention(*case) for case in cases}


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "exit_draft": _exit_draft(),
    "exit_topk": _exit_topk(),
    "linear": _linear(),
    "rms_norm": _rms_norm(),
    "sample_draft": _sample_draft(),
    "rollback_kv": _rollback_kv(),
    "rope_cache_write": _rope_cache_write(),
    "swiglu": _swiglu(),
    "target_law": _target_law(),
    "tree_attention": _tree_attention(),
    "verify_linear": _verify_linear(),
    "verify_tree": _verify_tree(),
}
