"""Random words inside kernels: Philox bit for bit, uniforms and race noise as the reference's."""

import pytest
import torch
import triton
import triton.language as tl

from eesd_kernels import reference
from eesd_kernels.reference.philox import accept_uniform, race_exponential
from eesd_kernels.triton import random

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _words(ids_ptr, seed_ptr, position_ptr, base_ptr, node_ptr, out_ptr, PURPOSE, N: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, N)
    words = random.words_of_ids(
        tl.load(ids_ptr + at), tl.load(position_ptr + row), tl.load(base_ptr + row), PURPOSE,
        tl.load(seed_ptr + row), tl.load(node_ptr + row),
    )  # fmt: skip
    tl.store(out_ptr + row * N + at, words.to(tl.int64))


@triton.jit
def _block(seed_ptr, position_ptr, base_ptr, out_ptr, FIRST, PURPOSE, N: tl.constexpr):
    words = random.words_of_block(
        FIRST, tl.load(position_ptr), tl.load(base_ptr), PURPOSE, tl.load(seed_ptr), N
    )
    tl.store(out_ptr + tl.arange(0, N), words.to(tl.int64))


@triton.jit
def _noise(words_ptr, uniform_ptr, log_race_ptr, race_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    word = tl.load(words_ptr + at).to(tl.uint32)
    tl.store(uniform_ptr + at, random.accept_uniform(word))
    tl.store(log_race_ptr + at, random.log_race(word))
    tl.store(race_ptr + at, random.race_noise(word))


@pytest.mark.parametrize("purpose", [2, 3 + 256 * 5])
def test_words_have_the_reference_s_bits(purpose: int) -> None:
    rows, n = 5, 64
    ids = torch.randint(0, 151_936, (n,), dtype=torch.int32, device=DEVICE)
    seed = torch.tensor([0, -1, 2**62 + 12345, -(2**63), 7], device=DEVICE)
    position = torch.tensor([0, 1, 2**31 - 1, 5, -3], dtype=torch.int32, device=DEVICE)
    base, node = position.flip(0).contiguous(), torch.arange(rows, device=DEVICE).int()
    got = torch.empty(rows, n, dtype=torch.int64, device=DEVICE)
    _words[(rows,)](ids, seed, position, base, node, got, purpose, N=n)
    want = reference.philox_words(seed, position, base, purpose, ids, node)
    assert torch.equal(got, want)


def test_words_of_a_block_have_the_reference_s_bits() -> None:
    seed = torch.tensor([-(2**62) - 5], device=DEVICE)
    position, base = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (2**31 - 1, 17))
    got = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _block[(1,)](seed, position, base, got, 151_936 - 64, 2, N=64)
    ids = torch.arange(151_936 - 64, 151_936, device=DEVICE)
    want = reference.philox_words(seed, position, base, 2, ids)
    assert torch.equal(got, want[0])


def test_noise_of_a_word() -> None:
    ends = torch.tensor([0, 1, 2, 255, 256, 2**23, 2**24 + 1, 2**25 + 3, 2**31, 2**32 - 1])
    small = (torch.rand(3072) * 32).exp2().long()  # where a noise is small, and wins
    words = torch.cat((ends, torch.randint(0, 2**32, (1014,)), small)).to(DEVICE)
    uniform, log_race, race = (torch.empty(4096, device=DEVICE) for _ in range(3))
    _noise[(1,)](words, uniform, log_race, race, N=4096)
    assert torch.equal(uniform.double(), accept_uniform(words))
    torch.testing.assert_close(
        log_race.double(), race_exponential(words).log(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(race.double(), race_exponential(words), rtol=4e-7, atol=0)
