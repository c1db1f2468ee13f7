"""Check a linear draft against the target's logits: accepted prefix and one more token.

Rejection sampling with the residual draw in one op, from logits `[B, K+1, V]` to token ids; the
equations stand in `reference/verify_linear.py`. Text that comes out has exactly the target's law.
Reads each live row of logits, `4 (l + 1) V` bytes in float32, and that bounds it. Draft laws are
sparse (`q_ids`, `q_probs` from `sample_draft`).
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import verify_linear_cpu
from eesd_kernels._library import register
from eesd_kernels.laws import Law


def _cpu(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = verify_linear_cpu(*args)
    return reference.verify_linear(*args) if out is None else out


def _fake(target_logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, width, _vocab = target_logits.shape
    like = target_logits
    return (
        like.new_empty(batch, dtype=torch.int32),
        like.new_empty(batch, width, dtype=torch.int32),
        like.new_empty(batch, dtype=torch.int32),
    )


verify_linear_op = register(
    "verify_linear(Tensor target_logits, Tensor draft_ids, Tensor draft_length, Tensor q_ids,"
    " Tensor q_probs, Tensor law, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,"
    " Tensor seed, Tensor position, Tensor base) -> (Tensor, Tensor, Tensor)",
    reference=reference.verify_linear,
    cpu=_cpu,
    fake=_fake,
)


def verify_linear(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_length: Tensor,
    q_ids: Tensor,
    q_probs: Tensor,
    law: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify drafts of up to K tokens.

    Args:
        target_logits: `[B, K+1, V]` floating; row j is the target's law of the token at
            `position + j + 1`.
        draft_ids: `[B, K]` int32. draft_length: `[B]` int32, 0 to K: the rest is padding.
        q_ids, q_probs: `[B, K, k]` int32 and float32, the law each draft token was drawn from
            (`sample_draft`); ids of -1 are padding. Read for the sampled law alone.
        law: `[B]` int32, see `Law`; `BLOCK` is not taken yet.
        temperature: `[B]` float32; 0 is greedy.
        top_k: `[B]` int32, 0 is off. top_p: `[B]` float32, 1 is off. min_p: `[B]` float32, 0 is
            off. Ties at a threshold are kept.
        seed: `[B]` int64. position, base: `[B]` int32, place of the pending token, round base.

    Returns:
        num_accepted int32 `[B]`; token ids int32 `[B, K+1]`: accepted tokens, then the correction
        or bonus, then -1; status int32 `[B]`, 1 where the walk met a row with NaN or +inf or
        without a finite logit (then 0 accepted and all ids -1).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("verify_linear")
    check.tensor("target_logits", target_logits, ("B", "K+1", "V"), FLOATING)
    drafts = target_logits.shape[1] - 1
    check.tensor("draft_ids", draft_ids, ("B", drafts), torch.int32)
    check.tensor("draft_length", draft_length, ("B",), torch.int32)
    check.tensor("q_ids", q_ids, ("B", drafts, "k"), torch.int32)
    check.tensor("q_probs", q_probs, ("B", drafts, "k"), torch.float32)
    check.tensor("law", law, ("B",), torch.int32)
    check.tensor("temperature", temperature, ("B",), torch.float32)
    check.tensor("top_k", top_k, ("B",), torch.int32)
    check.tensor("top_p", top_p, ("B",), torch.float32)
    check.tensor("min_p", min_p, ("B",), torch.float32)
    check.tensor("seed", seed, ("B",), torch.int64)
    check.tensor("position", position, ("B",), torch.int32)
    check.tensor("base", base, ("B",), torch.int32)
    if target_logits.device.type == "cpu":  # values are free to look at there
        if bool((law == Law.BLOCK).any()):
            raise ValueError("verify_linear: law: block verification is not implemented yet")
        if bool(((draft_length < 0) | (draft_length > drafts)).any()):
            raise ValueError(
                f"verify_linear: draft_length: expected 0 to {drafts}, got {draft_length.tolist()}"
            )
        vocab = target_logits.shape[2]
        if bool((draft_ids >= vocab).any()) or bool((q_ids >= vocab).any()):
            raise ValueError(f"verify_linear: draft_ids, q_ids: expected ids below V = {vocab}")
    return verify_linear_op(
        target_logits, draft_ids, draft_length, q_ids, q_probs, law,
        temperature, top_k, top_p, min_p, seed, position, base,
    )  # fmt: skip
