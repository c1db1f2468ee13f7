"""exit_topk and sample_draft: selection, ties, bad rows, laws, and agreement over many rows."""

import pytest
import torch
from scipy import stats

import eesd_kernels as ek
from eesd_kernels import Law, reference


def draw(values: torch.Tensor, n: int, law: Law = Law.SAMPLED, temperature: float = 1.0):
    """n children of every row, with its own seed each."""
    rows = values.shape[0]
    ids = torch.arange(values.shape[1], dtype=torch.int32).expand(rows, -1).contiguous()
    place = torch.full((rows,), 5, dtype=torch.int32)
    return ek.sample_draft(
        values, ids, torch.full((rows,), temperature), torch.full((rows,), int(law)).int(), n,
        torch.arange(rows), place, place - 1,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (7, 7), (101, 1), (101, 64), (4099, 8)])
def test_topk_and_normaliser(vocab: int, k: int, dtype: torch.dtype):
    torch.manual_seed(vocab)
    hidden, head = torch.randn(3, 16).to(dtype), torch.randn(vocab, 16).to(dtype)
    values, ids, lse = ek.exit_topk(hidden, head, k)
    logits = hidden.double() @ head.double().T
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=tolerance, rtol=0)
    torch.testing.assert_close(
        values.double(), logits.topk(k).values, atol=tolerance, rtol=tolerance
    )
    if dtype is not torch.bfloat16:
        assert torch.equal(ids.long(), logits.topk(k).indices)


def test_ties_go_to_the_lower_id():
    head = torch.ones(9, 4)
    head[3] = 2.0
    _, ids, _ = ek.exit_topk(torch.ones(1, 4), head, 4)
    assert ids.tolist() == [[3, 0, 1, 2]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_touches_no_other(bad: float):
    hidden = torch.ones(3, 4)
    hidden[1, 2] = bad
    values, ids, lse = ek.exit_topk(hidden, torch.randn(9, 4).abs(), 3)
    assert ids[1].tolist() == [-1, -1, -1]
    assert values[1].isnan().all()
    assert lse[1].isnan()
    assert (ids[[0, 2]] >= 0).all()
    children, probs = draw(values, 2)
    assert children[1].tolist() == [-1, -1]
    assert probs[1].sum() == 0
    assert (children[[0, 2]] >= 0).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_rows_are_the_same_alone_and_together(rows: int):
    torch.manual_seed(1)
    hidden, head = torch.randn(40, 48), torch.randn(517, 48).to(torch.bfloat16)
    together = ek.exit_topk(hidden, head, 5)
    alone = ek.exit_topk(hidden[:rows].flip(0), head, 5)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.flip(0), b[:rows])


def test_q_is_the_law_of_the_first_child():
    values = torch.tensor([1.5, 1.0, 0.0, -0.5, -2.0])
    rows = 20_000
    children, probs = draw(values.expand(rows, -1), 1, temperature=0.8)
    expected = (values.double() / 0.8).softmax(-1)
    torch.testing.assert_close(probs[0].double(), expected, atol=1e-7, rtol=0)
    counts = torch.bincount(children[:, 0].long(), minlength=5)
    assert stats.chisquare(counts.numpy(), (expected * rows).numpy()).pvalue > 1e-3


def test_two_children_are_drawn_without_replacement():
    values = torch.tensor([1.0, 0.5, 0.0, -1.0])
    rows = 30_000
    children, _ = draw(values.expand(rows, -1), 2)
    q = values.double().softmax(-1)
    expected = q[:, None] * q / (1 - q)[:, None]
    expected.fill_diagonal_(0)
    pairs = torch.bincount((children[:, 0] * 4 + children[:, 1]).long(), minlength=16)
    off = ~torch.eye(4, dtype=torch.bool).flatten()
    assert pairs[~off].sum() == 0
    test = stats.chisquare(pairs[off].numpy(), (expected.flatten()[off] * rows).numpy())
    assert test.pvalue > 1e-3


@pytest.mark.parametrize(("law", "temperature"), [(Law.DETERMINISTIC, 1.0), (Law.SAMPLED, 0.0)])
def test_the_n_best_where_nothing_is_drawn(law: Law, temperature: float):
    values = torch.tensor([[0.0, 3.0, 3.0, -1.0]]).expand(50, -1)
    children, _ = draw(values, 3, law, temperature)
    assert children.tolist() == [[1, 2, 0]] * 50


def test_fewer_candidates_than_children():
    values = torch.tensor([[2.0, -torch.inf, -torch.inf]])
    assert draw(values, 3)[0].tolist() == [[0, -1, -1]]


def test_coupled_children_ignore_round_base_and_parent():
    values, place = torch.randn(64, 9), torch.full((64,), 5, dtype=torch.int32)
    ids = torch.arange(9, dtype=torch.int32).expand(64, -1).contiguous()
    law = torch.full((64,), int(Law.COUPLED), dtype=torch.int32)
    common = (values, ids, torch.ones(64), law, 1, torch.arange(64), place)
    one = ek.sample_draft(*common, place - 1)[0]
    assert torch.equal(one, ek.sample_draft(*common, place - 3, parent=place)[0])
    sampled = torch.zeros_like(law)
    common = (values, ids, torch.ones(64), sampled, 1, torch.arange(64), place)
    other = ek.sample_draft(*common, place - 1)[0]
    assert not torch.equal(other, ek.sample_draft(*common, place - 3)[0])
    assert not torch.equal(other, ek.sample_draft(*common, place - 1, parent=place)[0])


def test_many_rows_equal_the_reference():
    """Ids by torch.equal; the margin of the float64 scores is far above its rounding here."""
    torch.manual_seed(7)
    rows, k, drafts, vocab = 300, 12, 3, 37
    i32 = torch.int32
    law = torch.tensor([Law.SAMPLED, Law.DETERMINISTIC, Law.COUPLED], dtype=i32).repeat(rows // 3)
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0]).repeat(rows // 4)
    seed, place = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(1, 9999, (rows,)).to(i32)
    logits = torch.randn(rows, drafts + 1, vocab) * 2
    q_values, q_ids = (logits[:, :drafts] + torch.randn(rows, drafts, vocab)).topk(k)
    q_ids = q_ids.to(i32)
    children, probs = [], []
    for j in range(drafts):
        arguments = (
            q_values[:, j], q_ids[:, j], temperature, law, 2, seed, place + j + 1, place,
            place % 7,
        )  # fmt: skip
        got = ek.sample_draft(*arguments[:-1], parent=arguments[-1])
        want = reference.sample_draft(*arguments)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-9)
        children.append(got[0][:, 0])
        probs.append(got[1])
    arguments = (
        logits, torch.stack(children, 1), torch.randint(0, drafts + 1, (rows,)).to(i32), q_ids,
        torch.stack(probs, 1), law, temperature, torch.randint(0, 20, (rows,)).to(i32),
        torch.rand(rows) * 0.6 + 0.4, torch.rand(rows) * 0.1, seed, place, place,
    )  # fmt: skip
    for a, b in zip(ek.verify_linear(*arguments), reference.verify_linear(*arguments), strict=True):
        assert torch.equal(a, b)


def test_ancestry_above_a_row_is_not_looked_at():
    """All 64 bits set must neither write past a buffer nor show a node its descendants."""
    torch.manual_seed(0)
    q, cache = torch.randn(1, 64, 2, 16), torch.randn(1, 80, 1, 16)
    lengths, rows = torch.zeros(1, dtype=torch.int32), torch.full((1,), 64, dtype=torch.int32)
    every = torch.full((1, 64), -1, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        arguments = (q.to(dtype), cache.to(dtype), cache.to(dtype), lengths, rows)
        tree = ek.tree_attention(*arguments, ancestry=every)
        torch.testing.assert_close(tree, ek.tree_attention(*arguments))
