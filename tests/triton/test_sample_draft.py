"""sample_draft's kernel and the draw behind exit_topk: the reference's tokens, and their law.

On a CPU the interpreter runs a program a row, so rows are few; counts are taken on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd_kernels as ek
from bench.joint_tables import Candidates, chi_square
from eesd_kernels import Law, Purpose, reference
from eesd_kernels._cpu import philox_words_cpu
from eesd_kernels.reference.philox import race_exponential
from eesd_kernels.triton import exit_topk as exit_topk_module
from eesd_kernels.triton.exit_draft import exit_draft
from eesd_kernels.triton.sample_draft import sample_draft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLEAR = 1e-5  # of float64 scores: closer ones may change places in float32
ROWS = 24 if DEVICE == "cpu" else 400
I32 = torch.int32


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def settings(rows: int, seed: int) -> dict[str, Tensor]:
    """Every law at every temperature, any seed and place."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randint(1, 2**31 - 1, (2, rows), generator=g).to(I32)
    return {
        "temperature": torch.tensor([0.0, 0.3, 1.0, 1.7, 1.0]).repeat(rows)[:rows],
        "law": torch.arange(rows, dtype=I32) % len(Law),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g),
        "position": place[0],
        "base": place[1],
        "parent": torch.randint(0, 64, (rows,), generator=g).to(I32),
    }


def drawn(values: Tensor, ids: Tensor, n: int, **more: Tensor | None) -> dict[str, Any]:
    return {"values": values, "ids": ids, "n": n, **settings(len(values), n), **more}


def margins(arguments: dict[str, Any]) -> Tensor:
    """Of each row, the smallest step between the perturbed scores of the first n + 1."""
    v, ids, n = arguments["values"].double(), arguments["ids"], arguments["n"]
    valid = (ids >= 0) & (v > -torch.inf)
    t, law = arguments["temperature"].double()[:, None], arguments["law"][:, None]
    coupled = law == Law.COUPLED
    score = torch.where(valid, v, -torch.inf)
    noise = [
        race_exponential(philox_words_cpu(
            arguments["seed"], arguments["position"],
            arguments["base"] * (purpose == Purpose.DRAFT), int(purpose), ids.clamp(min=0),
            arguments["parent"] if purpose == Purpose.DRAFT else None,
        )).log()
        for purpose in (Purpose.DRAFT, Purpose.TARGET)
    ]  # fmt: skip
    raced = score / t - torch.where(coupled, noise[1], noise[0])
    quiet = (t == 0) | (law == Law.DETERMINISTIC)
    ordered = torch.where(quiet, score, raced).sort(1, descending=True).values[:, : n + 1]
    step = (ordered[:, :-1] - ordered[:, 1:]).nan_to_num(torch.inf)
    step = torch.where(quiet & (step == 0), torch.inf, step)  # equals go by their place
    return step.min(1).values if step.shape[1] else torch.full((len(v),), torch.inf)


def check(arguments: dict[str, Any], unclear: int = 0) -> tuple[Tensor, Tensor]:
    """The reference's children where its calls were clear, and its q."""
    rows, k = arguments["values"].shape
    out = (
        torch.full((rows, arguments["n"]), 77, dtype=I32, device=DEVICE),
        torch.full((rows, k), torch.nan, device=DEVICE),
    )
    got = sample_draft(**{name: there(x) for name, x in arguments.items()}, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    children, q = (t.cpu() for t in got)
    want = reference.sample_draft(**arguments, words=philox_words_cpu)
    clear = margins(arguments) > CLEAR
    assert int((~clear).sum()) <= unclear
    assert torch.equal(children[clear], want[0][clear])
    torch.testing.assert_close(q, want[1], rtol=2e-5, atol=1e-9)
    return children, q


def candidates(rows: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, k, generator=g) * 3 + 20).sort(1, descending=True).values
    ids = torch.stack([torch.randperm(151_936, generator=g)[:k] for _ in range(rows)])
    return values, ids.to(I32)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 2), (7, 1), (8, 3), (33, 2), (64, 64)])
def test_equals_the_reference(k: int, n: int) -> None:
    rows = ROWS if k < 64 or DEVICE != "cpu" else 6
    check(drawn(*candidates(rows, k, k), n), unclear=rows // 20)


def test_without_parents() -> None:
    arguments = drawn(*candidates(8, 5, 0), 2)
    with_root = check({**arguments, "parent": torch.zeros(8, dtype=I32)})
    given = {name: there(x) for name, x in arguments.items()}
    linear = sample_draft(**{**given, "parent": None})
    assert torch.equal(linear[0].cpu(), with_root[0])


def test_coupled_children_ignore_round_base_and_parent() -> None:
    law = torch.full((8,), int(Law.COUPLED), dtype=I32)
    arguments = drawn(*candidates(8, 9, 1), 3, law=law)
    other = {**arguments, "base": arguments["base"] + 1, "parent": arguments["parent"] + 1}
    assert torch.equal(check(arguments)[0], check(other)[0])


def test_ties_and_missing_candidates() -> None:
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([
        [3.0, 3.0, 3.0, 1.0], [1.0, 3.0, -inf, 3.0], [nan, 2.0, 2.0, nan],
        [nan, nan, nan, nan], [-inf, -inf, -inf, -inf], [-inf, -inf, 0.0, -inf],
        [0.0, -0.0, 0.0, -0.0], [2.0, 1.0, 0.0, 3.0],
    ])  # fmt: skip
    ids = torch.tensor([[9, 4, 7, 2]]).repeat(8, 1).to(I32)
    ids[7, 0] = ids[7, 3] = -1
    for law in (Law.SAMPLED, Law.DETERMINISTIC):
        arguments = drawn(values, ids, 3, law=torch.full((8,), int(law), dtype=I32))
        children, q = check(arguments)
        assert children[3:5].eq(-1).all()
        assert q[3:5].eq(0).all()
        assert children[5].tolist() == [7, -1, -1]
        assert children[7].sort().values.tolist() == [-1, 4, 7]
    quiet = drawn(values, ids, 4, temperature=torch.zeros(8))
    assert check(quiet)[0][[0, 1, 6]].tolist() == [[9, 4, 7, 2], [4, 2, 9, -1], [9, 4, 7, 2]]


def test_hot_and_cold() -> None:
    values, ids = candidates(6, 6, 3)
    t = torch.tensor([1e-6, 1e-3, 1e3, 1e30, torch.inf, -1.0])
    check(drawn(values, ids, 2, temperature=t, law=torch.zeros(6, dtype=I32)), unclear=2)


def test_strided_inputs() -> None:
    values, ids = candidates(6, 20, 4)
    for cut in (slice(3, 11), slice(0, 20, 3)):
        arguments = drawn(values, ids, 2)
        given = {name: there(x) for name, x in arguments.items()}
        given["values"], given["ids"] = given["values"][:, cut], given["ids"][:, cut]
        got = sample_draft(**given)
        flat = {**given, "values": given["values"].contiguous(), "ids": given["ids"].contiguous()}
        assert all(torch.equal(a, b) for a, b in zip(got, sample_draft(**flat), strict=True))


def test_no_rows() -> None:
    arguments = drawn(*candidates(1, 4, 5), 2)
    empty = {name: there(x)[:0] if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert [t.shape for t in sample_draft(**empty)] == [(0, 2), (0, 4)]


def composed(
    hidden: Tensor, head: Tensor, k: int, norm: Tensor | None, draw: dict[str, Any]
) -> Any:
    values, ids, lse = exit_topk_module.exit_topk(hidden, head, k, norm, 1e-5)
    return values, ids, lse, *sample_draft(values, ids, **draw)


@pytest.mark.parametrize(("vocab", "k", "n"), [(300, 7, 2), (40, 1, 1), (90, 16, 16)])
def test_the_draw_behind_the_candidates(vocab: int, k: int, n: int) -> None:
    """`exit_draft` has the very bits of the two ops in turn, of a bad row too."""
    torch.manual_seed(k)
    rows = 5 if DEVICE == "cpu" else 130
    hidden = torch.randn(rows, 24, device=DEVICE)
    hidden[1, 3] = torch.nan
    head, norm = torch.randn(vocab, 24, device=DEVICE), torch.rand(24, device=DEVICE)
    draw = {name: there(x) for name, x in settings(rows, k).items()}
    got = exit_draft(hidden, head, k, norm, 1e-5, n=n, **draw)
    want = composed(hidden, head, k, norm, {"n": n, **draw})
    assert got is not None
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))
    assert got[3][1].eq(-1).all()
    assert got[4][1].eq(0).all()


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, device=DEVICE)
    draw = {name: there(t) for name, t in settings(2, 0).items()}
    assert exit_draft(x, x, 1, None, 1e-5, n=1, **draw) is None


DRAWS = 1_000_000
LAWS = [
    pytest.param(Law.SAMPLED, 1.0, id="sampled"), pytest.param(Law.SAMPLED, 0.7, id="sampled cool"),
    pytest.param(Law.COUPLED, 1.0, id="coupled"), pytest.param(Law.BLOCK, 1.6, id="block hot"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("law", "temperature"), LAWS)
@pytest.mark.parametrize("k", [5, 17])
@pytest.mark.parametrize("n", [1, 2])
def test_children_have_the_joint_law(k: int, n: int, law: Law, temperature: float) -> None:
    """Without replacement, in the order drawn."""
    row = Candidates(k, DEVICE)
    counts = row.counts(n, law, temperature, DRAWS)
    assert chi_square(counts, row.law(n, temperature)).p_value > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("next_to", ["position", "base", "parent", "seed"])
def test_neighbouring_draws_are_independent(next_to: str) -> None:
    """The joint table of two draws whose keys differ in one place by one."""
    k = 5
    values = torch.randn(k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = torch.arange(k, dtype=I32, device=DEVICE)
    draw = torch.arange(DRAWS, device=DEVICE)
    place = (draw % 1000).to(I32) * 2
    keys = {"seed": draw // 1000 * 2, "position": place, "base": place, "parent": place % 64}
    pair = []
    for step in (0, 1):
        now = {**keys, next_to: keys[next_to] + step}
        children, _ = ek.sample_draft(
            values.expand(DRAWS, k), ids.expand(DRAWS, k), torch.ones(DRAWS, device=DEVICE),
            torch.zeros_like(place), 1, now["seed"], now["position"], now["base"],
            parent=now["parent"],
        )  # fmt: skip
        pair.append(children[:, 0].long())
    q = values.double().softmax(0).cpu()
    counts = torch.bincount((pair[0] * k + pair[1]).cpu(), minlength=k * k)
    assert chi_square(counts, q[:, None] * q).p_value > 1e-3


@pytest.mark.gpu
def test_many_rows_equal_the_reference() -> None:
    check(drawn(*candidates(3000, 17, 9), 4), unclear=30)


def graphed(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.gpu
def test_graph_replay() -> None:
    """A law or a temperature that changes on the device changes the replay."""
    rows, k, n = 21, 8, 2
    hidden = torch.randn(rows, 512, device=DEVICE).bfloat16()
    head = torch.randn(32_003, 512, device=DEVICE).bfloat16()
    draw = {name: there(x) for name, x in settings(rows, 1).items()}
    arguments = {"hidden": hidden, "lm_head": head, "k": k, "n": n, **draw}
    before = ek.exit_draft(**arguments)
    out = tuple(torch.empty_like(t) for t in before)
    graph = graphed(lambda: ek.exit_draft(**arguments, out=out))
    for change in (
        lambda: draw["temperature"].copy_(draw["temperature"].flip(0)),
        lambda: draw["law"].fill_(int(Law.DETERMINISTIC)),
        lambda: draw["position"].add_(1),
        lambda: hidden.copy_(hidden.flip(0)),
    ):
        change()
        want = ek.exit_draft(**arguments)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


@pytest.mark.gpu
def test_compiles_as_one_graph() -> None:
    arguments = {name: there(x) for name, x in drawn(*candidates(6, 8, 2), 2).items()}

    def step(values: Tensor) -> tuple[Tensor, Tensor]:
        given = {**arguments, "values": values * 2}
        child, q = torch.ops.eesd.sample_draft(**given)
        return child + 1, q

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(arguments["values"]), step(arguments["values"])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
