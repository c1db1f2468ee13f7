"""Valid arguments for every public op, small, with awkward sizes: what many tests start from."""

from collections.abc import Callable
from typing import Any

import torch

import eesd_kernels as ek


def _positions(batch: int) -> torch.Tensor:
    return torch.arange(batch, dtype=torch.int32) * 7 + 3


def linear() -> dict[str, Any]:
    return {"x": torch.randn(5, 33), "weight": torch.randn(17, 33), "residual": torch.randn(5, 17)}


def rms_norm() -> dict[str, Any]:
    return {"x": torch.randn(5, 33), "weight": torch.rand(33) + 0.5, "eps": 1e-5}


def swiglu() -> dict[str, Any]:
    return {"gate_up": torch.randn(5, 34)}


def rope_cache_write() -> dict[str, Any]:
    angle = torch.rand(40, 3)
    return {
        "qkv": torch.randn(3, 4, 8 * 6),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "k_cache": torch.randn(3, 30, 2, 6),
        "v_cache": torch.randn(3, 30, 2, 6),
        "lengths": torch.tensor([0, 11, 26], dtype=torch.int32),
        "num_rows": torch.tensor([4, 0, 3], dtype=torch.int32),
        "depth": torch.tensor([[0, 1, 1, 2]] * 3, dtype=torch.int32),
    }


def tree_attention() -> dict[str, Any]:
    return {
        "q": torch.randn(3, 4, 4, 6),
        "k_cache": torch.randn(3, 30, 2, 6),
        "v_cache": torch.randn(3, 30, 2, 6),
        "lengths": torch.tensor([0, 11, 26], dtype=torch.int32),
        "num_rows": torch.tensor([4, 0, 3], dtype=torch.int32),
    }


def exit_topk() -> dict[str, Any]:
    return {
        "hidden": torch.randn(5, 33),
        "lm_head": torch.randn(101, 33),
        "k": 7,
        "norm_weight": torch.rand(33) + 0.5,
    }


def sample_draft() -> dict[str, Any]:
    rows, k = 5, 7
    return {
        "values": torch.randn(rows, k).sort(descending=True).values,
        "ids": torch.stack([torch.randperm(101)[:k] for _ in range(rows)]).to(torch.int32),
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1.5, 1.0]),
        "law": torch.tensor([0, 0, 1, 2, 0], dtype=torch.int32),
        "n": 3,
        "seed": torch.arange(rows) * 1234567891,
        "position": _positions(rows),
        "base": _positions(rows) - 2,
    }


def exit_draft() -> dict[str, Any]:
    draft = sample_draft()
    del draft["values"], draft["ids"]
    return {**exit_topk(), **draft}


def verify_linear() -> dict[str, Any]:
    batch, drafts, k, vocab = 4, 3, 5, 101
    logits = torch.randn(batch, drafts + 1, vocab)
    ids = logits[:, :drafts].topk(k).indices.to(torch.int32)
    return {
        "target_logits": logits,
        "draft_ids": ids[:, :, 0].contiguous(),
        "draft_length": torch.tensor([3, 0, 2, 3], dtype=torch.int32),
        "q_ids": ids,
        "q_probs": torch.rand(batch, drafts, k).softmax(-1),
        "law": torch.tensor([0, 0, 2, 0], dtype=torch.int32),
        "temperature": torch.tensor([1.0, 0.7, 1.0, 0.0]),
        "top_k": torch.tensor([0, 20, 0, 0], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.05, 0.0]),
        "seed": torch.arange(batch) - 2,
        "position": _positions(batch),
        "base": _positions(batch),
    }


def verify_tree() -> dict[str, Any]:
    batch, nodes, k, vocab = 4, 7, 5, 101
    logits = torch.randn(batch, nodes, vocab)
    ids = logits.topk(k).indices.to(torch.int32)
    parent = torch.tensor([-1, 0, 0, 1, 1, 2, 4], dtype=torch.int32).repeat(batch, 1)
    node_ids = torch.full((batch, nodes), -1, dtype=torch.int32)
    for node, sibling in ((1, 0), (2, 1), (3, 0), (4, 1), (5, 0), (6, 0)):
        node_ids[:, node] = ids[range(batch), parent[:, node], sibling]
    return {
        "target_logits": logits,
        "node_ids": node_ids,
        "parent": parent,
        "num_nodes": torch.tensor([7, 1, 5, 7], dtype=torch.int32),
        "q_ids": ids,
        "q_probs": torch.rand(batch, nodes, k).softmax(-1),
        "law": torch.tensor([0, 0, 2, 1], dtype=torch.int32),
        "temperature": torch.tensor([1.0, 0.7, 1.0, 0.0]),
        "top_k": torch.tensor([0, 20, 0, 0], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.05, 0.0]),
        "seed": torch.arange(batch) - 2,
        "position": _positions(batch),
        "base": _positions(batch),
    }


def rollback_kv() -> dict[str, Any]:
    return {
        "path": torch.tensor([[0, 2, 4, -1], [0, 1, 2, 3], [-1] * 4], dtype=torch.int32),
        "lengths": torch.tensor([0, 11, 26], dtype=torch.int32),
        "cache": torch.randn(2, 2, 3, 30, 2, 6),
    }


def sample_beta() -> dict[str, Any]:
    return {
        "alpha": torch.rand(4, 3) * 3 + 0.1,
        "beta": torch.rand(4, 3) * 3 + 0.1,
        "seed": torch.arange(4),
        "position": _positions(4),
    }


def thompson_draft_length() -> dict[str, Any]:
    return {
        "alpha": torch.rand(4) * 9 + 0.1,
        "beta": torch.rand(4) * 3 + 0.1,
        "cap": torch.tensor([5, 0, -1, 3], dtype=torch.int32),
        "rule": ek.Rule.COST,
        "costs": torch.linspace(1.0, 1.6, 6),
        "seed": torch.arange(4),
        "position": _positions(4),
        "credit": torch.tensor([0.9, 0.0, 5.0, 0.2]),
    }


def thompson_look() -> dict[str, Any]:
    """The third of five steps, as the first two may have left it."""
    bucket = torch.full((4, 5), -1, dtype=torch.int32)
    bucket[:, :2] = torch.tensor([[2, 1], [0, 1], [2, 2], [-1, -1]], dtype=torch.int32)
    return {
        "alpha": torch.rand(4, 3) * 9 + 0.1,
        "beta": torch.rand(4, 3) * 3 + 0.1,
        "cap": torch.tensor([5, 3, 5, -1], dtype=torch.int32),
        "costs": torch.linspace(1.0, 1.6, 6),
        "exit_cost": 0.05,
        "seed": torch.arange(4),
        "position": _positions(4),
        "step": 3,
        "top_prob": torch.tensor([0.9, 0.4, 0.1, 0.7]),
        "length": torch.tensor([2, 2, 2, 0], dtype=torch.int32),
        "bucket": bucket,
        "run": torch.tensor([[0.6, 2.4, 0.8]]).repeat(4, 1),
        "looking": torch.tensor([1, 1, 1, 0], dtype=torch.int32),
        "credit": torch.tensor([0.9, -0.5, -0.9, 1.0]),
    }


def thompson_update() -> dict[str, Any]:
    return {
        "alpha": torch.rand(4) + 1,
        "beta": torch.rand(4) + 1,
        "prior_alpha": torch.ones(4),
        "prior_beta": torch.ones(4),
        "drafted": torch.tensor([5, 0, -1, 3], dtype=torch.int32),
        "accepted": torch.tensor([2, 0, 0, 3], dtype=torch.int32),
        "discount": 0.9,
        "credit": torch.tensor([-0.9, 0.5, 1.0, -1.7]),
        "token_credit": 1.01,
        "credit_limit": 3.0,
    }


SAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        linear,
        rms_norm,
        swiglu,
        rope_cache_write,
        tree_attention,
        rollback_kv,
        exit_topk,
        sample_draft,
        exit_draft,
        verify_linear,
        verify_tree,
        sample_beta,
        thompson_draft_length,
        thompson_look,
        thompson_update,
    )
}
