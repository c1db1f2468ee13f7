"""Philox4x32-10 (Salmon et al., SC 2011) and what is made of its words, for use inside kernels.

The words equal those of `csrc/include/eesd/philox.h` and of the reference bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds; every argument and result uint32, of one shape."""
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        h0, l0 = (p0 >> 32).to(tl.uint32), p0.to(tl.uint32)
        h1, l1 = (p1 >> 32).to(tl.uint32), p1.to(tl.uint32)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_of(index, position, base, purpose, seed):
    """The four words of the call at `index`: position, base int32, seed int64, as stored."""
    c0 = index.to(tl.uint32)
    zero = c0 ^ c0
    c1 = zero + position.to(tl.uint32, bitcast=True)
    c2 = zero + base.to(tl.uint32, bitcast=True)
    c3 = zero + purpose
    s = seed.to(tl.uint64, bitcast=True)
    k0 = zero + (s & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + (s >> 32).to(tl.uint32)
    return philox4x32(c0, c1, c2, c3, k0, k1)


@triton.jit
def words_of_ids(ids, position, base, purpose, seed, node=0):
    """The word of each id: word `id mod 4` of the call at `id div 4` (+ node * 2^26)."""
    index = (ids // 4).to(tl.uint32) + node * (1 << 26)
    w0, w1, w2, w3 = words_of(index, position, base, purpose, seed)
    lane = ids % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def accept_uniform(word):
    """24 bits in [0, 1), exact in float32."""
    return (word >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def log_race(word):
    """`log E` of the race noise `E = -log1p(-u)`, u = (word + 0.5) / 2^32 at most 1 - 2^-24."""
    # An odd 33-bit integer, so that (word + 0.5) / 2^32 is rounded to float32 once.
    u = (word.to(tl.uint64) * 2 + 1).to(tl.float32) * (1.0 / (1 << 33))
    u = tl.minimum(u, 1.0 - 1.0 / (1 << 24))
    # log1p(-u) without libdevice: 1 - u is exact to half an ulp for u >= 1/2; below, the quotient
    # log(y) (-u) / (y - 1) repairs the rounding of y = 1 - u (Kahan; HP-15C handbook, 1982).
    y = 1.0 - u
    e = tl.where(y == 1.0, u, tl.log(y) * u / (y - 1.0))
    return tl.log(e)


@triton.jit
def words_of_tile(first, position, base, purpose, seed, N: tl.constexpr):
    """The words `[N / 4, 4]` of the ids from `first` on, a Philox call a row; multiples of 4.

    A thread that has whole rows of a tile of logits has their words where it needs them.
    """
    index = first // 4 + tl.arange(0, N // 4)
    w0, w1, w2, w3 = words_of(index, position, base, purpose, seed)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([N // 4, 4])


@triton.jit
def words_of_block(first, position, base, purpose, seed, N: tl.constexpr):
    """The same as `[N]`."""
    return tl.reshape(words_of_tile(first, position, base, purpose, seed, N), (N,))


@triton.jit
def race_noise(word):
    """`E = -log1p(-u)` within 4e-7 of itself, u as in `log_race`.

    A race over many ids is as fast as this is short: no libdevice, no branch, no division.
    """
    # Rounded once up to 2^24 and, by the sticky last bit, from 2^31 on, where 1 - u is sensitive.
    odd = word | (word >> 31)
    u = tl.fma(odd.to(tl.float32), 1.0 / (1 << 32), 0.5 / (1 << 32))
    u = tl.minimum(u, 1.0 - 1.0 / (1 << 24))
    y = 1.0 - u
    # y = m / scale, m in [sqrt(1/2), sqrt(2)) and scale a power of two; s = 1 - m, rounded once.
    exponent = (y.to(tl.int32, bitcast=True) - 0x3F3504F3) & -0x800000
    scale = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    s = tl.fma(scale, u, 1.0 - scale)
    # (-log1p(-s) - s) / s^2: the best of degree 7 on that range, by Lawson's iteration in float64.
    q = tl.fma(s, 0.08994706720113754, 0.14417777955532074)
    q = tl.fma(s, q, 0.14874641597270966)
    q = tl.fma(s, q, 0.1655304729938507)
    q = tl.fma(s, q, 0.19964511692523956)
    q = tl.fma(s, q, 0.25002521276474)
    q = tl.fma(s, q, 0.33333900570869446)
    q = tl.fma(s, q, 0.49999985098838806)
    return tl.fma(exponent.to(tl.float32), -0.6931471805599453 / (1 << 23), tl.fma(s * s, q, s))
