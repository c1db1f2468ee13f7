"""Every op once on a GPU at its smallest, for compute-sanitizer:

`compute-sanitizer --tool memcheck python tests/gpu/every_op.py`, and `racecheck`, `initcheck`. Set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own. Op names as
arguments run these alone, `1/4` every fourth from the second on. `.ci/sanitize-gpu` does it all.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from op_samples import SAMPLES
from pages import pages_of

import eesd_kernels as ek
from eesd_kernels.triton import exit_merge, linear, rollback_kv, rows, tree_attention

NARROW = {"x", "weight", "residual", "gate_up", "qkv", "q", "k_cache", "v_cache", "cache", "hidden",
          "lm_head", "target_logits"}  # fmt: skip
LOOPING = ("verify_linear", "verify_tree", "tree_attention", "exit_topk", "exit_draft",
           "rollback_kv")  # fmt: skip
TILES_OF = tree_attention.tiles_of
PROGRAMS = rows.PROGRAMS, rows.RACING
FEW_BELOW = rollback_kv.FEW_BELOW, rollback_kv.PROGRAMS


def few_programs(*shape: Any) -> tree_attention.Tiles:
    """The tiles of a head shape, for one program a head of the cache and row tile."""
    return TILES_OF(*shape)._replace(programs=1)


def cases(name: str) -> Iterator[dict[str, Any]]:
    """The op's sample, in bfloat16 where it takes it, and forms that run other code."""
    sample = SAMPLES[name]()
    yield sample
    narrow = {k: v.bfloat16() if k in NARROW else v for k, v in sample.items()}
    if any(k in NARROW for k in sample):
        yield narrow
    if name == "linear":
        x, weight, norm = torch.randn(70, 256), torch.randn(200, 256), torch.rand(256)
        for outs in (1, 70):
            yield {"x": x[:outs].bfloat16(), "weight": weight.bfloat16(), "swiglu": True}
            yield {"x": x[:outs].half(), "weight": weight.half(), "norm_weight": norm.half()}
        for i, config in enumerate(dict.fromkeys(linear.BY_SHAPE.values())):
            count = 136 + 8 * i
            linear.BY_SHAPE[count, 256] = config
            yield {"x": x.bfloat16(), "weight": weight[:count].bfloat16(),
                   "residual": torch.randn(70, count).bfloat16()}  # fmt: skip
    elif name == "exit_topk":
        hidden, head = torch.randn(64, 256).bfloat16(), torch.randn(1003, 256).bfloat16()
        for k, count in ((8, 1), (8, 64), (64, 3)):
            yield {"hidden": hidden[:count], "lm_head": head, "k": k}
        norm = torch.rand(256).bfloat16()  # with one the merge polls
        yield {"hidden": hidden, "lm_head": head, "k": 8, "norm_weight": norm}
    elif name == "tree_attention":
        cache = torch.randn(2, 700, 2, 64).bfloat16()
        lengths = torch.tensor([600, 255], dtype=torch.int32)
        long = {"k_cache": cache, "v_cache": cache.flip(1), "lengths": lengths,
                "num_rows": torch.tensor([7, 5], dtype=torch.int32)}  # fmt: skip
        q, tree = torch.randn(2, 7, 8, 64).bfloat16(), torch.tensor([[1, 3, 5, 11, 19, 37, 69]] * 2)
        pages, table = pages_of(torch.stack((cache, cache.flip(1)))[None], 16)
        paged = {**long, "k_cache": pages[0, 0], "v_cache": pages[0, 1], "block_table": table}
        yield {"q": q, **long}
        yield {"q": q, **long, "ancestry": tree, "window": 200}
        yield {"q": q, **paged, "ancestry": tree}
        yield {**narrow, "window": 3}
        wide, table = pages_of(torch.stack((cache, cache.flip(1)))[None], 256)
        paged = {"k_cache": wide[0, 0], "v_cache": wide[0, 1], "block_table": table}
        yield {"q": q, **long, **paged}
    elif name == "rollback_kv":
        pages, table = pages_of(sample["cache"], 4)
        yield {**sample, "cache": pages, "block_table": table}
        line = [*range(0, 64, 2)] + [-1] * 32
        many = {"path": torch.tensor([line] * 3, dtype=torch.int32),
                "lengths": torch.tensor([0, 11, 26], dtype=torch.int32),
                "cache": torch.randn(3, 2, 3, 100, 2, 16).bfloat16()}  # fmt: skip
        yield many  # several groups of tokens, of which slots overlap
        yield {**many, "cache": many["cache"].transpose(3, 4).contiguous().transpose(3, 4)}
    elif name in ("verify_linear", "verify_tree"):
        fixed = torch.full_like(sample["law"], int(ek.Law.DETERMINISTIC))
        yield {**narrow, "q_ids": None, "q_probs": None, "law": fixed}
        vocab, probs = sample["target_logits"].shape[2], sample["q_probs"]
        if name == "verify_linear":
            yield {**narrow, "q_ids": None, "q_probs": torch.rand(*probs.shape[:2], vocab)}


def chosen(names: list[str]) -> list[str]:
    """The ops that the arguments mean."""
    if len(names) == 1 and "/" in names[0]:
        first, step = map(int, names[0].split("/"))
        return sorted(SAMPLES)[first::step]
    return names or sorted(SAMPLES)


def main(names: list[str]) -> None:
    """Run them; says how many calls it made."""
    calls, names = 0, chosen(names)
    for name in names:
        torch.manual_seed(0)
        for given in cases(name):
            # Few programs take several splits or chunks each, two race for a token; small chunks.
            for few in (False, True) if name in LOOPING else (False,):
                rows.SPLIT = 32
                rows.FOLD_BELOW = 0 if few else 1 << 20
                rows.PROGRAMS, rows.RACING = (1, 8) if few else PROGRAMS
                tree_attention.FEWEST_SLOTS, exit_merge.CHUNK = (1, 4) if few else (8, 64)
                rollback_kv.FEW_BELOW, rollback_kv.PROGRAMS = (0, 1) if few else FEW_BELOW
                tree_attention.tiles_of = few_programs if few else TILES_OF
                there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()}
                getattr(ek, name)(**there)
                torch.cuda.synchronize()
                calls += 1
    print(f"{calls} calls of {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
