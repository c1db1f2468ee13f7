"""verify_linear: its law by chi-square on narrow vocabularies, and its edges."""

from typing import Any

import pytest
import torch

import eesd_kernels as ek
from bench.joint_tables import World, chi_square, linear_counts
from eesd_kernels import Law

VOCAB = 5


def _i32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(logits: torch.Tensor, draft: list[int], **changes: Any) -> dict[str, Any]:
    """One sequence; q uniform over the vocabulary unless given."""
    drafts, vocab = len(draft), logits.shape[-1]
    base = {
        "target_logits": logits[None],
        "draft_ids": _i32([draft]).view(1, drafts),
        "draft_length": _i32([drafts]),
        "q_ids": torch.arange(vocab, dtype=torch.int32).expand(1, drafts, vocab).contiguous(),
        "q_probs": torch.full((1, drafts, vocab), 1 / vocab),
        "law": _i32([Law.SAMPLED]),
        "temperature": torch.ones(1),
        "top_k": _i32([0]),
        "top_p": torch.ones(1),
        "min_p": torch.zeros(1),
        "seed": torch.tensor([7]),
        "position": _i32([10]),
        "base": _i32([10]),
    }
    return {**base, **changes}


def one_hot(*tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    logits = torch.full((len(tokens), vocab), -torch.inf)
    for row, token in enumerate(tokens):
        logits[row, token] = 0.0
    return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
def test_one_hot_targets(temperature: float, law: Law):
    """All accepted, some, none: where p is one-hot the outcome has no randomness left."""
    common = {"temperature": torch.tensor([temperature]), "law": _i32([law])}
    for draft, accepted, tokens in (
        ([1, 2, 3], 3, [1, 2, 3, 4]),
        ([1, 2, 0], 2, [1, 2, 3, -1]),
        ([0, 2, 3], 0, [1, -1, -1, -1]),
    ):
        got, ids, status = ek.verify_linear(**arguments(one_hot(1, 2, 3, 4), draft, **common))
        assert (got.tolist(), ids.tolist(), status.tolist()) == ([accepted], [tokens], [0])


def test_no_draft_is_a_plain_draw():
    got, ids, status = ek.verify_linear(**arguments(one_hot(3), []))
    assert (got.tolist(), ids.tolist(), status.tolist()) == ([0], [[3]], [0])


def test_empty_batch():
    full = arguments(one_hot(1, 2), [1])
    empty = {name: value[:0] for name, value in full.items()}
    assert [t.shape[0] for t in ek.verify_linear(**empty)] == [0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all-inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_row_sets_its_own_status(bad: float, temperature: float):
    good = arguments(one_hot(1, 2), [1], temperature=torch.tensor([temperature]))
    batch = {name: torch.cat([value] * 3) for name, value in good.items()}
    batch["target_logits"][1, 1] = bad
    got, ids, status = ek.verify_linear(**batch)
    assert status.tolist() == [0, 1, 0]
    assert got.tolist() == [1, 0, 1]
    assert ids.tolist() == [[1, 2], [-1, -1], [1, 2]]


def test_a_bad_row_behind_the_walk_is_never_met():
    logits = one_hot(1, 2, 3)
    logits[1:] = torch.nan
    got, ids, status = ek.verify_linear(**arguments(logits, [0, 0]))
    assert (got.tolist(), ids.tolist(), status.tolist()) == ([0], [[1, -1, -1]], [0])


def test_draft_beyond_its_length_is_ignored():
    changes = {"draft_length": _i32([1])}
    got, ids, _ = ek.verify_linear(**arguments(one_hot(1, 2, 3), [1, 2], **changes))
    assert (got.tolist(), ids.tolist()) == ([1], [[1, 2, -1]])


def test_ties_go_to_the_lower_id():
    changes = {"temperature": torch.zeros(1)}
    _, ids, _ = ek.verify_linear(**arguments(torch.zeros(1, VOCAB), [], **changes))
    assert ids.tolist() == [[0]]


def test_equal_laws_accept_nearly_everything():
    """With p = q only the rounding of q to float32 can reject: u is below 1 and the test strict."""
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    q = logits[:2].double().softmax(-1).float()[None]
    accepted = 0
    for seed in range(200):
        changes = {"q_probs": q, "seed": torch.tensor([seed])}
        got, _, _ = ek.verify_linear(**arguments(logits, [seed % VOCAB, 2], **changes))
        accepted += got.item()
    assert accepted >= 399


def test_filters_keep_ties_and_follow_their_order():
    """A uniform law has nothing but ties, so no threshold may take anything from it."""
    seen = set()
    for seed in range(60):
        changes = {
            "seed": torch.tensor([seed]),
            "top_k": _i32([1]),
            "top_p": torch.tensor([0.1]),
            "min_p": torch.tensor([0.9]),
        }
        _, ids, _ = ek.verify_linear(**arguments(torch.zeros(1, VOCAB), [], **changes))
        seen.add(ids.item())
    assert seen == set(range(VOCAB))


def test_filtered_ids_never_come():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    for changes, allowed in (
        ({"top_k": _i32([2])}, {0, 1}),
        ({"top_p": torch.tensor([0.7])}, {0, 1}),  # 0.64, 0.24, ...
        ({"min_p": torch.tensor([0.3])}, {0, 1}),  # 1, 0.37, 0.14, ...
    ):
        seen = {
            ek.verify_linear(**arguments(logits, [], seed=torch.tensor([s]), **changes))[1].item()
            for s in range(80)
        }
        assert seen == allowed


def joint_pvalue(drawn: Law, rule: Law, *, round_base: bool = True) -> float:
    world = World(VOCAB, 3)
    counts = linear_counts(world, drawn, rule, 30_000, round_base=round_base)
    return chi_square(counts, world.law()).p_value


@pytest.mark.parametrize("law", [Law.SAMPLED, Law.DETERMINISTIC, Law.COUPLED])
def test_joint_law_of_two_tokens(law: Law):
    assert joint_pvalue(law, law) > 1e-3


def test_noise_shared_by_draft_and_target_would_show():
    """The twin: drafts that raced with the target's own noise, under the sampled rule."""
    assert joint_pvalue(Law.COUPLED, Law.SAMPLED, round_base=False) < 1e-3


def test_a_law_under_another_laws_rule_would_show():
    """A fixed choice is not a draw from q."""
    assert joint_pvalue(Law.DETERMINISTIC, Law.SAMPLED) < 1e-3
