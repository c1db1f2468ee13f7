"""A split's race without most logarithms: the winner is that of all keys."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from eesd_kernels import reference
from eesd_kernels.triton import splits
from eesd_kernels.triton.random import race_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST, POSITION, BASE, BLOCK, RACES = 4096, 77, 3, 64, 20
THREADS = BLOCK // splits.EACH.value
INF = math.inf


@triton.jit
def _race(below_ptr, seed_ptr, noise_ptr, key_ptr, id_ptr, FIRST, POSITION, BASE, N: tl.constexpr):
    race = tl.program_id(0)
    seed = tl.load(seed_ptr + race)
    below = tl.load(below_ptr + race * N + splits.ids_of(0, N))
    key, who = splits.race_split(below, FIRST, POSITION, BASE, seed, N)
    tl.store(key_ptr + race, key)
    tl.store(id_ptr + race, who)
    words = splits.words_of_tile(FIRST, POSITION, BASE, splits.TARGET, seed, N)
    tl.store(noise_ptr + race * N + splits.ids_of(0, N), race_noise(words))


def tile(kind: str) -> Tensor:
    """Exponents below the largest of each race `[RACES, BLOCK]`."""
    torch.manual_seed(len(kind))
    below = torch.randn(RACES, BLOCK) * {"flat": 0.0, "near": 1.0, "peaked": 9.0}.get(kind, 4.0)
    below -= below.amax(1, keepdim=True)
    if kind == "two":  # about as likely, and all else far below
        below -= 40
        below[:, 20] = below[:, 20 + BLOCK // 2] = 0.0
    if kind == "two of one thread":
        below -= 40
        below[:, 20], below[:, 22] = 0.0, -1.0
    if kind == "few kept":
        below[torch.rand(RACES, BLOCK) < 0.95] = -INF
        below[:, 5] = 0.0
    if kind == "the best is out":  # and all else so far below that a bound overflows
        below = below * 0.1 - 110
        below[:, 9] = -INF
    if kind == "nobody":
        below[:] = -INF
    return below.to(DEVICE)


KINDS = (
    "flat", "near", "spread", "peaked", "two", "two of one thread", "few kept", "the best is out",
    "nobody",
)  # fmt: skip


def run(below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, keys and ids."""
    seed = torch.arange(RACES, device=DEVICE) * 1_000_003 + 5
    noise, key = torch.empty_like(below), below.new_empty(RACES)
    ids = torch.empty(RACES, dtype=torch.int32, device=DEVICE)
    _race[(RACES,)](below, seed, noise, key, ids, FIRST, POSITION, BASE, N=BLOCK)
    return noise, key, ids


@pytest.mark.parametrize("kind", KINDS)
def test_winner(kind: str) -> None:
    below = tile(kind)
    noise, key, ids = run(below)
    keys = noise.double() * (-below.double()).exp2()
    best = keys.min(1)
    torch.testing.assert_close(key.double(), best.values, rtol=3e-6, atol=0)  # exp2 of up to 110
    if kind == "nobody":
        assert (ids == FIRST).all()
    else:
        assert torch.equal(ids.long(), best.indices + FIRST)


def test_both_ways_are_taken() -> None:
    """Races that one logarithm a thread decides, and races with a rival of the winner's thread."""
    seed, at = torch.arange(RACES) * 1_000_003 + 5, torch.full((RACES,), POSITION)
    ids = torch.arange(FIRST, FIRST + BLOCK)
    words = reference.philox_words(seed, at, torch.full((RACES,), BASE), 2, ids).to(DEVICE)

    def rivals(kind: str) -> Tensor:
        below = tile(kind)
        noise = run(below)[0]
        lift = (-below.double()).exp2()
        bound = (words / 2**32 * lift).view(RACES, -1, THREADS, 4).transpose(1, 2).flatten(2)
        bar = (noise.double() * lift).min(1).values * (1 + 2**-20)
        return (bound <= bar[:, None, None]).sum(2).amax(1) > 1

    assert not rivals("near").all()
    assert rivals("two of one thread").any()
    assert not rivals("two of one thread").all()


def test_a_winner_by_the_bound_alone_may_lose() -> None:
    """The twin: without a look at the rivals some races would go to the wrong id."""
    below = tile("two of one thread")
    noise, _key, ids = run(below)
    bound = (1 - (-noise.double()).exp()) * (-below.double()).exp2()
    assert (bound.argmin(1) + FIRST != ids.long()).any()
