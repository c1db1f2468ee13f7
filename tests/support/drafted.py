"""Many drafted rows at once, as arguments of `verify_linear` and, as a chain, of `verify_tree`."""

from typing import Any

import torch

import eesd_kernels as ek
from eesd_kernels import Law

I32 = torch.int32


def i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=I32)


def one_hot(*tokens: int, vocab: int = 6) -> torch.Tensor:
    """A row of logits for each token, which alone is finite."""
    logits = torch.full((len(tokens), vocab), -torch.inf)
    logits[range(len(tokens)), list(tokens)] = 0.0
    return logits


def largest(seed, position, base, purpose, ids, parent=None) -> torch.Tensor:
    """In place of `philox_words`: the largest word there is, for every counter."""
    n = ids if isinstance(ids, int) else ids.shape[-1]
    return torch.full((len(seed), n), 2**32 - 1)


def settings(rows: int, vocab: int, law: int) -> dict[str, Any]:
    """The arguments after the draft of one sequence: q uniform, no filter."""
    return {
        "q_ids": torch.arange(vocab, dtype=I32).expand(1, rows, vocab).contiguous(),
        "q_probs": torch.full((1, rows, vocab), 1 / vocab),
        "law": i32([law]),
        "temperature": torch.ones(1),
        "top_k": i32([0]),
        "top_p": torch.ones(1),
        "min_p": torch.zeros(1),
        "seed": torch.tensor([7]),
        "position": i32([10]),
        "base": i32([10]),
    }


def linear_drafts(
    rows: int, drafts: int, vocab: int, k: int, laws: list[Law], seed: int = 0
) -> dict[str, Any]:
    """Drawn by `sample_draft`; laws, temperatures, filters and lengths differ by row."""
    torch.manual_seed(seed)
    law = torch.tensor(laws, dtype=I32).repeat(rows // len(laws) + 1)[:rows]
    temperature = torch.tensor([0.0, 0.4, 1.0, 1.0, 2.0]).repeat(rows // 5 + 1)[:rows]
    seeds, place = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(1, 9999, (rows,)).to(I32)
    logits = torch.randn(rows, drafts + 1, vocab) * 2
    values, q_ids = (logits[:, :drafts] + torch.randn(rows, drafts, vocab)).topk(k)
    q_ids = q_ids.to(I32)
    drawn = [
        ek.sample_draft(
            values[:, j], q_ids[:, j].contiguous(), temperature, law, 1, seeds, place + j + 1, place
        )
        for j in range(drafts)
    ]
    return {
        "target_logits": logits,
        "draft_ids": torch.stack([child[:, 0] for child, _ in drawn], 1),
        "draft_length": torch.randint(0, drafts + 1, (rows,)).to(I32),
        "q_ids": q_ids,
        "q_probs": torch.stack([q for _, q in drawn], 1),
        "law": law,
        "temperature": temperature,
        "top_k": torch.randint(0, vocab // 2, (rows,)).to(I32),
        "top_p": torch.rand(rows) * 0.5 + 0.5,
        "min_p": torch.rand(rows) * 0.1,
        "seed": seeds,
        "position": place,
        "base": place,
    }


def dense(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same laws as rows over the whole vocabulary."""
    ids, probs = arguments["q_ids"], arguments["q_probs"]
    vocab = arguments["target_logits"].shape[2]
    full = torch.zeros(*ids.shape[:2], vocab + 1)  # padding goes to a column of its own
    full.scatter_(2, torch.where(ids < 0, vocab, ids).long(), probs)
    return {**arguments, "q_ids": None, "q_probs": full[..., :vocab].contiguous()}


def as_chain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The linear draft as a tree in which every node has one child."""
    chain = dict(arguments)
    draft, length = chain.pop("draft_ids"), chain.pop("draft_length")
    rows, drafts = draft.shape
    for name, fill in (("q_ids", -1), ("q_probs", 0)):  # the last node has no children
        if chain[name] is not None:
            chain[name] = torch.nn.functional.pad(chain[name], (0, 0, 0, 1), value=fill)
    root = torch.full((rows, 1), -1, dtype=I32)
    return {
        **chain,
        "node_ids": torch.cat((root, draft), 1),
        "parent": torch.arange(-1, drafts, dtype=I32).repeat(rows, 1),
        "num_nodes": length + 1,
    }
