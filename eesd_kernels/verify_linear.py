"""Check a linear draft against the target's logits: accepted prefix and one more token.

Rejection sampling with the residual draw in one op, from logits `[B, K+1, V]` to token ids; the
equations stand in `reference/verify_linear.py`. Text that comes out has exactly the target's law.
Reads each live row of logits, `4 (l + 1) V` bytes in float32, and that bounds it. Draft laws are
sparse (`q_ids`, `q_probs` from `sample_draft`), dense, or absent.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._cpu import philox_words_cpu, verify_linear_cpu
from eesd_kernels._library import register, triton_op
from eesd_kernels.laws import Law

FILTERS = ("top_k", "top_p", "min_p")  # arguments that may be None: off in every sequence

# The same words, bit for bit, from C++.
_slow = partial(reference.verify_linear, words=philox_words_cpu)


def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = verify_linear_cpu(*args)
    return _slow(*args) if out is None else out


def _fake(
    target_logits: Tensor, draft_ids: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width, _vocab = target_logits.shape
    return (
        draft_ids.new_empty(batch),
        draft_ids.new_empty(batch, width),
        draft_ids.new_empty(batch),
    )


verify_linear_op = register(
    "verify_linear(Tensor target_logits, Tensor draft_ids, Tensor draft_length, Tensor? q_ids,"
    " Tensor? q_probs, Tensor law, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p,"
    " Tensor seed, Tensor position, Tensor base) -> (Tensor, Tensor, Tensor)",
    reference=reference.verify_linear,
    cpu=_cpu,
    cuda=triton_op("verify_linear", reference.verify_linear),
    fake=_fake,
)


def check_sampling(
    check: Checks,
    rows: str | int,
    vocab: int,
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
) -> None:
    """The arguments that both verifiers share: the draft law in its three forms, and `[B]` each."""
    if q_probs is None:
        if q_ids is not None:
            raise ValueError(f"{check.op}: q_probs: expected a tensor beside q_ids, got None")
    elif q_ids is None:
        check.tensor("q_probs", q_probs, ("B", rows, vocab), torch.float32)
    else:
        check.tensor("q_ids", q_ids, ("B", rows, "k"), torch.int32)
        check.tensor("q_probs", q_probs, ("B", rows, "k"), torch.float32)
    for name, value, dtype in (
        ("law", law, torch.int32),
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seed", seed, torch.int64),
        ("position", position, torch.int32),
        ("base", base, torch.int32),
    ):
        if value is not None or name not in FILTERS:
            check.tensor(name, value, ("B",), dtype)
    if law.device.type != "cpu":
        return
    if bool(((law < min(Law)) | (law > max(Law))).any()):
        raise ValueError(
            f"{check.op}: law: expected {int(min(Law))} to {int(max(Law))}, got {law.tolist()}"
        )
    for name, number, fits, text in (  # comparisons that NaN fails
        ("temperature", temperature, lambda x: (x >= 0) & x.isfinite(), "0 or more"),
        ("top_p", top_p, lambda x: (x > 0) & (x <= 1), "above 0, at most 1"),
        ("min_p", min_p, lambda x: (x >= 0) & (x <= 1), "0 to 1"),
        ("top_k", top_k, lambda x: x >= 0, "0 or more"),
    ):
        if number is not None and not bool(fits(number).all()):
            raise ValueError(f"{check.op}: {name}: expected {text}, got {number.tolist()}")
    if q_ids is not None and bool((q_ids >= vocab).any()):
        raise ValueError(f"{check.op}: q_ids: expected ids below V = {vocab}")
    drawn = ((law == Law.SAMPLED) | (law == Law.BLOCK)) & (temperature > 0)
    if q_probs is None and bool(drawn.any()):
        raise ValueError(
            f"{check.op}: q_probs: expected the draft law for rows of law SAMPLED or BLOCK, "
            "got None"
        )


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
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify drafts of up to K tokens.

    Args:
        target_logits: `[B, K+1, V]` floating; row j is the target's law of the token at
            `position + j + 1`.
        draft_ids: `[B, K]` int32. draft_length: `[B]` int32, 0 to K: the rest is padding.
        q_ids, q_probs: the law each draft token was drawn from, read for `SAMPLED` and `BLOCK`:
            sparse (`[B, K, k]` int32 and float32, from `sample_draft`, ids distinct or -1), dense
            (None and `[B, K, V]`), or both None where no row's law is one of these.
        law: `[B]` int32, see `Law`.
        temperature: `[B]` float32; 0 is greedy.
        top_k: `[B]` int32, 0 is off. top_p: `[B]` float32, 1 is off. min_p: `[B]` float32, 0 is
            off. Ties at a threshold are kept. None: off in every sequence; where all three are, no
            kernel looks for thresholds.
        seed: `[B]` int64. position, base: `[B]` int32, place of the pending token, round base.
        out: the three results, contiguous: written and returned, nothing is allocated but scratch.

    Returns:
        num_accepted int32 `[B]`; token ids int32 `[B, K+1]`: accepted tokens, then the correction
        or bonus, then -1; status int32 `[B]`, 1 where the walk met a row with NaN or +inf or
        without a finite logit (then 0 accepted and all ids -1).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("verify_linear")
    check.tensor("target_logits", target_logits, ("B", "K+1", "V"), FLOATING)
    drafts, vocab = target_logits.shape[1] - 1, target_logits.shape[2]
    check.tensor("draft_ids", draft_ids, ("B", drafts), torch.int32)
    check.tensor("draft_length", draft_length, ("B",), torch.int32)
    check_sampling(
        check, drafts, vocab, q_ids, q_probs, law, temperature, top_k, top_p, min_p, seed,
        position, base,
    )  # fmt: skip
    if target_logits.device.type == "cpu":  # values are free to look at there
        if bool(((draft_length < 0) | (draft_length > drafts)).any()):
            raise ValueError(
                f"verify_linear: draft_length: expected 0 to {drafts}, got {draft_length.tolist()}"
            )
        if bool((draft_ids >= vocab).any()):
            raise ValueError(f"verify_linear: draft_ids: expected ids below V = {vocab}")
    arguments = (
        target_logits, draft_ids, draft_length, q_ids, q_probs, law,
        temperature, top_k, top_p, min_p, seed, position, base,
    )  # fmt: skip
    if out is None:
        return verify_linear_op(*arguments)
    if len(out) != 3:
        raise ValueError(f"verify_linear: out: expected 3 tensors, got {len(out)}")
    for i, (tensor, shape) in enumerate(zip(out, (("B",), ("B", drafts + 1), ("B",)), strict=True)):
        check.tensor(f"out[{i}]", tensor, shape, torch.int32, contiguous=True)
    torch.ops.eesd.verify_linear.out(*arguments, out0=out[0], out1=out[1], out2=out[2])
    return out
