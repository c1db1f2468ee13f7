"""Both verifiers over the forms of q, the laws by row, and each other: token for token."""

from typing import Any

import pytest
import torch
from drafted import as_chain, dense, linear_drafts

import eesd_kernels as ek
from eesd_kernels import Law, reference

ALL = list(Law)
NO_Q = [Law.DETERMINISTIC, Law.COUPLED]


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_q(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "q_ids": None, "q_probs": None}


@pytest.mark.parametrize("form", [dict, dense, without_q])
@pytest.mark.parametrize(
    ("vocab", "k", "drafts"), [(37, 8, 3), (11, 11, 2), (101, 1, 1), (7, 3, 0)]
)
def test_a_chain_as_a_tree_is_the_linear_draft(form: Any, vocab: int, k: int, drafts: int):
    laws = NO_Q if form is without_q else [Law.SAMPLED, *NO_Q]
    if drafts == 0:
        arguments = linear_drafts(60, 1, vocab, k, laws)
        arguments["draft_length"].zero_()
        for name in ("draft_ids", "q_ids", "q_probs"):
            arguments[name] = arguments[name][:, :0]
        arguments["target_logits"] = arguments["target_logits"][:, :1]
    else:
        arguments = linear_drafts(60, drafts, vocab, k, laws)
    arguments = form(arguments)
    accepted, tokens, status = ek.verify_linear(**arguments)
    got, path, ids, bad = ek.verify_tree(**as_chain(arguments))
    assert equal((accepted, tokens, status), (got, ids, bad))
    step = torch.arange(drafts + 1, dtype=torch.int32)
    assert torch.equal(path, torch.where(step <= got[:, None], step, -1))
    assert drafts == 0 or 0 < int(accepted.sum()) < int(arguments["draft_length"].sum())


def test_dense_and_sparse_laws_are_one():
    arguments = linear_drafts(120, 3, 41, 9, ALL)
    assert equal(ek.verify_linear(**arguments), ek.verify_linear(**dense(arguments)))
    arguments["law"][arguments["law"] == Law.BLOCK] = Law.SAMPLED
    chain = as_chain(arguments)
    assert equal(ek.verify_tree(**chain), ek.verify_tree(**as_chain(dense(arguments))))


def test_a_fixed_choice_needs_no_q():
    arguments = linear_drafts(120, 3, 41, 9, NO_Q)
    assert equal(ek.verify_linear(**arguments), ek.verify_linear(**without_q(arguments)))


def test_each_row_goes_by_its_own_law():
    """A batch of all laws equals its rows alone: C++ rows beside rows of the reference."""
    arguments = linear_drafts(80, 3, 29, 6, ALL)
    together = ek.verify_linear(**arguments)
    for law in ALL:
        rows = (arguments["law"] == law).nonzero()[:, 0]
        alone = ek.verify_linear(**{name: value[rows] for name, value in arguments.items()})
        assert equal(alone, tuple(t[rows] for t in together))


def test_a_block_of_one_is_the_sampled_rule():
    arguments = linear_drafts(200, 1, 23, 7, [Law.BLOCK])
    block = ek.verify_linear(**arguments)
    one_by_one = {**arguments, "law": torch.full_like(arguments["law"], int(Law.SAMPLED))}
    assert equal(block, ek.verify_linear(**one_by_one))


def test_a_block_accepts_more_and_its_tree_is_the_sampled_rule():
    arguments = linear_drafts(200, 3, 23, 7, [Law.BLOCK])
    arguments["temperature"].clamp_(min=0.4)
    sampled = {**arguments, "law": torch.full_like(arguments["law"], int(Law.SAMPLED))}
    accepted = ek.verify_linear(**arguments)[0]
    assert int(accepted.sum()) > int(ek.verify_linear(**sampled)[0].sum())
    assert equal(ek.verify_tree(**as_chain(arguments)), ek.verify_tree(**as_chain(sampled)))


@pytest.mark.parametrize("op", ["verify_linear", "verify_tree"])
@pytest.mark.parametrize("form", [dict, dense, without_q])
def test_opcheck_of_each_form(op: str, form: Any):
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    arguments = form(linear_drafts(4, 2, 13, 3, NO_Q if form is without_q else ALL))
    arguments = arguments if op == "verify_linear" else as_chain(arguments)
    function = getattr(torch.ops.eesd, op).default
    values = [arguments[a.name] for a in function._schema.arguments]
    torch.library.opcheck(function, values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_by_the_reference(dtype: torch.dtype):
    arguments = linear_drafts(20, 2, 31, 5, ALL)
    arguments["target_logits"] = arguments["target_logits"].to(dtype)
    assert equal(ek.verify_linear(**arguments), reference.verify_linear(**arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_probs": None}, "q_probs: expected a tensor beside q_ids, got None"),
        ({"q_ids": None}, r"q_probs: expected shape \[B, [2T], 13\]"),
        ({"q_ids": None, "q_probs": None}, "q_probs: expected the draft law for rows of law SAMP"),
        ({"law": torch.full((4,), 4, dtype=torch.int32)}, "law: expected 0 to 3, got"),
        ({"q_ids": 13}, "q_ids: expected ids below V = 13"),
    ],
)
def test_says_what_is_wrong_with_the_law(changes: dict[str, Any], message: str):
    arguments = linear_drafts(4, 2, 13, 3, ALL)
    if changes.get("q_ids") == 13:
        changes = {"q_ids": torch.full_like(arguments["q_ids"], 13)}
    arguments.update(changes)
    with pytest.raises(ValueError, match=f"verify_linear: {message}"):
        ek.verify_linear(**arguments)
    with pytest.raises(ValueError, match=f"verify_tree: {message}"):
        ek.verify_tree(**as_chain(arguments))
