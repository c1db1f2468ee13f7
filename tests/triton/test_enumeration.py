"""The law of the verifiers' kernels by exact enumeration, through the interpreter.

Random words are given, not drawn. For every draft of a small world, a line of two tokens or two
siblings, the reference tells how many words pass each test, and for every place where a walk may
stop, up to which word each id still wins the race against the likeliest one: the chances of all
outcomes, which add up to the target's law. The kernels decide as the reference does on either side
of each of these borders.

A word's place in the counters: of the first test, the seed's lower half; of the second, the upper
bits of the position, whose lowest four tell the levels of a line apart, as the index does siblings;
of the race, a pair of ids in the base, the second of which has `AGAINST` and the first the seed's
upper half. All others finish last.
"""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels import Law, reference
from eesd_kernels.reference.philox import race_exponential
from eesd_kernels.triton import random
from eesd_kernels.triton.verify_linear import verify_linear
from eesd_kernels.triton.verify_tree import verify_tree

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="words are given by a patch"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities and NaN
]

VOCAB, LEVELS = 5, 2
IDS = ((1, 3), (4, 0))  # of the draft laws, by level; one id is in neither, two in one
WEIGHTS = ((0.7, 0.3), (0.4, 0.6))
TEMPERATURE = 0.8
PATHS = list(itertools.product(*IDS))
SIBLINGS = list(itertools.permutations((1, 3, 4), 2))
SHARES = {1: 0.5, 3: 0.3, 4: 0.2}  # of the law that draws siblings, one after the other
ALL, NONE, PAIR = 1 << 24, VOCAB + 1, 8  # words of a test; no id; base of a pair's digits
AGAINST, LAST = tl.constexpr(1 << 24), tl.constexpr(0xFFFFFF00)
NEAR = 4e-6  # of a border, what float32 sums and noise may move it by


class Probe(NamedTuple):
    """One sequence: its draft, law, words of the two tests, and the race's pair and word."""

    path: tuple[int, ...]  # or siblings
    law: Law
    tree: bool = False
    first: int = 0
    second: int = 0
    one: int = NONE
    other: int = NONE
    word: int = 0


@triton.jit
def given_words(c0, c1, c2, c3, k0, k1):
    """Instead of `philox4x32`."""
    test = tl.where(((c1 & 15) == 1) & (c0 == 0), k0, (c1 >> 4) << 8)
    pair = tl.where(c2 != 0, c2, k0)  # coupled rows race without a base, and test nothing
    one, other = pair & 7, (pair >> 3) & 7
    w0, w1, w2, w3 = c0 * 4, c0 * 4 + 1, c0 * 4 + 2, c0 * 4 + 3
    w0 = tl.where(w0 == one, k1, tl.where(w0 == other, AGAINST, LAST))
    w1 = tl.where(w1 == one, k1, tl.where(w1 == other, AGAINST, LAST))
    w2 = tl.where(w2 == one, k1, tl.where(w2 == other, AGAINST, LAST))
    w3 = tl.where(w3 == one, k1, tl.where(w3 == other, AGAINST, LAST))
    tests = c3 == 3
    return (tl.where(tests, test, w0), tl.where(tests, test, w1), tl.where(tests, test, w2),
            tl.where(tests, test, w3))  # fmt: skip


def words(seed: Tensor, position: Tensor, base: Tensor, purpose: int, ids: Tensor | int) -> Tensor:
    """The same words for the reference."""
    low, high, place = int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF, int(position)
    if purpose == 3:
        one = place & 15 == 1 and not int(ids)
        return torch.tensor([[low if one else place >> 4 << 8]])
    pair = int(base) or low
    assert isinstance(ids, int)
    out = torch.full((1, ids), LAST.value)
    for id, word in ((pair >> 3 & 7, AGAINST.value), (pair & 7, high)):
        if id < ids:
            out[0, id] = word
    return out


@cache
def target() -> Tensor:
    """Logits `[rows, VOCAB]`."""
    return torch.randn(LEVELS + 1, VOCAB, generator=torch.Generator().manual_seed(5))


def law_of(row: int) -> Tensor:
    return (target()[row].double() / TEMPERATURE).softmax(0)


def arguments_of(probes: list[Probe]) -> dict[str, Any]:
    each = {"dtype": torch.int32}
    tree, size = probes[0].tree, len(probes)
    pairs = [p.one + PAIR * p.other for p in probes]
    low = [
        pair if p.law == Law.COUPLED else p.first << 8
        for p, pair in zip(probes, pairs, strict=True)
    ]
    seeds = [(p.word << 32) + x for p, x in zip(probes, low, strict=True)]
    if tree:
        draft = {
            "node_ids": torch.tensor([[-1, *p.path] for p in probes], **each),
            "parent": torch.tensor([[-1, 0, 0]] * size, **each),
            "num_nodes": torch.full((size,), 3, **each),
            "q_ids": torch.tensor([[[*SHARES]] * 3] * size, **each),
            "q_probs": torch.tensor([[[*SHARES.values()]] * 3] * size),
        }
    else:
        draft = {
            "draft_ids": torch.tensor([[*p.path, 0, 0][:LEVELS] for p in probes], **each),
            "draft_length": torch.tensor([len(p.path) for p in probes], **each),
            "q_ids": torch.tensor([IDS] * size, **each),
            "q_probs": torch.tensor([WEIGHTS] * size),
        }
    return {
        "target_logits": target().expand(size, -1, -1).contiguous(),
        **draft,
        "law": torch.tensor([int(p.law) for p in probes], **each),
        "temperature": torch.full((size,), TEMPERATURE),
        "top_k": None, "top_p": None, "min_p": None,
        "seed": torch.tensor([s - (s >> 63 << 64) for s in seeds]),
        "position": torch.tensor([p.second << 4 for p in probes], **each),
        "base": torch.tensor([pair + 64 for pair in pairs], **each),
    }  # fmt: skip


def referee(probes: list[Probe]) -> tuple[Tensor, ...]:
    op = reference.verify_tree if probes[0].tree else reference.verify_linear
    return op(**arguments_of(probes), words=words)


def counts(probes: list[Probe]) -> tuple[Tensor, Tensor]:
    """Numbers accepted, and tokens."""
    results = referee(probes)
    return results[0], results[-2]


def borders(
    probes: list[Probe], field: str, most: int, holds: Callable[[Tensor, Tensor], Tensor]
) -> list[int]:
    """For each probe, how many words of a field (from 0 on, up to most) give a result that holds.

    holds: of numbers accepted and tokens.
    """
    low, high = [0] * len(probes), [most] * len(probes)
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        given = [{field: min(m, most - 1)} for m in middle]
        tried = [p._replace(**word) for p, word in zip(probes, given, strict=True)]
        yes = holds(*counts(tried)).tolist()
        for i, m in enumerate(middle):
            if low[i] < high[i]:
                low[i], high[i] = (m + 1, high[i]) if yes[i] else (low[i], m)
    return low


class Outcomes(NamedTuple):
    """Of a draft: the chance of each place to stop, and the laws of the token drawn there."""

    stops: list[float]
    draws: list[Tensor]


Border = tuple[Probe, str, int]


def race_at(here: Probe, m: int) -> tuple[Tensor, list[Border]]:
    """The law of the token behind m accepted ones, and the borders that tell it."""
    likeliest = int(counts([here])[1][0, m])
    others = [x for x in range(VOCAB) if x != likeliest]
    races, ids = [here._replace(one=x, other=likeliest) for x in others], torch.tensor(others)
    wins = borders(races, "word", AGAINST.value * 2, lambda _, tokens: tokens[:, m] == ids)
    law = torch.ones(VOCAB, dtype=torch.float64)
    for x, word in zip(others, wins, strict=True):
        sooner = race_exponential(torch.tensor([word, AGAINST.value]))
        law[x] = sooner[0] / sooner[1] if word else 0.0
    return law / law.sum(), [(race, "word", word) for race, word in zip(races, wins, strict=True)]


@cache
def enumerated(law: Law, path: tuple[int, ...], tree: bool) -> tuple[Outcomes, tuple[Probe, ...]]:
    """The outcomes of a draft, and probes beside every border that they are made of.

    Places to stop: behind none, one or both of a line; behind none, the first or the second of
    siblings.
    """
    any_ = Probe(path, law, tree)
    fails, heres, stops, tests = any_._replace(first=ALL - 1, second=ALL - 1), [any_], [1.0], []
    if path:
        heres = [fails, any_._replace(second=ALL - 1), any_]
        second = any_
        if tree or law == Law.BLOCK:  # tested if the first fails; alone
            second = any_._replace(first=ALL - 1)
        if tree:
            heres[2] = second
        one, two = (
            borders(
                [probe], field, ALL,
                lambda m, tokens, i=i: (m > 0) & (tokens[:, 0] == path[i]) if tree else m > i,
            )[0]
            for i, (probe, field) in enumerate(((heres[1], "first"), (second, "second")))
        )  # fmt: skip
        tests += [(heres[1], "first", one), (second, "second", two)]
        a, b = one / ALL, two / ALL
        stops = [1 - a, a * (1 - b), a * b]
        if tree:
            stops = [(1 - a) * (1 - b), a, (1 - a) * b]
        elif law == Law.BLOCK:
            stops = [(1 - b) * (1 - a), (1 - b) * a, b]
    draws = [torch.zeros(VOCAB, dtype=torch.float64) for _ in stops]
    for i, (here, chance) in enumerate(zip(heres, stops, strict=True)):
        if chance > 0:
            draws[i], more = race_at(here, min(i, 1) if tree else i)
            tests += more
    beside = []
    for probe, field, border in tests:
        step, most = 2 + int(border * NEAR), ALL if field != "word" else AGAINST.value * 2
        for word in (border - step, border + step):
            beside.append(probe._replace(**{field: min(max(word, 0), most - 1)}))
    return Outcomes(stops, draws), tuple(beside)


DRAWN, FIXED = (Law.SAMPLED, Law.BLOCK), Law.DETERMINISTIC


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_outcomes_of_a_line_have_the_targets_law() -> None:
    want = law_of(0)[:, None] * law_of(1)
    weights = [a * b for a, b in itertools.product(*WEIGHTS)]
    for law in (*DRAWN, FIXED):
        joint = [torch.zeros(VOCAB, VOCAB, dtype=torch.float64) for _ in PATHS]
        for path, table in zip(PATHS, joint, strict=True):
            (none, one, both), draws = enumerated(law, path, False)[0]
            table[path] += both
            table[path[0]] += one * draws[1]
            table += none * draws[0][:, None] * law_of(1)
            same(draws[2], law_of(2))
        if law == FIXED:  # nothing was drawn: each draft alone
            for table in joint:
                same(table, want)
        else:
            same(sum(w * table for w, table in zip(weights, joint, strict=True)), want)
            assert max(float((table - want).abs().max()) for table in joint) > 0.01
    same(enumerated(Law.COUPLED, (), False)[0].draws[0], law_of(0))


def test_the_outcomes_of_siblings_have_the_targets_law() -> None:
    for law in (Law.SAMPLED, FIXED):
        laws = []
        for one, other in SIBLINGS:
            (none, first, second), draws = enumerated(law, (one, other), True)[0]
            mine = none * draws[0]
            mine[one] += first
            mine[other] += second
            laws.append(mine)
            same(draws[1], law_of(1))
            if second > 0:
                same(draws[2], law_of(2))
        weights = [SHARES[a] * SHARES[b] / (1 - SHARES[a]) for a, b in SIBLINGS]
        if law == FIXED:
            for mine in laws:
                same(mine, law_of(0))
        else:
            same(sum(w * mine for w, mine in zip(weights, laws, strict=True)), law_of(0))
            assert max(float((mine - law_of(0)).abs().max()) for mine in laws) > 0.01


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("tree", [False, True], ids=["line", "siblings"])
def test_the_kernels_decide_alike_beside_every_border(
    tree: bool, split: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    split(4)
    monkeypatch.setattr(random, "philox4x32", given_words)
    if tree:
        cases = [(law, path) for law in (Law.SAMPLED, FIXED) for path in SIBLINGS[::2]]
    else:
        cases = [(law, path) for law in (*DRAWN, FIXED) for path in PATHS] + [(Law.COUPLED, ())]
    probes = [probe for law, path in cases for probe in enumerated(law, path, tree)[1]]
    want = referee(probes)
    got = (verify_tree if tree else verify_linear)(**arguments_of(probes))
    assert got is not None
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    # On either side of a border the outcome is another, but where there is no other side.
    differ = (want[-2][::2] != want[-2][1::2]).any(1)
    assert float(differ.double().mean()) > 0.7
