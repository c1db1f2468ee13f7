"""verify_tree: paths through a fixed tree, and its edges."""

from typing import Any

import pytest
import torch
from drafted import i32, largest, one_hot, settings

import eesd_kernels as ek
from eesd_kernels import Law, reference

VOCAB = 6
#         0
#      1     2        tokens 1, 2
#     3 4    5        tokens 3, 4, 3
#       6             token 5
PARENT, TOKENS = [-1, 0, 0, 1, 1, 2, 4], [-1, 1, 2, 3, 4, 3, 5]
LAWS = [Law.SAMPLED, Law.DETERMINISTIC, Law.COUPLED]


def arguments(logits: torch.Tensor, **changes: Any) -> dict[str, Any]:
    """One sequence and the tree above; q uniform over the vocabulary unless given."""
    nodes, vocab = logits.shape
    return {
        "target_logits": logits[None],
        "node_ids": i32([TOKENS])[:, :nodes],
        "parent": i32([PARENT])[:, :nodes],
        "num_nodes": i32([nodes]),
        **settings(nodes, vocab, Law.SAMPLED),
        **changes,
    }


def listed(result: tuple[torch.Tensor, ...]) -> list[Any]:
    return [t.tolist()[0] for t in result]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
@pytest.mark.parametrize(
    ("after", "path", "tokens"),
    [
        ((0, 0, 0, 0, 0, 0, 0), [0], [0]),  # none accepted
        ((1, 0, 0, 0, 0, 0, 0), [0, 1], [1, 0]),
        ((2, 5, 0, 0, 0, 0, 0), [0, 2], [2, 0]),
        ((2, 0, 3, 0, 0, 1, 0), [0, 2, 5], [2, 3, 1]),  # a leaf's bonus
        ((1, 4, 0, 0, 5, 0, 2), [0, 1, 4, 6], [1, 4, 5, 2]),  # all the way down
        ((1, 2, 3, 0, 0, 0, 0), [0, 1], [1, 2]),  # 2 is the uncle's token
    ],
)
def test_one_hot_targets(
    temperature: float, law: Law, after: tuple[int, ...], path: list[int], tokens: list[int]
):
    """Where p is one-hot the outcome has no randomness left, whatever the law."""
    changes = {"temperature": torch.tensor([temperature]), "law": i32([law])}
    got = listed(ek.verify_tree(**arguments(one_hot(*after), **changes)))
    assert got[0] == len(path) - 1
    assert got[1] == path + [-1] * (7 - len(path))
    assert got[2] == tokens + [-1] * (7 - len(tokens))
    assert got[3] == 0


def test_a_root_alone_is_a_plain_draw():
    assert listed(ek.verify_tree(**arguments(one_hot(3)))) == [0, [0], [3], 0]


def test_nodes_beyond_their_number_are_padding():
    changes = {"num_nodes": i32([4]), "node_ids": i32([[-1, 1, 2, 3, 99, -5, 5]])}
    got = listed(ek.verify_tree(**arguments(one_hot(1, 4, 0, 0, 5, 0, 2), **changes)))
    assert got == [1, [0, 1] + [-1] * 5, [1, 4] + [-1] * 5, 0]


def test_no_nodes_sits_the_round_out():
    changes = {"num_nodes": i32([0]), "target_logits": torch.full((1, 7, VOCAB), torch.nan)}
    got = listed(ek.verify_tree(**arguments(one_hot(*[0] * 7), **changes)))
    assert got == [0, [-1] * 7, [-1] * 7, 0]


def test_empty_batch():
    full = arguments(one_hot(*[0] * 7))
    result = ek.verify_tree(**{name: value[:0] for name, value in full.items()})
    assert [tuple(t.shape) for t in result] == [(0,), (0, 7), (0, 7), (0,)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-inf"])
@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_counts_where_the_walk_meets_it(bad: float, law: Law, temperature: float):
    """Row 4 of every sequence is bad; the second never comes there, the third does."""
    row = arguments(one_hot(1, 3, 0, 2, 5, 0, 2), law=i32([law]))
    row["temperature"] = torch.tensor([temperature])
    batch = {name: torch.cat([value] * 3) for name, value in row.items()}
    batch["target_logits"][1:, 4] = bad
    batch["target_logits"][2, 1] = one_hot(4)[0]
    accepted, path, tokens, status = ek.verify_tree(**batch)
    assert status.tolist() == [0, 0, 1]
    assert accepted.tolist() == [2, 2, 0]
    assert path.tolist() == [[0, 1, 3] + [-1] * 4] * 2 + [[-1] * 7]
    assert tokens.tolist() == [[1, 3, 2] + [-1] * 4] * 2 + [[-1] * 7]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_second_copies_of_a_sibling_change_nothing(law: Law):
    """Nodes 3 and 4 repeat the tokens of 1 and 2: passed over, their subtrees never met."""
    torch.manual_seed(3)
    changes = {
        "node_ids": i32([[-1, 1, 2, 1, 2, 3, 3]]),
        "parent": i32([[-1, 0, 0, 0, 0, 1, 3]]),
        "law": i32([law]),
    }
    for seed in range(60):
        logits = torch.randn(7, VOCAB)
        changes["seed"] = torch.tensor([seed])
        got = listed(ek.verify_tree(**arguments(logits, **changes)))
        fewer = {
            "node_ids": i32([[-1, 1, 2, 3]]),
            "parent": i32([[-1, 0, 0, 1]]),
            "target_logits": logits[None, [0, 1, 2, 5]],
            "law": i32([law]),
            "seed": changes["seed"],
        }
        want = listed(ek.verify_tree(**arguments(logits[:4], **fewer)))
        assert got[0] == want[0]
        assert got[2][:4] == want[2]
        assert set(got[1]) <= {-1, 0, 1, 2, 5}


def test_children_that_cannot_have_been_drawn_are_passed_over():
    """Outside the law's ids, or -1: p stays whole, and nothing is accepted but what was drawn."""
    q_ids = torch.full((1, 7, VOCAB), -1, dtype=torch.int32)
    q_ids[0, :, 0] = 0
    for tokens in ([-1, 1, 2, 3, 4, 3, 5], [-1] * 7):
        changes = {"q_ids": q_ids, "node_ids": i32([tokens])}
        got = listed(ek.verify_tree(**arguments(one_hot(1, *[0] * 6), **changes)))
        assert got == [0, [0] + [-1] * 6, [1] + [-1] * 6, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0], ids=str)
def test_a_law_without_sense_leaves_the_target_its_own(value: float):
    q = torch.full((1, 7, VOCAB), value)
    got = listed(ek.verify_tree(**arguments(one_hot(3, *[0] * 6), q_probs=q)))
    assert got == [0, [0] + [-1] * 6, [3] + [-1] * 6, 0]


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.DETERMINISTIC], ids=lambda law: law.name)
def test_children_that_hold_all_of_p_leave_no_residual(law: Law):
    """With the largest uniform there is, one of them is accepted, so no empty residual is drawn."""

    for weights in ([1, 2], [1, 1], [1000, 1], [3, 7]):
        p = torch.tensor(weights, dtype=torch.float64)
        logits = torch.full((7, VOCAB), -torch.inf, dtype=torch.float64)
        logits[:, 1:3] = p.log()
        q = torch.zeros(1, 7, VOCAB)
        q[:, :, 1:3] = (p / p.sum()).float()
        values = arguments(logits, law=i32([law]), q_probs=q)
        accepted, _, tokens, _ = reference.verify_tree(**values, words=largest)
        assert accepted.item() >= 1
        assert tokens[0, 0].item() in (1, 2)


def test_a_wide_odd_vocabulary():
    torch.manual_seed(5)
    vocab, k = 32_003, 64
    logits = torch.randn(7, vocab) * 3
    q_values, q_ids = logits.topk(k)
    tokens = [-1, *(int(q_ids[parent, i % 2]) for i, parent in enumerate(PARENT[1:]))]
    changes = {
        "q_ids": q_ids.int()[None],
        "q_probs": q_values.softmax(-1)[None],
        "node_ids": i32([tokens]),
    }
    for law in LAWS:
        accepted, _, ids, status = ek.verify_tree(**arguments(logits, law=i32([law]), **changes))
        live = ids[0, : accepted.item() + 1]
        assert status.item() == 0
        assert ((live >= 0) & (live < vocab)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nodes": i32([8])}, "num_nodes: expected 0 to 7, got .8."),
        ({"num_nodes": i32([-1])}, "num_nodes: expected 0 to 7, got .-1."),
        ({"parent": i32([[0, 0, 0, 1, 1, 2, 4]])}, "parent: expected -1 for node 0 and an earl"),
        ({"parent": i32([[-1, 0, 0, 3, 1, 2, 4]])}, "parent: expected -1 for node 0 and an earl"),
        ({"parent": i32([[-1, 0, -1, 1, 1, 2, 4]])}, "parent: expected -1 for node 0 and an ea"),
        ({"node_ids": i32([[-1, 6, 2, 3, 4, 3, 5]])}, "node_ids: expected ids below V = 6"),
    ],
)
def test_says_what_is_wrong_with_the_tree(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"verify_tree: {message}"):
        ek.verify_tree(**arguments(one_hot(*[0] * 7), **changes))
