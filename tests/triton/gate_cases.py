"""Calls of every Triton op on meta tensors of real models' shapes: `{op: {case: call}}`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eesd_kernels.triton.exit_draft import exit_draft
from eesd_kernels.triton.exit_topk import exit_topk
from eesd_kernels.triton.linear import BY_SHAPE, linear
from eesd_kernels.triton.rms_norm import rms_norm
from eesd_kernels.triton.sample_draft import sample_draft
from eesd_kernels.triton.swiglu import swiglu
from eesd_kernels.triton.target_law import cutoffs
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
        (h, h, "swiglu"), (f, f, "norm residual"), (f, b, "swiglu"),
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
        (4, 1, 1000, f, "1", False),
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
        (1, 1000, 20_000, 8, f, b, True),
    ]  # fmt: skip
    return {
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


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "exit_draft": _exit_draft(),
    "exit_topk": _exit_topk(),
    "linear": _linear(),
    "rms_norm": _rms_norm(),
    "sample_draft": _sample_draft(),
    "swiglu": _swiglu(),
    "target_law": _target_law(),
    "verify_linear": _verify_linear(),
    "verify_tree": _verify_tree(),
}
