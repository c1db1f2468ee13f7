"""exit_topk's kernels: exact on small integers, near the reference on others, row-invariant.

On a CPU the interpreter runs them: few rows, small vocabularies, several tiles and groups.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from torch import Tensor

import eesd_kernels as ek
from eesd_kernels import reference
from eesd_kernels.triton import exit_merge, exit_scan
from eesd_kernels.triton import exit_topk as module
from eesd_kernels.triton.exit_topk import ROW_TILES, exit_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of logits about 3 in size. A norm in bfloat16 rounds g x, in float16 x rstd g; the reference
# rounds both. float32 differs from float64 by its sums.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
Results = tuple[Tensor, ...]


def run(
    hidden: Tensor,
    head: Tensor,
    k: int,
    out: Results | None = None,
    config: exit_scan.Config | None = None,
    norm: Tensor | None = None,
    poll: bool | None = None,
) -> Results:
    hidden, head = hidden.to(DEVICE), head.to(DEVICE)
    out = out or module.new_outputs(hidden, k)
    assert module.launch(hidden, head, k, norm, 1e-5, out, config=config, poll=poll)
    return out


def small_integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers whose products and sums are exact in every dtype, so that many logits tie."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=g).to(dtype)


def exact(got: Results, hidden: Tensor, head: Tensor, k: int) -> None:
    """Equal bits of values, equal ids; logsumexp within a rounding of float32."""
    want = reference.exit_topk(hidden.double(), head.double(), k)
    assert torch.equal(got[1].cpu(), want[1])
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[2].cpu(), want[2], rtol=3e-7, atol=1e-6, equal_nan=True)


def close(got: Results, logits: Tensor, tolerance: float) -> None:
    """Near float64 logits: each value its id's, no better one left out, in order."""
    values, ids, lse = got
    bound = {"rtol": tolerance / 10, "atol": tolerance}
    k = values.shape[1]
    torch.testing.assert_close(values.double(), logits.gather(1, ids.long()), **bound)
    torch.testing.assert_close(values.double(), logits.topk(k).values, **bound)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), **bound)
    falls = values[:, :-1] > values[:, 1:]
    assert (falls | ((values[:, :-1] == values[:, 1:]) & (ids[:, :-1] < ids[:, 1:]))).all()


@DTYPES
@pytest.mark.parametrize(
    ("vocab", "size", "rows", "k"),
    [
        (1, 5, 1, 1), (5, 1, 3, 5), (17, 33, 3, 7), (101, 33, 17, 1), (101, 16, 1, 64),
        (400, 16, 3, 8), (300, 7, 2, 20),
    ],
)  # fmt: skip
def test_is_exact_on_small_integers(
    vocab: int, size: int, rows: int, k: int, dtype: torch.dtype
) -> None:
    hidden = small_integers(rows, size, dtype=dtype, seed=vocab)
    head = small_integers(vocab, size, dtype=dtype, seed=vocab + 1)
    exact(run(hidden, head, k), hidden, head, k)


@pytest.mark.parametrize("row_tile", ROW_TILES)
def test_is_exact_in_every_row_tile(row_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_TILES", (row_tile,))
    hidden, head = small_integers(row_tile + 3, 6), small_integers(40, 6, seed=1)
    exact(run(hidden, head, 2), hidden, head, 2)


def test_float32_over_a_bfloat16_head() -> None:
    hidden, head = small_integers(3, 20), small_integers(101, 20, dtype=torch.bfloat16, seed=1)
    exact(run(hidden, head, 5), hidden, head, 5)


@pytest.fixture
def computed_anew(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups that merge computes anew, in order; in the interpreter alone."""
    groups: list[int] = []
    if DEVICE == "cpu":
        inner = exit_merge._anew

        def spy(x_ptr: object, w_ptr: object, group: Any, *rest: object) -> object:
            groups.append(int(group.handle.data.item()))
            return inner(x_ptr, w_ptr, group, *rest)

        monkeypatch.setattr(exit_merge, "_anew", spy)
    return groups


@pytest.mark.parametrize("k", [8, 64])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_the_best_all_lie_in_one_place(k: int, group: int) -> None:
    """A list shows two or three of them; merge must compute the others anew."""
    head = torch.zeros(400, 8, dtype=torch.bfloat16)
    ids = torch.arange(128, 192)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    head[ids, 0] = (1.0 + order / 64).bfloat16()
    hidden = torch.ones(1, 8, dtype=torch.bfloat16)
    config = exit_scan.Config(64, 16, 4, 2, group=group)
    exact(run(hidden, head, k, config=config), hidden, head, k)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_logits_in_order(order: str, k: int) -> None:
    """The best are neighbours, at one end; the last tile is not whole."""
    line = torch.arange(300.0)[:, None]
    head = line if order == "rising" else -line
    exact(run(torch.ones(2, 1), head, k), torch.ones(2, 1), head, k)


def test_computes_anew_only_what_may_hide_one(computed_anew: list[int]) -> None:
    """Groups of 32: one shows both of its two best, one hides a third, one hides nothing good."""
    head = torch.arange(160.0)[:, None] / 1000
    head[torch.tensor([3, 9]), 0] = torch.tensor([9.0, 8.0])
    head[torch.tensor([70, 71, 95]), 0] = torch.tensor([7.0, 6.0, 5.0])
    head[torch.tensor([130, 140]), 0] = torch.tensor([4.0, 1.0])
    hidden = torch.ones(1, 1)
    got = run(hidden, head, 6)
    exact(got, hidden, head, 6)
    assert got[1].tolist() == [[3, 9, 70, 71, 95, 130]]
    if DEVICE == "cpu":
        assert computed_anew == [2]
    exact(run(hidden, head, 4), hidden, head, 4)
    if DEVICE == "cpu":
        assert computed_anew == [2], "four are all shown"


def test_equal_logits_hide_none_below_the_last_of_the_best(computed_anew: list[int]) -> None:
    """All equal: the first group alone is computed anew, it has the k lowest ids."""
    hidden, head = torch.ones(1, 4), torch.ones(300, 4)
    exact(run(hidden, head, 8), hidden, head, 8)
    if DEVICE == "cpu":
        assert computed_anew == [0]


def test_a_group_anew_has_the_rows_bits(computed_anew: list[int]) -> None:
    """Beside other rows and alone."""
    torch.manual_seed(0)
    hidden, head = normal(5, 40, dtype=torch.float32), normal(200, 40, dtype=torch.float32)
    head[40:60] = hidden[2] + head[40:60] / 8
    head[130:135] = hidden[4]
    together = run(hidden, head, 7)
    close(together, logits_of(hidden, head, None), TOLERANCE[torch.float32])
    assert DEVICE != "cpu" or computed_anew
    for row in range(5):
        alone = run(hidden[row : row + 1], head, 7)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[row])


def test_two_groups_in_a_tile() -> None:
    hidden, head = small_integers(3, 6), small_integers(101, 6, seed=1)
    config = exit_scan.Config(64, 16, 4, 2, group=16)
    exact(run(hidden, head, 5, config=config), hidden, head, 5)


@pytest.mark.parametrize("x_left", [False, True], ids=["w left", "x left"])
def test_either_operand_on_the_left(x_left: bool) -> None:
    hidden, head = small_integers(19, 40), small_integers(460, 40, seed=1)
    config = exit_scan.Config(64, 16, 4, 2, x_left=x_left)
    for k in (5, 20):
        exact(run(hidden, head, k, config=config), hidden, head, k)


def test_more_groups_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_SORTED", "CHUNK"):
        monkeypatch.setattr(exit_merge, name, 4)
    hidden, head = small_integers(2, 4), small_integers(700, 4, seed=1)
    for k in (3, 17):
        exact(run(hidden, head, k), hidden, head, k)


@pytest.fixture(params=[1, 4])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Groups that merge reads at once: of 32 ids each in float32."""
    monkeypatch.setattr(exit_merge, "CHUNK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("vocab", "k"), [(701, 8), (640, 1), (513, 6), (33, 8), (9, 8)])
def test_ties_in_several_chunks(vocab: int, k: int) -> None:
    """Few values, so that each of the best is one of many; the last group has 29 to 1 ids."""
    hidden, head = small_integers(3, 3), small_integers(vocab, 3, seed=vocab)
    exact(run(hidden, head, k), hidden, head, k)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_chunks_in_order(order: str) -> None:
    """Every chunk better than all before it, and than all after it; logsumexp scaled anew."""
    head = {"rising": 1.0, "falling": -1.0, "equal": 0.0}[order] * torch.arange(300.0)[:, None]
    exact(run(torch.ones(1, 1), head, 8), torch.ones(1, 1), head, 8)


def test_several_groups_hide_some_of_the_best(chunk: int, computed_anew: list[int]) -> None:
    """In their own chunks, the one with the greatest listed first; a tie goes to the lower id."""
    head = torch.arange(700.0)[:, None] / 1000
    for first, best in ((70, [5.0, 4.5, 4.0]), (321, [9.0, 8.0, 7.0, 3.0]), (640, [6.0, 6.0, 6.0])):
        head[first : first + len(best), 0] = torch.tensor(best)
    head[5] = head[699] = 4.5
    hidden = torch.ones(2, 1)
    got = run(hidden, head, 8)
    exact(got, hidden, head, 8)
    assert got[1].tolist() == [[321, 322, 323, 640, 641, 642, 70, 5]] * 2
    if DEVICE == "cpu":
        assert computed_anew == [10, 20] * 2, "not group 2, whose second is no longer of the best"


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, None], ids=str)
def test_bad_logits_in_any_chunk(bad: float | None, computed_anew: list[int]) -> None:
    """-inf in all chunks but one, first, among others or last, with three equal logits or bad ones,
    of which the list shows two: a bad row's hidden logits matter no more."""
    for last in (2, 42, 299):
        head = torch.full((300, 1), -torch.inf)
        head[last - 2 : last + 1] = 1.0 if bad is None else bad
        exact(run(torch.ones(1, 1), head, 3), torch.ones(1, 1), head, 3)
        if DEVICE == "cpu":
            assert bool(computed_anew) == (bad is None)


class Between:
    """A kernel whose launches hand their third argument, the records, to somebody first."""

    def __init__(self, kernel: Any, look: Callable[[Tensor], None]) -> None:
        self.kernel, self.look = kernel, look

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.look(args[2])
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize(("vocab", "size"), [(300, 5), (33, 3000)])
def test_records_start_as_poison_and_hold_none(
    vocab: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of them, and whatever the logits are: else merge would read rubbish, or wait on."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    for part, kernel, seen in (
        (exit_scan, "_scan_kernel", before), (exit_merge, "_merge_kernel", after)
    ):  # fmt: skip
        keep = Between(getattr(part, kernel), lambda x, seen=seen: seen.append(x.clone()))
        monkeypatch.setattr(part, kernel, keep)
    hidden = normal(7, size, dtype=torch.float32)
    hidden[1, 0], hidden[2, 0], hidden[3] = torch.nan, torch.inf, 0.0
    head = normal(vocab, size, dtype=torch.float32)
    head[:, 1] = head[:, 1].abs() + 1e-3
    hidden[4], hidden[5] = 0.0, 0.0
    hidden[4, 1], hidden[5, 1] = torch.inf, -torch.inf
    norm = torch.ones(size, device=DEVICE)
    run(hidden, head, 8, norm=norm, poll=True)
    run(hidden, head, 8, poll=True)
    assert len(before) == len(after) == 2
    assert (before[0] == -1).all()
    for records in after:
        assert (records[:, :, :3] != -1).all()
        assert (records[:, :, 3] == 0).all()


def test_polls_until_every_word_is_there(
    monkeypatch: pytest.MonkeyPatch, computed_anew: list[int]
) -> None:
    """In the interpreter alone, scan is over when merge starts: words are held back here."""
    torch.manual_seed(0)
    hidden, head = normal(2, 40, dtype=torch.float32), normal(700, 40, dtype=torch.float32)
    norm, calls, inner = torch.ones(40, device=DEVICE), 0, exit_merge._words
    want = run(hidden, head, 3, norm=norm, poll=False)
    anew = list(computed_anew)
    monkeypatch.setattr(exit_merge, "CHUNK", 4)

    def late(lists_ptr: object, left: Any, *rest: object) -> Any:
        nonlocal calls
        words, calls = inner(lists_ptr, left, *rest), calls + 1
        there = min(4, int(left.handle.data.item()))
        if there > 0 and calls % 5:
            words[calls % 3].handle.data[calls % there] = 2**64 - 1
        return words

    if DEVICE == "cpu":
        monkeypatch.setattr(exit_merge, "_words", late)
    got = run(hidden, head, 3, norm=norm, poll=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=3e-7, atol=1e-6)
    if DEVICE == "cpu":
        assert calls >= 2 * 6 * 4
        assert computed_anew == 2 * anew


def test_equal_rows_of_the_head_go_by_id() -> None:
    head = torch.ones(300, 4)
    head[217] = 2.0
    _, ids, _ = run(torch.ones(1, 4), head, 5)
    assert ids.tolist() == [[217, 0, 1, 2, 3]]


def test_bad_rows_touch_no_other() -> None:
    hidden, head = small_integers(7, 4), small_integers(300, 4, seed=1)
    head[:, 0] = 1.0
    clean = run(hidden, head, 6)
    hidden[1, 2] = torch.nan
    hidden[2, 0] = torch.inf
    hidden[4, 0] = -torch.inf
    hidden[5] = torch.tensor([torch.inf, 0.0, 0.0, 0.0])
    got = run(hidden, head, 6)
    exact(got, hidden, head, 6)
    for row in (1, 2, 4, 5):
        assert got[1][row].tolist() == [-1] * 6
        assert got[0][row].isnan().all()
        assert got[2][row].isnan()
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[[0, 3, 6]], b[[0, 3, 6]])


@pytest.mark.parametrize("finite", [0, 1, 3])
def test_few_finite_logits(finite: int) -> None:
    """-inf is a logit too: listed last, by id; without a finite one the row is bad."""
    head = torch.full((200, 1), -torch.inf)
    head[torch.tensor([150, 7, 90])[:finite], 0] = torch.tensor([1.0, 2.0, -3.0])[:finite]
    exact(run(torch.ones(2, 1), head, 5), torch.ones(2, 1), head, 5)


def test_one_bad_logit_spoils_the_row() -> None:
    for bad in (torch.nan, torch.inf, -torch.nan):
        head = torch.zeros(200, 1)
        head[131, 0] = bad
        exact(run(torch.ones(1, 1), head, 3), torch.ones(1, 1), head, 3)


def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE).normal_(0, std)


def logits_of(hidden: Tensor, head: Tensor, norm: Tensor | None) -> Tensor:
    """float64."""
    x = hidden.double()
    if norm is not None:
        x = reference.rms_norm(x, norm.double(), 1e-5)
    return torch.cat([x @ part.double().T for part in head.split(16_384)], 1)


@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("vocab", "size", "rows"), [(101, 33, 3), (300, 160, 17)])
def test_equals_the_reference(
    vocab: int, size: int, rows: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocab)
    hidden, head = normal(rows, size, dtype=dtype), normal(vocab, size, dtype=dtype, std=size**-0.5)
    norm = 1 + normal(size, dtype=dtype, std=0.3) if normed else None
    got = exit_topk(hidden, head, 7, norm, 1e-5)
    assert got is not None
    close(got, logits_of(hidden, head, norm), TOLERANCE[dtype])


def test_strided_inputs_and_given_outputs() -> None:
    frame, wide = small_integers(90, 60), small_integers(5, 100, seed=1)
    for head in (frame[:, 10:30], frame[::2, ::3]):
        size = head.shape[1]
        for hidden in (wide[:, 7 : 7 + size], wide[::2, ::2][:, :size]):
            rows = hidden.shape[0]
            out = tuple(
                torch.full(shape, 77, dtype=dtype, device=DEVICE)
                for shape, dtype in (
                    ((rows, 3), torch.float32), ((rows, 3), torch.int32), ((rows,), torch.float32),
                )
            )  # fmt: skip
            got = run(hidden, head, 3, out=out)
            assert all(a is b for a, b in zip(got, out, strict=True))
            exact(got, hidden, head, 3)


def test_no_rows() -> None:
    got = run(torch.ones(0, 4), torch.ones(9, 4), 3)
    assert [t.shape for t in got] == [(0, 3), (0, 3), (0,)]


def test_leaves_float64_and_empty_sums_to_the_reference() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, device=DEVICE)
    assert exit_topk(x, x, 1, None, 1e-5) is None
    assert exit_topk(x.float(), x.float(), 1, x[0], 1e-5) is None
    empty = torch.ones(2, 0, device=DEVICE)
    assert exit_topk(empty, empty, 1, None, 1e-5) is None


@pytest.mark.parametrize("op", ["exit_topk", "exit_draft", "sample_draft"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_out_of_the_public_function(op: str, device: str) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in SAMPLES[op]().items()}
    want = getattr(ek, op)(**given)
    out = tuple(torch.empty_like(t) for t in want)
    got = getattr(ek, op)(**given, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=rf"{op}: out: expected {len(out)} tensors, got 1"):
        getattr(ek, op)(**given, out=out[:1])
    with pytest.raises(TypeError, match=rf"{op}: out: expected a tuple, got Tensor"):
        getattr(ek, op)(**given, out=out[0])
    with pytest.raises(TypeError, match=rf"{op}: out\[1\]: expected dtype"):
        getattr(ek, op)(**given, out=(out[0], out[1].double(), *out[2:]))


REAL = [(32_000, 4096), (32_003, 5120), (128_256, 2048), (151_936, 1024)]


@pytest.fixture(params=REAL, ids=[f"{v}x{h}" for v, h in REAL], scope="module")
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """hidden, head and norm in bfloat16."""
    vocab, size = request.param
    torch.manual_seed(vocab)
    yield (
        normal(200, size, dtype=torch.bfloat16) * 3,
        normal(vocab, size, dtype=torch.bfloat16, std=3 * size**-0.5),
        1 + normal(size, dtype=torch.bfloat16, std=0.3),
    )
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 8, 64])
def test_real_heads(real: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    """Near float64; each row's bits alone, anywhere, in every row tile."""
    hidden, head, norm = real
    together = ek.exit_topk(hidden, head, k, norm_weight=norm)
    close(together, logits_of(hidden, head, norm), TOLERANCE[torch.bfloat16])
    for first, count in ((0, 1), (199, 1), (8, 5), (50, 16), (3, 17), (9, 33), (100, 64), (1, 130)):
        rows = slice(first, first + count)
        alone = ek.exit_topk(hidden[rows], head, k, norm_weight=norm)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True)), count
    order = torch.randperm(200, device=DEVICE)
    shuffled = ek.exit_topk(hidden[order], head, k, norm_weight=norm)
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, together, strict=True))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
def test_dtypes_at_a_real_head(normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    hidden = normal(70, 2048, dtype=dtype)
    head = normal(32_003, 2048, dtype=dtype, std=3 * 2048**-0.5)
    norm = 1 + normal(2048, dtype=dtype, std=0.3) if normed else None
    together = ek.exit_topk(hidden, head, 8, norm_weight=norm)
    close(together, logits_of(hidden, head, norm), TOLERANCE[dtype])
    for rows in (slice(0, 1), slice(60, 70), slice(5, 38)):
        alone = ek.exit_topk(hidden[rows], head, 8, norm_weight=norm)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
def test_small_integers_at_a_real_head() -> None:
    """Thousands of ties over all ranges, exact: ids by torch.equal."""
    for dtype in TOLERANCE:
        hidden = small_integers(18, 64, dtype=dtype).to(DEVICE)
        head = small_integers(128_256, 64, dtype=dtype, seed=1).to(DEVICE)
        for k in (8, 64):
            want = reference.exit_topk(hidden.double(), head.double(), k)
            got = ek.exit_topk(hidden, head, k)
            assert torch.equal(got[1], want[1])
            assert torch.equal(got[0], want[0])


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["exit_topk", "exit_draft", "sample_draft"])
def test_registered_whole(op: str) -> None:
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in SAMPLES[op]().items()}
    schema = getattr(torch.ops.eesd, op).default._schema.arguments
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh buffers
    arguments = [given.get(a.name, 1e-5 if a.name == "eps" else None) for a in schema]
    torch.library.opcheck(getattr(torch.ops.eesd, op).default, arguments)


@pytest.mark.gpu
def test_graph_replay(real: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, norm = real
    hidden = hidden[:21].clone()
    want = ek.exit_topk(hidden, head, 8, norm_weight=norm)
    out, graph = tuple(torch.empty_like(t) for t in want), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ek.exit_topk(hidden, head, 8, norm_weight=norm, out=out)
    hidden.copy_(hidden.flip(0))
    for _ in range(3):
        for t in out:
            t.fill_(77)
        graph.replay()
        assert all(torch.equal(a, b.flip(0)) for a, b in zip(out, want, strict=True))


@pytest.mark.gpu
def test_polling_changes_no_bits(real: tuple[Tensor, Tensor, Tensor]) -> None:
    """Call upon call, so that each takes the records' memory of the one before."""
    hidden, head, norm = real
    for rows in (1, 16, 64, 200):
        x = [hidden.roll(i, 0)[:rows].clone() for i in range(10)]
        want = [run(part, head, 8, norm=norm, poll=False) for part in x]
        torch.cuda.synchronize()
        got = [run(part, head, 8, norm=norm) for part in x]
        for a, b in zip(got, want, strict=True):
            assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True)), rows


@pytest.mark.gpu
def test_compiles_as_one_graph(real: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, head, norm = real

    def step(x: Tensor) -> Results:
        values, ids, lse = torch.ops.eesd.exit_topk(x * 2, head, 8, norm, 1e-5)
        return values - lse[:, None], ids

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(hidden[:6]), step(hidden[:6])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
