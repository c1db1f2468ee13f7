"""verify_tree's kernels: the reference's ids wherever its calls were clear, and their law.

On a CPU the interpreter runs them, at some 50 ms a node: few sequences, many forms in each.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafted import as_chain, dense, i32, linear_drafts, one_hot, settings
from margins import CLEAR, with_margins
from torch import Tensor
from trees import tree_drafts, without_filters, without_q

import eesd_kernels as ek
from bench.joint_tables import World, chi_square, tree_counts
from eesd_kernels import Law, reference
from eesd_kernels._cpu import philox_words_cpu
from eesd_kernels.triton import rows
from eesd_kernels.triton.verify_linear import verify_linear
from eesd_kernels.triton.verify_tree import verify_tree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = list(Law)

Arguments = dict[str, Any]


def to(device: str, arguments: Arguments) -> Arguments:
    return {k: v if v is None else v.to(device) for k, v in arguments.items()}


def some(arguments: Arguments, which: Any) -> Arguments:
    """Those sequences."""
    return {k: v if v is None else v[which] for k, v in arguments.items()}


def run(arguments: Arguments) -> list[Tensor]:
    """The kernels' results, on the CPU; every output starts as a number that none may keep."""
    batch, width, _ = arguments["target_logits"].shape
    out = tuple(
        torch.full(shape, 77, dtype=torch.int32, device=DEVICE)
        for shape in ((batch,), (batch, width), (batch, width), (batch,))
    )
    got = verify_tree(**to(DEVICE, arguments), out=out)
    assert got is not None
    assert all(a is b for a, b in zip(got, out, strict=True))
    return [t.cpu() for t in got]


def check(arguments: Arguments, unclear: int = 0, first: int = 1 << 30) -> list[Tensor]:
    """The reference's ids where the closest call was clear; at most so many where it was not."""
    got = run(arguments)
    told = to("cpu", some(arguments, slice(first)))
    want, margin = with_margins(reference.verify_tree, told, words=philox_words_cpu)
    clear = margin > CLEAR
    assert int((~clear).sum()) <= unclear
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[:first][clear], theirs[clear])
    return got


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("vocab", "k", "nodes", "batch", "block"),
    [
        (5, 3, 4, 8, 8), (17, 8, 7, 5, 16), (101, 5, 5, 4, 64), (1000, 1, 3, 4, 1024),
        (7, 3, 1, 4, 8), (102, 40, 64, 1, 64), (80, 65, 7, 6, 64),
    ],
)  # fmt: skip
def test_sparse_laws(
    split: Callable[[int], None], vocab: int, k: int, nodes: int, batch: int, block: int
) -> None:
    split(block)
    check(without_filters(tree_drafts(batch, nodes, vocab, k, ALL, seed=vocab)))


def test_no_sequences() -> None:
    arguments = some(tree_drafts(1, 4, 7, 3, ALL), slice(0))
    assert [tuple(t.shape) for t in run(arguments)] == [(0,), (0, 4), (0, 4), (0,)]


@pytest.mark.usefixtures("launches")
def test_without_draft_laws(split: Callable[[int], None]) -> None:
    split(16)
    check(without_q(without_filters(tree_drafts(4, 5, 29, 4, ALL, seed=3))))


def test_filters_of_the_target(split: Callable[[int], None]) -> None:
    """Their thresholds are random; `test_target_law.py` has those that nearly tie."""
    split(64)
    check(tree_drafts(5, 3, 101, 8, ALL, seed=2, filters=True))


def test_logits_of_other_dtypes_and_strides() -> None:
    arguments = without_filters(tree_drafts(4, 3, 37, 3, ALL, seed=3))
    want = run(arguments)
    logits = arguments["target_logits"]
    wide = torch.full((4, 4, 40), torch.nan)
    wide[:, 1:, :37] = logits
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (wide[:, 1:, :37], turned):
        assert equal(run({**arguments, "target_logits": strided}), want)
    check({**arguments, "target_logits": logits.half()})


def test_what_is_left_to_the_reference() -> None:
    arguments = to(DEVICE, without_filters(tree_drafts(1, 3, 37, 3, ALL)))
    logits = arguments["target_logits"]
    assert verify_tree(**{**arguments, "target_logits": logits.double()}) is None
    assert verify_tree(**{**arguments, "q_ids": None}) is None
    assert verify_tree(**to(DEVICE, tree_drafts(1, 65, 5, 2, ALL))) is None


#         0
#      1     2        tokens 1, 2
#     3 4    5        tokens 3, 4, 3
#       6             token 5
PARENT, TOKENS = [-1, 0, 0, 1, 1, 2, 4], [-1, 1, 2, 3, 4, 3, 5]
Outcome = tuple[list[int], list[int], int]  # path, tokens, status


def edge(after: tuple[int, ...] | Tensor, law: Law, **changes: Any) -> Arguments:
    """The tree above after one-hot rows (or rows as given); q uniform over six ids."""
    logits = after if isinstance(after, Tensor) else one_hot(*after)
    return {
        "target_logits": logits[None], "node_ids": i32([TOKENS]), "parent": i32([PARENT]),
        "num_nodes": i32([7]), **settings(7, 6, law), **changes,
    }  # fmt: skip


def edges() -> list[tuple[Arguments, Outcome]]:
    """Outcomes that no noise can change."""
    down = (1, 4, 0, 0, 5, 0, 2)
    far, nan, unmet = one_hot(*down), one_hot(*down), one_hot(*down)
    far[far == 0] = -3e38  # far from everything but minus infinity
    nan[4, 3], unmet[2:4] = torch.nan, torch.nan
    plus, empty = one_hot(*down), one_hot(*down)
    plus[6, 5], empty[0] = torch.inf, -torch.inf
    alone = torch.full((1, 7, 6), -1, dtype=torch.int32)
    alone[..., 0] = 0
    whole, bad = ([0, 1, 4, 6], [1, 4, 5, 2], 0), ([], [], 1)
    wrong = i32([[-1, 0, 0, 1, 1, 5, 9]])  # 5 is its own parent, 6's comes later
    cases: list[tuple[Arguments, Outcome]] = []
    for law in ALL:
        cases += [
            (edge((0, 0, 0, 0, 0, 0, 0), law), ([0], [0], 0)),
            (edge((2, 0, 3, 0, 0, 1, 0), law), ([0, 2, 5], [2, 3, 1], 0)),  # a leaf's bonus
            (edge(down, law), whole),
            (edge(far, law, temperature=torch.tensor([1e-6])), whole),
            (edge(nan, law), bad), (edge(plus, law), bad), (edge(empty, law), bad),
            (edge(unmet, law), whole),  # the walk never comes there
            (edge(down, law, num_nodes=i32([4])), ([0, 1], [1, 4], 0)),
            (edge(nan, law, num_nodes=i32([1])), ([0], [1], 0)),
            (edge(empty, law, num_nodes=i32([0])), ([], [], 0)),
            (edge(down, law, node_ids=i32([[9, 1, 1, 3, 2**31 - 1, 4, 5]])), ([0, 1], [1, 4], 0)),
            (edge(down, law, parent=wrong), ([0, 1, 4], [1, 4, 5], 0)),
            (edge(down, law, temperature=torch.zeros(1)), whole),
        ]  # fmt: skip
    for law in (Law.SAMPLED, Law.BLOCK):
        cases.append((edge((1, 2, 3, 0, 0, 0, 0), law, q_ids=alone), ([0], [1], 0)))
        for value in (torch.nan, torch.inf, 0.0):  # p is drawn from whole
            q = torch.full((1, 7, 6), value)
            cases.append((edge((3, 0, 0, 0, 0, 0, 0), law, q_probs=q), ([0], [3], 0)))
    tie = torch.zeros(7, 6)  # the lowest id of equals, and its first child
    tie[:, 0] = -1
    greedy = {"temperature": torch.zeros(1), "node_ids": i32([[-1, 2, 1, 3, 4, 1, 5]])}
    cases.append((edge(tie, Law.SAMPLED, **greedy), ([0, 2, 5], [1, 1, 1], 0)))
    return cases


def stacked(arguments: list[Arguments]) -> Arguments:
    """One batch of sequences of the same shape, unfiltered."""
    batch = {name: torch.cat([one[name] for one in arguments]) for name in arguments[0]}
    return without_filters(batch)


@pytest.mark.usefixtures("launches")
def test_edges(split: Callable[[int], None]) -> None:
    split(8)
    cases = edges()
    if DEVICE == "cpu":  # a third of them each way
        cases = cases[::3] if rows.FOLD_BELOW else cases[1::3]
    accepted, path, tokens, status = run(stacked([arguments for arguments, _ in cases]))
    for b, (_, (nodes, ids, bad)) in enumerate(cases):
        got = accepted[b].item(), path[b].tolist(), tokens[b].tolist(), status[b].item()
        assert got == (
            max(len(nodes) - 1, 0), nodes + [-1] * (7 - len(nodes)), ids + [-1] * (7 - len(ids)),
            bad,
        ), f"case {b}"  # fmt: skip


def near_calls(law: Law, candidates: int, wanted: int) -> Arguments:
    """Seeds whose outcome another temperature, by 2%, would change: on a border of the law.

    With the rule itself proven by enumeration, agreement on its borders is agreement in law. Under
    the laws that test child by child the border lies behind a first child that was rejected.
    """
    one = without_filters(tree_drafts(1, 4, 5, 3, [law], seed=20, sharp=1.0))
    one["parent"], one["node_ids"] = i32([[-1, 0, 0, 1]]), one["q_ids"][:, 0, [0, 0, 1, 2]]
    one["num_nodes"] = i32([4])
    many = {
        k: v if v is None else v.expand(candidates, *v.shape[1:]).contiguous()
        for k, v in one.items()
    }
    many["seed"] = torch.arange(candidates)
    (_, path, cold, _), (_, other, hot, _) = (
        reference.verify_tree(
            **{**many, "temperature": torch.full((candidates,), t)}, words=philox_words_cpu
        )
        for t in (0.98, 1.02)
    )
    behind = (law == Law.COUPLED) | ((path[:, 1] != 1) & (other[:, 1] != 1))
    near = ((cold != hot).any(1) & behind).nonzero()[:wanted, 0]
    assert len(near) == wanted
    return some(many, near)


@pytest.mark.usefixtures("launches")
def test_decides_as_the_reference_on_the_borders_of_its_decisions(
    split: Callable[[int], None],
) -> None:
    split(8)
    wanted = {Law.SAMPLED: (200, 8), Law.DETERMINISTIC: (200, 3), Law.COUPLED: (600, 2)}
    calls = [near_calls(law, *numbers) for law, numbers in wanted.items()]
    check({k: v if v is None else torch.cat([c[k] for c in calls]) for k, v in calls[0].items()})


def test_public_function_writes_where_it_is_told() -> None:
    arguments = to(DEVICE, without_filters(tree_drafts(3, 4, 17, 3, ALL)))
    want = ek.verify_tree(**arguments)
    out = tuple(torch.full_like(t, 77) for t in want)
    got = ek.verify_tree(**arguments, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert equal(got, want)
    with pytest.raises(ValueError, match=r"verify_tree: out\[1\]: expected shape"):
        ek.verify_tree(**arguments, out=(out[0], out[0], out[2], out[3]))
    with pytest.raises(ValueError, match="verify_tree: out: expected 4 tensors, got 3"):
        ek.verify_tree(**arguments, out=out[:3])


def test_a_filter_that_is_none_is_off() -> None:
    arguments = to(DEVICE, tree_drafts(20, 4, 17, 3, ALL))
    off = {name: arguments[name] for name in ("top_k", "top_p", "min_p")}
    for none in ({"top_k": None}, {"top_p": None, "min_p": None}, dict.fromkeys(off)):
        assert equal(ek.verify_tree(**{**arguments, **none}), ek.verify_tree(**arguments))


# On the GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "nodes", "vocab", "k", "dtype"),
    [
        (1, 32, 32_000, 8, torch.bfloat16), (64, 32, 32_000, 8, torch.bfloat16),
        (8, 32, 128_256, 8, torch.bfloat16), (64, 7, 128_256, 8, torch.bfloat16),
        (1, 64, 151_936, 64, torch.float16), (8, 64, 32_003, 64, torch.float32),
        (8, 1, 32_003, 8, torch.float16), (1, 7, 32_003, 5, torch.float32),
        (64, 1, 151_936, 8, torch.bfloat16),
    ],
)  # fmt: skip
def test_real_sizes(batch: int, nodes: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    arguments = tree_drafts(batch, nodes, vocab, k, ALL, dtype=dtype, device="cuda")
    got = check(without_filters(arguments), unclear=1, first=16)
    assert nodes == 1 or batch == 1 or got[0].sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "dtype"), [(32_003, torch.float32), (128_256, torch.bfloat16)])
def test_real_sizes_of_other_forms(vocab: int, dtype: torch.dtype) -> None:
    arguments = tree_drafts(8, 16, vocab, 8, ALL, dtype=dtype, device="cuda", filters=True)
    check(without_q(without_filters(arguments)), unclear=1)
    check(arguments, unclear=1)
    cool = {**arguments, "top_k": None, "min_p": None}
    check(cool, unclear=1)


@pytest.mark.gpu
def test_a_chain_is_the_linear_draft() -> None:
    arguments = to("cuda", without_filters(linear_drafts(60, 5, 1000, 8, [*ALL[:3], Law.SAMPLED])))
    linear, tree = verify_linear(**arguments), verify_tree(**as_chain_on_gpu(arguments))
    assert linear is not None
    assert tree is not None
    assert equal(linear, (tree[0], tree[2], tree[3]))


def as_chain_on_gpu(arguments: Arguments) -> Arguments:
    return to("cuda", as_chain(to("cpu", arguments)))


@pytest.mark.gpu
def test_dense_laws_go_by_the_reference() -> None:
    arguments = as_chain(linear_drafts(8, 2, 41, 9, ALL[:3]))
    got = ek.verify_tree(**to("cuda", dense(arguments)))
    assert equal([t.cpu() for t in got], ek.verify_tree(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize(("nodes", "vocab"), [(32, 32_000), (64, 128_256)])
def test_a_row_is_the_same_in_any_batch(nodes: int, vocab: int) -> None:
    """Alone it races in all its rows, among 64 only where it stops: the same ids."""
    arguments = tree_drafts(64, nodes, vocab, 8, ALL, dtype=torch.bfloat16, device="cuda", seed=1)
    for given in (without_filters(arguments), {**arguments, "top_p": arguments["top_p"] * 0.9}):
        together = verify_tree(**given)
        assert together is not None
        for rows_ in ([0], [1], [2], [3], [63], list(range(63, -1, -1)), [5, 1, 4]):
            alone = verify_tree(**some(given, rows_))
            assert alone is not None
            assert all(torch.equal(a, b[rows_]) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64])
def test_replays_in_a_cuda_graph(batch: int) -> None:
    def drafts(seed: int) -> Arguments:
        arguments = tree_drafts(
            batch, 32, 32_000, 8, ALL, dtype=torch.bfloat16, device="cuda", seed=seed, filters=True
        )
        return arguments if batch == 1 else without_filters(arguments)

    first = drafts(0)
    out = verify_tree(**first)
    assert out is not None
    verify_tree(**first, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.verify_tree(**first, out=out)  # type: ignore[arg-type]
    for seed in (1, 2, 3):
        other = drafts(seed)
        for name, value in other.items():
            if value is not None:
                first[name].copy_(value)
        graph.replay()
        graph.replay()
        want = verify_tree(**other)
        assert want is not None
        assert equal(out, want)


@pytest.mark.gpu
def test_compiles_whole_and_passes_opcheck() -> None:
    arguments = without_filters(tree_drafts(8, 7, 1000, 8, ALL, device="cuda"))
    compiled = torch.compile(ek.verify_tree, fullgraph=True)
    assert equal(compiled(**arguments), ek.verify_tree(**arguments))
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    op = torch.ops.eesd.verify_tree.default
    torch.library.opcheck(op, [arguments[a.name] for a in op._schema.arguments])


def joint_pvalue(shape: tuple[int, ...], drawn: Law, rule: Law, vocab: int) -> float:
    world = World(vocab, 4, "cuda")
    return chi_square(tree_counts(world, shape, drawn, rule, 1_000_000), world.law()).p_value


@pytest.mark.gpu
@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("vocab", [5, 17])
@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_joint_law_of_two_tokens(split: Callable[[int], None], law: Law, vocab: int) -> None:
    split(32)
    assert joint_pvalue((2, 2), law, law, vocab) > 1e-3


@pytest.mark.gpu
def test_four_siblings_and_twins_that_would_show(split: Callable[[int], None]) -> None:
    split(32)
    assert joint_pvalue((4,), Law.SAMPLED, Law.SAMPLED, 17) > 1e-3
    assert joint_pvalue((2,), Law.SAMPLED, Law.DETERMINISTIC, 5) > 1e-3  # exact, and accepts less
    assert joint_pvalue((2,), Law.DETERMINISTIC, Law.SAMPLED, 5) < 1e-3
    assert joint_pvalue((2, 2), Law.SAMPLED, Law.COUPLED, 5) > 1e-3
