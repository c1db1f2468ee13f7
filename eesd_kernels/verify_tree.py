"""Check a tree of drafts against the target's logits: the accepted path and one more token.

A walk from the root, at each node over its children in the order drawn, then one draw where it
stops; the equations stand in `reference/verify_tree.py`. Text that comes out has exactly the
target's law, whatever the tree. The reference reads the logits rows of the path alone; the kernels
read each live row once, `2 n V` bytes in bfloat16 for n nodes, and that bounds them. Draft laws are
sparse (`q_ids`, `q_probs` from `sample_draft`) or absent; dense ones, float64 logits and trees of
more than 64 nodes go through the reference on any device. It prunes and re-orders nothing.
"""

import torch
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels._checks import FLOATING, Checks
from eesd_kernels._library import register, triton_op
from eesd_kernels.verify_linear import check_sampling


def _fake(
    target_logits: Tensor, node_ids: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, width, _vocab = target_logits.shape
    return (
        node_ids.new_empty(batch),
        node_ids.new_empty(batch, width),
        node_ids.new_empty(batch, width),
        node_ids.new_empty(batch),
    )


verify_tree_op = register(
    "verify_tree(Tensor target_logits, Tensor node_ids, Tensor parent, Tensor num_nodes,"
    " Tensor? q_ids, Tensor? q_probs, Tensor law, Tensor temperature, Tensor? top_k,"
    " Tensor? top_p, Tensor? min_p, Tensor seed, Tensor position, Tensor base)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.verify_tree,
    cuda=triton_op("verify_tree", reference.verify_tree),
    fake=_fake,
)


def verify_tree(
    target_logits: Tensor,
    node_ids: Tensor,
    parent: Tensor,
    num_nodes: Tensor,
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
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Verify trees of up to T nodes, the root among them.

    Args:
        target_logits: `[B, T, V]` floating; row i is the target's law of the token after node i.
        node_ids: `[B, T]` int32, the nodes' tokens; the root's is not read.
        parent: `[B, T]` int32: -1 for the root, node 0; else an earlier node. Siblings stand in
            ascending node index, the order drawn.
        num_nodes: `[B]` int32, 0 to T: the rest is padding; 0 sits the round out.
        q_ids, q_probs: row i is the law that drew the children of node i: sparse (`[B, T, k]`
            int32 and float32, from `sample_draft`, ids distinct or -1), dense (None and
            `[B, T, V]`), or both None where no row's law is `SAMPLED` or `BLOCK`.
        law: `[B]` int32, see `Law`; `BLOCK`, linear only, goes by the rule of `SAMPLED`.
        temperature: `[B]` float32; 0 is greedy.
        top_k: `[B]` int32, 0 is off. top_p: `[B]` float32, 1 is off. min_p: `[B]` float32, 0 is
            off. Ties at a threshold are kept. None: off in every sequence; where all three are, no
            kernel looks for thresholds.
        seed: `[B]` int64. position, base: `[B]` int32, place of the root, round base.
        out: the four results, contiguous: written and returned, nothing is allocated but scratch.

    Returns:
        num_accepted int32 `[B]`; accepted node path int32 `[B, T]`: the root's 0, then the nodes
        in order of depth, then -1; token ids int32 `[B, T]`: accepted tokens, then one more,
        then -1; status int32 `[B]`, 1 where the walk met a row with NaN or +inf or without a
        finite logit (then 0 accepted, path and ids -1).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype, device or range.
    """
    check = Checks("verify_tree")
    check.tensor("target_logits", target_logits, ("B", "T", "V"), FLOATING)
    nodes, vocab = target_logits.shape[1:]
    check.tensor("node_ids", node_ids, ("B", "T"), torch.int32)
    check.tensor("parent", parent, ("B", "T"), torch.int32)
    check.tensor("num_nodes", num_nodes, ("B",), torch.int32)
    check_sampling(
        check, "T", vocab, q_ids, q_probs, law, temperature, top_k, top_p, min_p, seed, position,
        base,
    )  # fmt: skip
    if target_logits.device.type == "cpu":  # values are free to look at there
        if bool(((num_nodes < 0) | (num_nodes > nodes)).any()):
            raise ValueError(
                f"verify_tree: num_nodes: expected 0 to {nodes}, got {num_nodes.tolist()}"
            )
        index = torch.arange(nodes, dtype=torch.int32)
        live = index < num_nodes[:, None]
        if bool((live & ((parent >= index) | ((parent < 0) != (index == 0)))).any()):
            raise ValueError(
                "verify_tree: parent: expected -1 for node 0 and an earlier node for the others, "
                f"got {parent.tolist()}"
            )
        if bool((live & (node_ids >= vocab) & (index > 0)).any()):
            raise ValueError(f"verify_tree: node_ids: expected ids below V = {vocab}")
    arguments = (
        target_logits, node_ids, parent, num_nodes, q_ids, q_probs, law,
        temperature, top_k, top_p, min_p, seed, position, base,
    )  # fmt: skip
    if out is None:
        return verify_tree_op(*arguments)
    each, path = (("B",), torch.int32), (("B", "T"), torch.int32)
    outs = check.outputs(out, (each, path, path, each))
    torch.ops.eesd.verify_tree.out(*arguments, **outs)
    return out
