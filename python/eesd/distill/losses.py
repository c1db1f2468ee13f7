"""The distillation loss over both LM heads, a chunk of rows at a time.

With p = softmax(teacher / T) and q = softmax(student / T), a row's loss and its gradient on the
student's logits are

    kl     sum p (log p - log q)      (q - p) / T
    tv     sum |p - q| / 2            q (g - sum q g) / T,  g = -[q < p]
    mixed  the mean of both

tv is 1 - the chance that rejection sampling accepts a draft. The gradients on the hidden states are
made in the forward pass, so that no `[R, V]` tensor outlives its chunk: the extra memory is a few
float32 copies of CHUNK_ELEMENTS, whatever R and V are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

CHUNK_ELEMENTS = 1 << 26  # 256 MiB in float32; at V = 4,096 a chunk is 16,384 rows

ChunkLoss = Callable[[Tensor, Tensor, str, float], tuple[Tensor, Tensor]]


def chunks(rows: int, vocab: int) -> list[slice]:
    """Slices of rows, as equal as can be, of at most CHUNK_ELEMENTS logits (16 rows at least)."""
    count = -(-rows // max(16, CHUNK_ELEMENTS // vocab))
    size = -(-rows // count)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def chunk_loss(
    student: Tensor, teacher: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits `[C, V]` of both to (the summed loss, its gradient on the student's logits)."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p = log_softmax(teacher.to(wide) / temperature, -1)
    log_q = log_softmax(student.to(wide) / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    total = p.new_zeros(())
    grad = torch.zeros_like(p)
    if kind in ("kl", "mixed"):
        total = total + (p * (log_p - log_q)).sum()
        grad = grad + (q - p)
    if kind in ("tv", "mixed"):
        total = total + (p - q).abs().sum() / 2
        below = -(q < p).to(wide)
        grad = grad + q * (below - (q * below).sum(-1, keepdim=True))
    share = 0.5 if kind == "mixed" else 1.0
    return share * total, (grad * (share / temperature)).to(student.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        kind: str,
        temperature: float,
        of_chunk: ChunkLoss,
    ) -> Tensor:
        weight, other = head.to(hidden.dtype), teacher_head.to(teacher.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for rows in chunks(len(hidden), len(weight)):
            loss, grad = of_chunk(
                linear(hidden[rows], weight), linear(teacher[rows], other), kind, temperature
            )
            total += loss
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head += grad.T @ hidden[rows]
        ctx.saved = (grad_hidden, grad_head)
        ctx.rows = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved
        scale = grads[0] / ctx.rows
        on_head = None if grad_head is None else grad_head * scale
        return (grad_hidden * scale).to(grad_hidden.dtype), on_head, None, None, None, None, None


def head_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    kind: str = "kl",
    temperature: float = 1.0,
    of_chunk: ChunkLoss = chunk_loss,
) -> Tensor:
    """Mean loss over rows.

    Args:
        hidden: `[R, H]`, the exit's after its norm. teacher: `[R, H]`, the backbone's.
        head: `[V, H]`, of the exit; gets a gradient if it asks for one. teacher_head: `[V, H]`.
        of_chunk: `chunk_loss`, or that compiled.

    Returns:
        float32 scalar; differentiable in hidden and head.
    """
    loss: Tensor = _HeadLoss.apply(hidden, head, teacher, teacher_head, kind, temperature, of_chunk)
    return loss
