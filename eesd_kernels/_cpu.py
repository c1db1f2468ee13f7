"""CPU implementations in C++: tensors in, `eesd_kernels._C` over their addresses.

Each returns None where the C++ library does not take the dtypes or layout at hand, and the caller
falls back on the reference. Those with a `stream` also serve CUDA tensors: see `_cuda`.
"""

import torch
from torch import Tensor

from eesd_kernels import _C
from eesd_kernels.laws import Law

_NULL = 0


def _address(tensor: Tensor | None) -> int:
    return _NULL if tensor is None else tensor.data_ptr()


def linear_cpu(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor | None:
    """x `[..., H]` float32 over a float32 or bfloat16 weight."""
    bf16 = weight.dtype is torch.bfloat16
    if x.dtype is not torch.float32 or not (bf16 or weight.dtype is torch.float32):
        return None
    x, weight = x.contiguous(), weight.contiguous()
    residual = residual.contiguous() if residual is not None else None
    outs, ins = weight.shape
    out = torch.empty(*x.shape[:-1], outs, dtype=torch.float32)
    _C.linear(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), out.numel() // max(outs, 1), ins, outs,
        bf16=bf16, residual=_address(residual),
    )  # fmt: skip
    return out


def philox_words_cpu(
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    purpose: int,
    ids: Tensor | int,
    parent: Tensor | None = None,
    stream: int | None = None,
) -> Tensor:
    """The words of `reference.philox_words`, bit for bit."""
    rows = seed.shape[0]
    if isinstance(ids, int):  # one Philox call serves four consecutive ids
        n, listed = ids, None
    else:
        n = ids.shape[-1]
        listed = ids.to(torch.int32).expand(rows, n).contiguous()
    seed, position, base = seed.contiguous(), position.contiguous(), base.contiguous()
    parent = None if parent is None else parent.contiguous()
    out = torch.empty(rows, n, dtype=torch.int32, device=seed.device)
    _C.philox_words(
        seed.data_ptr(), position.data_ptr(), base.data_ptr(), int(purpose), rows, n,
        out.data_ptr(), ids=_address(listed), parent=_address(parent), stream=stream,
    )  # fmt: skip
    return out.to(torch.int64) & 0xFFFFFFFF


def sample_beta_cpu(
    alpha: Tensor, beta: Tensor, seed: Tensor, position: Tensor, stream: int | None = None
) -> Tensor:
    """alpha, beta `[B]` or `[B, buckets]` float32."""
    alpha, beta = alpha.contiguous(), beta.contiguous()
    seed, position = seed.contiguous(), position.contiguous()
    out = torch.empty_like(alpha)
    buckets = alpha.shape[1] if alpha.dim() == 2 else 1
    if alpha.numel():
        _C.sample_beta(
            alpha.data_ptr(), beta.data_ptr(), seed.data_ptr(), position.data_ptr(), alpha.numel(),
            buckets, out.data_ptr(), stream=stream,
        )  # fmt: skip
    return out


def thompson_draft_length_cpu(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    rule: int,
    costs: Tensor,
    seed: Tensor,
    position: Tensor,
    credit: Tensor | None = None,
    stream: int | None = None,
) -> Tensor:
    """The dtypes of the public function; alpha, beta `[B]`, or `[B, buckets]` if calibrated."""
    alpha, beta, cap, costs = (
        alpha.contiguous(),
        beta.contiguous(),
        cap.contiguous(),
        costs.contiguous(),
    )
    seed, position = seed.contiguous(), position.contiguous()
    length = torch.empty_like(cap)
    written = None if credit is None else credit.contiguous()
    _C.thompson_draft_length(
        alpha.data_ptr(), beta.data_ptr(), cap.data_ptr(), rule, costs.data_ptr(), seed.data_ptr(),
        position.data_ptr(), cap.shape[0], alpha.shape[1] if alpha.dim() == 2 else 1,
        costs.shape[0], length.data_ptr(), _address(written), stream,
    )  # fmt: skip
    _copy_back([written], (credit,))
    return length


def _copy_back(written: list[Tensor | None], outputs: tuple[Tensor | None, ...]) -> None:
    """Strided outputs were written as contiguous copies."""
    for copy, output in zip(written, outputs, strict=True):
        if copy is not None and output is not None and copy.data_ptr() != output.data_ptr():
            output.copy_(copy)


def thompson_look_cpu(
    alpha: Tensor,
    beta: Tensor,
    cap: Tensor,
    costs: Tensor,
    exit_cost: float,
    seed: Tensor,
    position: Tensor,
    step: int,
    top_prob: Tensor,
    length: Tensor,
    bucket: Tensor,
    run: Tensor,
    looking: Tensor,
    credit: Tensor | None = None,
    stream: int | None = None,
) -> None:
    """The dtypes and shapes of the public function."""
    alpha, beta, cap, costs = (
        alpha.contiguous(),
        beta.contiguous(),
        cap.contiguous(),
        costs.contiguous(),
    )
    seed, position, top_prob = seed.contiguous(), position.contiguous(), top_prob.contiguous()
    outputs = length, bucket, run, looking, credit
    written = [None if x is None else x.contiguous() for x in outputs]
    addresses = [_address(x) for x in written]
    _C.thompson_look(
        alpha.data_ptr(), beta.data_ptr(), cap.data_ptr(), costs.data_ptr(), exit_cost,
        seed.data_ptr(), position.data_ptr(), top_prob.data_ptr(), alpha.shape[0], alpha.shape[1],
        costs.shape[0], step, addresses[0], addresses[1], addresses[2], addresses[3], addresses[4],
        stream,
    )  # fmt: skip
    _copy_back(written, outputs)


def thompson_update_cpu(
    alpha: Tensor,
    beta: Tensor,
    prior_alpha: Tensor,
    prior_beta: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    discount: float,
    bucket: Tensor | None = None,
    credit: Tensor | None = None,
    token_credit: float = 1.0,
    credit_limit: float = float("inf"),
    stream: int | None = None,
) -> None:
    """The dtypes and shapes of the public function."""
    prior_alpha, prior_beta = prior_alpha.contiguous(), prior_beta.contiguous()
    drafted, accepted = drafted.contiguous(), accepted.contiguous()
    bucket = None if bucket is None else bucket.contiguous()
    outputs = alpha, beta, credit
    written = [None if x is None else x.contiguous() for x in outputs]
    _C.thompson_update(
        _address(written[0]), _address(written[1]), prior_alpha.data_ptr(), prior_beta.data_ptr(),
        drafted.data_ptr(), accepted.data_ptr(), _address(bucket), drafted.shape[0],
        1 if bucket is None else alpha.shape[1], 0 if bucket is None else bucket.shape[1],
        discount, _address(written[2]), token_credit, credit_limit, stream,
    )  # fmt: skip
    _copy_back(written, outputs)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x `[..., H]` float32, weight float32 or bfloat16."""
    bf16 = weight.dtype is torch.bfloat16
    if x.dtype is not torch.float32 or not (bf16 or weight.dtype is torch.float32):
        return None
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    size = weight.shape[0]
    _C.rms_norm(x.data_ptr(), weight.data_ptr(), bf16, eps, x.numel() // size, size, out.data_ptr())
    return out


def swiglu_cpu(gate_up: Tensor) -> Tensor | None:
    """gate_up `[..., 2 I]` float32."""
    if gate_up.dtype is not torch.float32:
        return None
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=torch.float32)
    _C.swiglu(gate_up.data_ptr(), gate_up.numel() // max(2 * size, 1), size, out.data_ptr())
    return out


def _cache_is_plain(cache: Tensor) -> bool:
    """Float32 with contiguous sequences, however far apart they lie."""
    return cache.dtype is torch.float32 and (
        cache.is_contiguous() or cache.shape[0] == 0 or cache[0].is_contiguous()
    )


def rope_cache_write_cpu(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    depth: Tensor | None,
    block_table: Tensor | None = None,
) -> Tensor | None:
    """qkv `[B, T, (Hq + 2 Hkv) D]` float32 into a float32 contiguous cache."""
    if block_table is not None:
        return None
    plain = _cache_is_plain(k_cache) and _cache_is_plain(v_cache)
    same = k_cache.stride(0) == v_cache.stride(0)
    if not (plain and same) or qkv.dtype is not torch.float32 or cos.dtype is not torch.float32:
        return None
    qkv, lengths, num_rows = qkv.contiguous(), lengths.contiguous(), num_rows.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    depth = None if depth is None else depth.contiguous()
    batch, rows, width = qkv.shape
    slots, kv_heads, head_size = k_cache.shape[1:]
    heads = width // head_size - 2 * kv_heads
    out = torch.empty(batch, rows, heads, head_size, dtype=torch.float32)
    _C.rope_cache_write(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        k_cache.stride(0), lengths.data_ptr(), num_rows.data_ptr(), _address(depth), batch, rows,
        heads, kv_heads, head_size, slots, cos.shape[0], out.data_ptr(),
    )  # fmt: skip
    return out


def tree_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    num_rows: Tensor,
    scale: float,
    ancestry: Tensor | None,
    block_table: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """q `[B, T, Hq, D]` float32 over a float32 contiguous cache."""
    if block_table is not None:
        return None
    plain = _cache_is_plain(k_cache) and _cache_is_plain(v_cache)
    same = k_cache.stride(0) == v_cache.stride(0)
    if not (plain and same) or q.dtype is not torch.float32:
        return None
    q, lengths, num_rows = q.contiguous(), lengths.contiguous(), num_rows.contiguous()
    ancestry = None if ancestry is None else ancestry.contiguous()
    batch, rows, heads, head_size = q.shape
    out = torch.empty_like(q)
    _C.tree_attention(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride(0),
        lengths.data_ptr(), num_rows.data_ptr(), _address(ancestry), window or 0, scale, batch,
        rows, heads, k_cache.shape[2], head_size, k_cache.shape[1], out.data_ptr(),
    )  # fmt: skip
    return out


def exit_topk_cpu(
    hidden: Tensor, lm_head: Tensor, k: int, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """hidden `[R, H]` float32 over a float32 or bfloat16 head."""
    x = hidden if norm_weight is None else rms_norm_cpu(hidden, norm_weight, eps)
    logits = None if x is None else linear_cpu(x, lm_head, None)
    if logits is None:
        return None
    rows, vocab = logits.shape
    values = torch.empty(rows, k, dtype=torch.float32)
    ids = torch.empty(rows, k, dtype=torch.int32)
    logsumexp = torch.empty(rows, dtype=torch.float32)
    _C.topk_logsumexp(
        logits.data_ptr(), rows, vocab, k, values.data_ptr(), ids.data_ptr(), logsumexp.data_ptr()
    )
    return values, ids, logsumexp


def sample_draft_cpu(
    values: Tensor,
    ids: Tensor,
    temperature: Tensor,
    law: Tensor,
    n: int,
    seed: Tensor,
    position: Tensor,
    base: Tensor,
    parent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The dtypes of the public function, k at most 64."""
    rows, k = values.shape
    values, ids = values.contiguous(), ids.contiguous()
    temperature, law, seed = temperature.contiguous(), law.contiguous(), seed.contiguous()
    position, base = position.contiguous(), base.contiguous()
    parent = None if parent is None else parent.contiguous()
    child_ids = torch.empty(rows, n, dtype=torch.int32)
    probs = torch.empty(rows, k, dtype=torch.float32)
    _C.sample_draft(
        values.data_ptr(), ids.data_ptr(), temperature.data_ptr(), law.data_ptr(),
        seed.data_ptr(), position.data_ptr(), base.data_ptr(), _address(parent), rows, k, n,
        child_ids.data_ptr(), probs.data_ptr(),
    )  # fmt: skip
    return child_ids, probs


def verify_linear_cpu(
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
    *rest: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Float32 logits, sparse q and no block rows; the rest by name in `eesd/verify.h`."""
    if target_logits.dtype is not torch.float32 or q_ids is None or q_probs is None:
        return None
    if bool((law == Law.BLOCK).any()):
        return None
    filters = (  # None: off in every sequence
        torch.zeros_like(law) if top_k is None else top_k,
        torch.ones_like(temperature) if top_p is None else top_p,
        torch.zeros_like(temperature) if min_p is None else min_p,
    )
    given = (target_logits, draft_ids, draft_length, q_ids, q_probs, law, temperature, *filters,
             *rest)  # fmt: skip
    tensors = [t.contiguous() for t in given]  # kept: their addresses are used below
    batch, width, vocab = target_logits.shape
    num_accepted = torch.empty(batch, dtype=torch.int32)
    token_ids = torch.empty(batch, width, dtype=torch.int32)
    status = torch.empty(batch, dtype=torch.int32)
    sizes = (batch, width - 1, vocab, q_ids.shape[2])
    results = (num_accepted, token_ids, status)
    _C.verify_linear(*[*map(_address, tensors), *sizes, *map(_address, results)])
    return num_accepted, token_ids, status
