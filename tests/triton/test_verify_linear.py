"""verify_linear's kernels: the reference's ids wherever its calls were clear, and their law.

On a CPU the interpreter runs them, at some 50 ms a program: few sequences, many forms in each.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafted import dense, i32, linear_drafts, one_hot, settings
from margins import CLEAR, with_margins
from torch import Tensor

import eesd_kernels as ek
from bench.joint_tables import World, chi_square, linear_counts
from eesd_kernels import Law, reference
from eesd_kernels._cpu import philox_words_cpu
from eesd_kernels.triton import rows
from eesd_kernels.triton.verify_linear import verify_linear

# NaN and infinities, which numpy remarks on in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = list(Law)
NEVER, ALWAYS = 0, 1 << 60

Arguments = dict[str, Any]


def without_q(arguments: Arguments) -> Arguments:
    return {**arguments, "q_ids": None, "q_probs": None}


def unfiltered(arguments: Arguments) -> Arguments:
    return {**arguments, "top_k": None, "top_p": None, "min_p": None}


def run(arguments: Arguments) -> list[Tensor]:
    """The kernels' results, on the CPU; every output starts as a number that none may keep."""
    batch, width, _ = arguments["target_logits"].shape
    there = {k: v if v is None else v.to(DEVICE) for k, v in arguments.items()}
    out = tuple(
        torch.full(shape, 77, dtype=torch.int32, device=DEVICE)
        for shape in ((batch,), (batch, width), (batch,))
    )
    got = verify_linear(**there, out=out)
    assert got is not None
    assert all(a is b for a, b in zip(got, out, strict=True))
    return [t.cpu() for t in got]


def check(arguments: Arguments, unclear: int = 0) -> list[Tensor]:
    """The reference's ids where the closest call was clear; at most so many where it was not."""
    got = run(arguments)
    want, margin = with_margins(reference.verify_linear, arguments, words=philox_words_cpu)
    clear = margin > CLEAR
    assert int((~clear).sum()) <= unclear
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[clear], theirs[clear])
    return got


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("vocab", "k", "drafts", "batch", "block"),
    [
        (5, 3, 1, 8, 8), (17, 8, 5, 8, 16), (101, 1, 3, 4, 64), (101, 8, 0, 4, 128),
        (1000, 3, 1, 3, 1024), (17, 3, 2, 1, 4), (7, 3, 1, 0, 8), (101, 3, 2, 6, 16),
        (17, 3, 2, 17, 4),
    ],
)  # fmt: skip
def test_sparse_laws(
    split: Callable[[int], None], vocab: int, k: int, drafts: int, batch: int, block: int
) -> None:
    split(block)
    check(unfiltered(drafts_of(batch, drafts, vocab, k, ALL)))


def drafts_of(batch: int, drafts: int, vocab: int, k: int, laws: list[Law], seed: int = 0) -> Any:
    """`linear_drafts`, of no draft token and of no sequence too; rows of four laws, five heats."""
    arguments = linear_drafts(max(batch, 1), max(drafts, 1), vocab, k, laws, seed)
    if drafts == 0:
        arguments["draft_length"].zero_()
        arguments["target_logits"] = arguments["target_logits"][:, :1]
        for name in ("draft_ids", "q_ids", "q_probs"):
            arguments[name] = arguments[name][:, :0]
    return {name: value[:batch] for name, value in arguments.items()}


@pytest.mark.parametrize("form", [dense, without_q])
def test_other_forms_of_the_law(split: Callable[[int], None], form: Any) -> None:
    split(16)
    check(unfiltered(form(drafts_of(12, 3, 37, 8, ALL, seed=4))))


def test_dense_laws_without_a_draft() -> None:
    check(unfiltered(dense(drafts_of(3, 0, 17, 3, ALL))))


@pytest.mark.usefixtures("launches")
def test_filters_of_the_target(split: Callable[[int], None]) -> None:
    split(64)
    check(drafts_of(8, 2, 101, 8, ALL, seed=2))


def test_logits_of_other_dtypes_and_strides() -> None:
    arguments = unfiltered(drafts_of(4, 2, 37, 3, ALL, seed=3))
    want = run(arguments)
    logits = arguments["target_logits"]
    wide = torch.full((4, 4, 40), torch.nan)
    wide[:, 1:, :37] = logits
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (wide[:, 1:, :37], turned):
        got = run({**arguments, "target_logits": strided})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    check({**arguments, "target_logits": logits.half()})
    assert verify_linear(**{**arguments, "target_logits": logits.double()}) is None


def edge(logits: Tensor, draft: list[int], law: Law, **changes: Any) -> Arguments:
    """One sequence of a draft of two; q uniform over the vocabulary unless given."""
    return unfiltered({
        "target_logits": logits[None],
        "draft_ids": i32([draft]),
        "draft_length": i32([len(draft)]),
        **settings(2, 6, law),
        **changes,
    })  # fmt: skip


def edges() -> list[tuple[Arguments, list[Any]]]:
    """Outcomes that no noise can change: num_accepted, ids, status."""
    far = one_hot(1, 4, 2)
    far[far == 0] = -3e38  # far from everything but minus infinity
    nan, late = one_hot(1, 4, 2), one_hot(1, 2, 3)
    nan[0, 3], late[1:] = torch.nan, torch.nan
    plus, empty = one_hot(1, 4, 2), one_hot(1, 4, 2)
    plus[1, 5], empty[1] = torch.inf, -torch.inf
    alone = torch.full((1, 2, 6), -1, dtype=torch.int32)
    alone[..., 0] = 0
    copies = torch.tensor([1, 1, 4, 4, 2, 2], dtype=torch.int32).expand(1, 2, 6).contiguous()
    exact = torch.zeros(1, 2, 6)
    exact[0, 0, 1] = exact[0, 1, 4] = 1.0
    cases = []
    for law in ALL:
        cases += [
            (edge(one_hot(1, 4, 2), [1, 4], law), [2, [1, 4, 2], 0]),
            (edge(one_hot(1, 4, 2), [1, 0], law), [1, [1, 4, -1], 0]),
            (edge(one_hot(3, 4, 2), [0, 4], law), [0, [3, -1, -1], 0]),
            (edge(far, [1, 4], law, temperature=torch.tensor([1e-6])), [2, [1, 4, 2], 0]),
            (edge(far, [1, 5], law, temperature=torch.tensor([1e6])), [1, [1, 4, -1], 0]),
            (edge(nan, [1, 4], law), [0, [-1] * 3, 1]),
            (edge(late, [0, 0], law), [0, [1, -1, -1], 0]),  # the walk never meets it
            (edge(plus, [1, 4], law), [0, [-1] * 3, 1]),
            (edge(empty, [1, 4], law), [0, [-1] * 3, 1]),
            (edge(one_hot(3, 1, 2), [-1, 4], law), [0, [3, -1, -1], 0]),
            (edge(one_hot(3, 1, 2), [2**31 - 1, 4], law), [0, [3, -1, -1], 0]),
            (edge(one_hot(1, 4, 2), [1, 4], law, draft_length=i32([1])), [1, [1, 4, -1], 0]),
            (edge(one_hot(1, 4, 2), [1, 4], law, q_probs=exact), [2, [1, 4, 2], 0]),
        ]
    for law in (Law.SAMPLED, Law.BLOCK):
        q = {value: torch.full((1, 2, 6), value) for value in (torch.nan, torch.inf, 0.0)}
        cases += [
            # A token outside its law takes nothing from p: p is drawn from whole.
            (edge(one_hot(1, 2, 3), [1, 2], law, q_ids=alone), [0, [1, -1, -1], 0]),
            *((edge(one_hot(3, 1, 2), [2, 1], law, q_probs=w), [0, [3, -1, -1], 0])
              for w in q.values()),
            (edge(one_hot(1, 4, 2), [1, 4], law, q_ids=copies), [2, [1, 4, 2], 0]),
            (edge(one_hot(3, 4, 2), [1, 4], law, q_ids=copies), [0, [3, -1, -1], 0]),
        ]  # fmt: skip
    greedy = torch.zeros(1)
    cases += [
        (edge(torch.zeros(3, 6), [0, 0], Law.SAMPLED, temperature=greedy), [2, [0, 0, 0], 0]),
        (edge(nan, [1, 4], Law.SAMPLED, temperature=greedy), [0, [-1] * 3, 1]),
        # A block reads all its rows, since the last one may overrule the first.
        (edge(late, [1, 0], Law.BLOCK), [0, [-1] * 3, 1]),
    ]
    return cases


def stacked(arguments: list[Arguments]) -> Arguments:
    """One batch of sequences of the same shape."""
    return {
        name: None if value is None else torch.cat([one[name] for one in arguments])
        for name, value in arguments[0].items()
    }


@pytest.mark.usefixtures("launches")
def test_edges(split: Callable[[int], None]) -> None:
    split(4)
    cases = edges()
    if DEVICE == "cpu":  # half of them each way
        cases = cases[::2] if rows.FOLD_BELOW else cases[1::2]
    got = run(stacked([arguments for arguments, _ in cases]))
    for b, (_, want) in enumerate(cases):
        assert [t[b].tolist() for t in got] == want, f"case {b}"


@pytest.mark.skipif(DEVICE == "cuda", reason="holds records back in the interpreter")
def test_the_last_program_waits_for_the_others(
    split: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter they have all ended when it looks: a record is held back here."""
    split(4)
    monkeypatch.setattr(rows, "FOLD_BELOW", NEVER)
    arguments = unfiltered(drafts_of(6, 2, 17, 3, [Law.SAMPLED], seed=6))
    want, looks, inner = run(arguments), 0, rows._written

    def late(ptrs: object, others: Any, best: object) -> Any:
        nonlocal looks
        looks += 1
        records = inner(ptrs, others, best)
        if looks % 3:  # twice; on the third look it is there
            records.handle.data[looks % 3] = rows.EMPTY.value
        return records

    monkeypatch.setattr(rows, "_written", late)
    assert all(torch.equal(a, b) for a, b in zip(run(arguments), want, strict=True))
    raced = int((arguments["temperature"] > 0).sum())
    assert looks == 3 * raced > 0


def test_edges_of_dense_laws(split: Callable[[int], None]) -> None:
    split(4)
    cases = [(a, w) for a, w in edges() if a["q_ids"][0, 0].tolist() == list(range(6))][::3]
    got = run({**stacked([arguments for arguments, _ in cases]), "q_ids": None})
    for b, (_, want) in enumerate(cases):
        assert [t[b].tolist() for t in got] == want, f"case {b}"


def test_the_block_rule_reads_nothing_that_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product a_i that is 0 in float32 and not in float64, over memory that holds ones."""
    batch, drafts, vocab = 16, 4, 8
    logits = torch.zeros(batch, drafts + 1, vocab)
    logits[..., 0] = 6.0  # sure at this temperature
    each = torch.full((batch,), 10, dtype=torch.int32)
    given = {
        **edge(torch.zeros(2, vocab), [1], Law.BLOCK), "target_logits": logits, "q_ids": None,
        "q_probs": torch.full((batch, drafts, vocab), 1 / vocab),
        "draft_ids": i32([[1, 2, 3, 4]] * batch), "draft_length": torch.full_like(each, drafts),
        "law": torch.full_like(each, int(Law.BLOCK)), "temperature": torch.full((batch,), 0.1),
        "seed": torch.arange(batch), "position": each, "base": each,
    }  # fmt: skip
    inner = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: inner(*a, **k).fill_(1.0))
    accepted, *_ = run(given)
    assert not accepted.any()


def near_calls(law: Law, candidates: int, change: float, wanted: int) -> Arguments:
    """Seeds whose outcome another temperature, by so little, would change: on a border of the law.

    With the rule itself proven by enumeration, agreement on its borders is agreement in law.
    """
    torch.manual_seed(8)
    vocab, k, drafts = 5, 3, 2
    values, ids = (torch.randn(1, drafts, vocab) * 1.5).topk(k)
    logits = torch.randn(1, drafts + 1, vocab) * 1.5
    rows_ = torch.arange(candidates)
    place = torch.full((candidates,), 7, dtype=torch.int32)

    def full(value: float) -> Tensor:
        return torch.full((candidates,), value)

    drawn = [
        ek.sample_draft(
            values[:, j].expand(candidates, k), ids[:, j].int().expand(candidates, k), full(1.0),
            full(law).int(), 1, rows_, place + j + 1, place,
        )
        for j in range(drafts)
    ]  # fmt: skip
    arguments: Arguments = {
        "target_logits": logits.expand(candidates, -1, -1),
        "draft_ids": torch.stack([child[:, 0] for child, _ in drawn], 1),
        "draft_length": full(drafts).int(),
        "q_ids": ids.int().expand(candidates, -1, -1),
        "q_probs": torch.stack([q for _, q in drawn], 1),
        "law": full(law).int(),
        "temperature": full(1.0),
        "top_k": None, "top_p": None, "min_p": None,
        "seed": rows_, "position": place, "base": place,
    }  # fmt: skip
    cold, hot = (
        ek.verify_linear(**{**arguments, "temperature": full(t)}) for t in (1 - change, 1 + change)
    )
    tests = (cold[0] != hot[0]).nonzero()[:, 0]  # another number accepted
    races = ((cold[1] != hot[1]).any(1) & (cold[0] == hot[0])).nonzero()[:, 0]
    near = torch.cat((tests[:wanted], races[:wanted]))
    assert min(len(tests), len(races)) >= wanted
    return {k: v if v is None else v[near].contiguous() for k, v in arguments.items()}


@pytest.mark.usefixtures("launches")
def test_decides_as_the_reference_on_the_borders_of_its_decisions(
    split: Callable[[int], None],
) -> None:
    split(4)
    near = [
        near_calls(Law.SAMPLED, 200_000, 3e-4, 6), near_calls(Law.DETERMINISTIC, 200_000, 1e-3, 4),
        near_calls(Law.COUPLED, 60_000, 1e-3, 2), near_calls(Law.BLOCK, 1500, 1e-2, 2),
    ]  # fmt: skip
    check(stacked(near), unclear=3)


def test_public_function_writes_where_it_is_told() -> None:
    arguments = {
        k: v if v is None else v.to(DEVICE) for k, v in drafts_of(4, 2, 17, 3, ALL).items()
    }
    want = ek.verify_linear(**arguments)
    out = tuple(torch.full_like(t, 77) for t in want)
    got = ek.verify_linear(**arguments, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=r"verify_linear: out\[1\]: expected shape"):
        ek.verify_linear(**arguments, out=(out[0], out[0], out[2]))
    with pytest.raises(ValueError, match="verify_linear: out: expected 3 tensors, got 2"):
        ek.verify_linear(**arguments, out=out[:2])


def test_a_filter_that_is_none_is_off() -> None:
    arguments = drafts_of(20, 2, 17, 3, ALL)
    off = {"top_k": i32([0] * 20), "top_p": torch.ones(20), "min_p": torch.zeros(20)}
    want = ek.verify_linear(**{**arguments, **off})
    for none in ({"top_k": None}, {"top_p": None, "min_p": None}, dict.fromkeys(off)):
        got = ek.verify_linear(**{**arguments, **off, **none})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# On the GPU.


def wide_drafts(
    batch: int, drafts: int, vocab: int, k: int, dtype: torch.dtype, seed: int = 0
) -> Arguments:
    """Sparse drafts of all laws over a real model's vocabulary, lengths and heats by row."""
    arguments = unfiltered(drafts_of(batch, drafts, vocab, k, ALL, seed))
    return {**arguments, "target_logits": arguments["target_logits"].to(dtype)}


def on_gpu(arguments: Arguments) -> Arguments:
    return {k: v if v is None else v.cuda() for k, v in arguments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "drafts", "vocab", "k", "dtype"),
    [
        (1, 5, 32_000, 8, torch.bfloat16), (64, 5, 32_000, 8, torch.bfloat16),
        (8, 5, 128_256, 8, torch.bfloat16), (1, 1, 151_936, 64, torch.float16),
        (8, 16, 32_003, 64, torch.float32), (1, 16, 32_003, 64, torch.float32),
        (64, 0, 32_003, 8, torch.float16), (64, 1, 151_936, 8, torch.bfloat16),
    ],
)  # fmt: skip
def test_real_sizes(batch: int, drafts: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    check(wide_drafts(batch, drafts, vocab, k, dtype), unclear=1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [dense, without_q, dict], ids=["dense", "none", "filtered"])
def test_real_sizes_of_other_forms(form: Any) -> None:
    arguments = form(drafts_of(8, 5, 32_003, 8, ALL))
    check(arguments if form is dict else unfiltered(arguments), unclear=1)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_a_row_is_the_same_in_any_batch(vocab: int) -> None:
    """Alone it races in all its rows, among 64 only where it stops: the same ids."""
    arguments = on_gpu(wide_drafts(64, 5, vocab, 8, torch.bfloat16, seed=1))
    together = verify_linear(**arguments)
    assert together is not None
    for rows_ in ([0], [1], [2], [3], [63], list(range(63, -1, -1)), list(range(8)), [5, 1, 4]):
        some = verify_linear(**{k: v if v is None else v[rows_] for k, v in arguments.items()})
        assert some is not None
        assert all(torch.equal(a, b[rows_]) for a, b in zip(some, together, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_replays_in_a_cuda_graph(batch: int) -> None:
    first = on_gpu(wide_drafts(batch, 5, 32_000, 8, torch.bfloat16))
    out = verify_linear(**first)
    assert out is not None
    verify_linear(**first, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.verify_linear(**first, out=out)  # type: ignore[arg-type]
    for seed in (1, 2, 3):
        other = on_gpu(wide_drafts(batch, 5, 32_000, 8, torch.bfloat16, seed))
        for name, value in other.items():
            if value is not None:
                first[name].copy_(value)
        graph.replay()
        graph.replay()
        want = verify_linear(**other)
        assert want is not None
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.gpu
def test_compiles_whole_and_passes_opcheck() -> None:
    arguments = on_gpu(wide_drafts(8, 3, 1000, 8, torch.float32))
    compiled = torch.compile(ek.verify_linear, fullgraph=True)
    got, want = compiled(**arguments), ek.verify_linear(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    op = torch.ops.eesd.verify_linear.default
    torch.library.opcheck(op, [arguments[a.name] for a in op._schema.arguments])


def joint_pvalue(drawn: Law, rule: Law, vocab: int) -> float:
    world = World(vocab, 3, "cuda")
    return chi_square(linear_counts(world, drawn, rule, 1_000_000), world.law()).p_value


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "fold"), [(5, NEVER), (17, ALWAYS)])
@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_joint_law_of_two_tokens(
    law: Law, vocab: int, fold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "FOLD_BELOW", fold)
    assert joint_pvalue(law, law, vocab) > 1e-3


@pytest.mark.gpu
def test_a_law_under_another_laws_rule_would_show() -> None:
    assert joint_pvalue(Law.DETERMINISTIC, Law.SAMPLED, 5) < 1e-3
    assert joint_pvalue(Law.DETERMINISTIC, Law.BLOCK, 5) < 1e-3
