"""The binding over raw addresses; contracts stand in csrc/include/eesd.

`stream`: None takes host addresses, the address of a CUDA stream device ones.
"""

with_cuda: bool

def philox_words(
    seed: int, position: int, base: int, purpose: int, rows: int, n: int, out: int,
    *, ids: int = 0, parent: int = 0, stream: int | None = None,
) -> None: ...
def sample_beta(
    alpha: int, beta: int, seed: int, position: int, n: int, buckets: int, out: int,
    *, status: int = 0, stream: int | None = None,
) -> None: ...
def thompson_draft_length(
    alpha: int, beta: int, cap: int, rule: int, costs: int, seed: int, position: int, batch: int,
    buckets: int, num_costs: int, length: int, credit: int, stream: int | None, /,
) -> None: ...
def thompson_look(
    alpha: int, beta: int, cap: int, costs: int, exit_cost: float, seed: int, position: int,
    top_prob: int, batch: int, buckets: int, num_costs: int, step: int, length: int, bucket: int,
    run: int, looking: int, credit: int, stream: int | None, /,
) -> None: ...
def thompson_update(
    alpha: int, beta: int, prior_alpha: int, prior_beta: int, drafted: int, accepted: int,
    bucket: int, batch: int, buckets: int, max_draft: int, discount: float, credit: int,
    token_credit: float, credit_limit: float, stream: int | None, /,
) -> None: ...
def linear(
    x: int, weight: int, out: int, rows: int, in_features: int, out_features: int,
    *, bf16: bool, residual: int = 0, x_stride: int = 0, out_stride: int = 0,
    residual_stride: int = 0,
) -> None: ...
def rms_norm(
    x: int, weight: int, bf16: bool, eps: float, rows: int, size: int, out: int, /
) -> None: ...
def swiglu(gate_up: int, rows: int, size: int, out: int, /) -> None: ...
def rope_cache_write(
    qkv: int, cos: int, sin: int, k_cache: int, v_cache: int, batch_stride: int, lengths: int,
    num_rows: int, depth: int, batch: int, rows: int, heads: int, kv_heads: int, head_size: int,
    slots: int, positions: int, q_out: int, /,
) -> None: ...
def tree_attention(
    q: int, k_cache: int, v_cache: int, batch_stride: int, lengths: int, num_rows: int,
    ancestry: int, window: int, scale: float, batch: int, rows: int, heads: int,
    kv_heads: int, head_size: int, slots: int, out: int, /,
) -> None: ...
def topk_logsumexp(
    logits: int, rows: int, vocab: int, k: int, values: int, ids: int, logsumexp: int, /
) -> None: ...
def sample_draft(
    values: int, ids: int, temperature: int, law: int, seed: int, position: int, base: int,
    parent: int, rows: int, k: int, n: int, child_ids: int, probs: int, /,
) -> None: ...
def verify_linear(
    target_logits: int, draft_ids: int, draft_length: int, q_ids: int, q_probs: int, law: int,
    temperature: int, top_k: int, top_p: int, min_p: int, seed: int, position: int, base: int,
    batch: int, drafts: int, vocab: int, k: int, num_accepted: int, token_ids: int, status: int,
    /,
) -> None: ...
def set_num_threads(count: int) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def version() -> str: ...
