"""The Beta sampler: its law against scipy, its stream against a float64 rewrite in numpy."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eesd_kernels import _C
from tests.csrc.philox_numpy import philox

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [0.05, 0.5, 1.0, 2.0, 5.0, 50.0, 1e4]
SMALLEST, LARGEST = np.float32(2.0**-126), np.float32(1 - 2.0**-24)
DRAWS = 1_000_000


def sample(alpha, beta, seed, position, buckets=1, status=None):
    alpha, beta = (np.ascontiguousarray(a, np.float32) for a in (alpha, beta))
    seed, position = np.ascontiguousarray(seed, np.int64), np.ascontiguousarray(position, np.int32)
    out = np.full(alpha.size, 7.0, np.float32)
    _C.sample_beta(
        *(a.ctypes.data for a in (alpha, beta, seed, position)),
        alpha.size,
        buckets,
        out.ctypes.data,
        status=0 if status is None else status.ctypes.data,
    )
    return out


def draws(alpha, beta, n=DRAWS, first_seed=0):
    """n samples that walk over seeds, positions and buckets alike."""
    buckets = 8
    row = np.arange(n // buckets)
    shape = np.ones(n, np.float32)
    return sample(shape * alpha, shape * beta, first_seed + row // 64, row % 64, buckets)


def ks_pvalue(samples, alpha, beta):
    """Kolmogorov-Smirnov on the float grid.

    A sample stands for every real that rounds to it (for an end, that is clamped to it), so the
    empirical P(out <= v) is compared with the law's mass below the midpoint to the next float.
    Evaluated at 4,000 order statistics: that can miss at most 1/4000 of the distance.
    """
    from scipy import stats  # here, since the children of the last test would import it in vain

    ordered = np.sort(samples)
    points = np.unique(ordered[np.linspace(0, len(ordered) - 1, 4000).astype(int)])
    empirical = np.searchsorted(ordered, points, side="right") / len(ordered)
    above = np.nextafter(points, np.float32(2)).astype(np.float64)
    edge = np.where(points >= LARGEST, 1.0, (points.astype(np.float64) + above) / 2)
    law = stats.beta(float(np.float32(alpha)), float(np.float32(beta)))
    return stats.kstwo.sf(np.abs(empirical - law.cdf(edge)).max(), len(ordered))


@pytest.mark.parametrize("beta", SHAPES)
@pytest.mark.parametrize("alpha", SHAPES)
def test_law(alpha, beta):
    out = draws(alpha, beta)
    assert out.min() >= SMALLEST
    assert out.max() <= LARGEST
    assert ks_pvalue(out, alpha, beta) > 1e-4  # 49 fixed cases; a wrong law gives 0
    from scipy import stats

    law = stats.beta(float(np.float32(alpha)), float(np.float32(beta)))
    variance, kurtosis = (float(x) for x in law.stats("vk"))
    sample, n = out.astype(np.float64), len(out)
    assert abs(sample.mean() - law.mean()) < 4 * np.sqrt(variance / n)
    # of a variance: its fourth central moment is (kurtosis + 3) variance^2
    assert abs(sample.var() - variance) < 4 * variance * np.sqrt((kurtosis + 2) / n)


@pytest.mark.parametrize(("alpha", "beta"), [(2, 5), (0.5, 0.5), (50, 50), (1e4, 1e4)])
def test_law_test_sees_a_wrong_law(alpha, beta):
    assert ks_pvalue(draws(alpha, beta), alpha * 1.01, beta) < 1e-4


@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 1e-3), (1e-3, 3e-3), (1e-30, 3e-30)])
def test_tiny_shapes_are_a_coin(alpha, beta):
    out = draws(alpha, beta, 80_000)
    assert np.isfinite(out).all()
    # Beyond float32 the law is its two ends, the upper with probability alpha / (alpha + beta).
    assert abs((out > 0.5).mean() - alpha / (alpha + beta)) < 5 / np.sqrt(len(out))


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(1e30, 1e30), (3e38, 1.0), (1.0, 3e38), (3e38, 1e-38), (1e-45, 1e-45), (1e7, 3e7)],
)
def test_extreme_shapes_stay_inside(alpha, beta):
    out = draws(alpha, beta, 8_000)
    assert ((out >= SMALLEST) & (out <= LARGEST)).all()
    if min(alpha, beta) >= 1e7:
        np.testing.assert_allclose(out, alpha / (alpha + beta), rtol=2e-3)


def beta_float64(alpha, beta, seed, position, bucket):
    """The stream of csrc/include/eesd/beta.h, in float64 with libm."""
    alpha, beta = np.float32(alpha).astype(np.float64), np.float32(beta).astype(np.float64)

    def words(purpose):
        return [
            w.astype(np.int64)
            for w in philox(seed & 0xFFFFFFFF, seed >> 32, bucket, position, 0, purpose)
        ]

    def uniform(w):
        return (w + 0.5) / 2**32

    logs, done = np.zeros((2, len(alpha))), np.zeros((2, len(alpha)), bool)
    for attempt in range(64):
        w = words(4 + 256 * attempt)
        low = (w[1] << 2) & 0xFFFFFFFF
        angle = (np.pi / 2) * ((w[1] >> 30) + (low - (low >= 2**31) * 2**32) / 2**32)
        radius = np.sqrt(-2 * np.log(uniform(w[0])))
        for side, (a, z, u) in enumerate(
            ((alpha, np.cos(angle), w[2]), (beta, np.sin(angle), w[3]))
        ):
            z = radius * z
            d = np.where(a < 1, a + 1, a) - 1 / 3
            v = np.maximum(1 + z / np.sqrt(9 * d), 1e-9) ** 3
            accepted = (v > 1e-12) & (np.log(uniform(u)) <= z**2 / 2 + d * (1 - v + np.log(v)))
            new = accepted & ~done[side]
            logs[side, new] = (np.log(d) + np.log(v))[new]
            done[side] |= accepted
    boost = words(5)
    for side, a in enumerate((alpha, beta)):
        logs[side] += np.where(a < 1, np.log(uniform(boost[side])) / a, 0)
    return 1 / (1 + np.exp(np.clip(logs[1] - logs[0], -700, 700)))


def test_stream_equals_the_float64_rewrite():
    rng = np.random.default_rng(3)
    n, buckets = 24_000, 6
    alpha, beta = np.exp(rng.uniform(np.log(0.2), np.log(300), (2, n))).astype(np.float32)
    seed = rng.integers(-(2**63), 2**63 - 1, n // buckets)
    position = rng.integers(0, 2**31 - 1, n // buckets).astype(np.int32)
    out = sample(alpha, beta, seed, position, buckets).astype(np.float64)
    want = beta_float64(
        alpha,
        beta,
        np.repeat(seed, buckets),
        np.repeat(position, buckets),
        np.tile(np.arange(buckets), n // buckets),
    )
    close = np.isclose(out, want, rtol=2e-5, atol=1e-7)
    # A draw whose acceptance hangs on float32's last bits may differ: about one in a million.
    assert (~close).sum() <= 1


def test_a_draw_depends_on_its_own_key_alone():
    n = 200
    alpha = np.linspace(0.1, 9, n)
    seed, position = np.arange(n) - 100, np.arange(n) * 3
    together = sample(alpha, alpha[::-1], seed, position)
    for i in (0, 63, 64, 65, 199):
        alone = sample(
            alpha[i : i + 1], alpha[::-1][i : i + 1], seed[i : i + 1], position[i : i + 1]
        )
        assert alone.view(np.uint32)[0] == together.view(np.uint32)[i]
    np.testing.assert_array_equal(sample(alpha, alpha[::-1], seed, position), together)


def test_draws_of_neighbouring_keys_are_uncorrelated():
    out = draws(2.0, 5.0, 64 * 8 * 2000).reshape(-1, 64, 8)
    centred = out.astype(np.float64) - out.mean()
    for a, b in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert abs((a * b).mean() / centred.var()) < 5 / np.sqrt(a.size)


def test_bad_shapes_stay_in_their_element():
    good = draws(2.0, 5.0, 200)
    alpha, beta = np.full(200, 2.0, np.float32), np.full(200, 5.0, np.float32)
    alpha[[3, 70]], beta[[5, 199]] = [0.0, np.nan], [-1.0, np.inf]
    status = np.full(200, -7, np.int32)
    row = np.arange(25)
    out = sample(alpha, beta, row // 64, row % 64, 8, status)
    bad = np.isin(np.arange(200), [3, 5, 70, 199])
    assert np.isnan(out[bad]).all()
    np.testing.assert_array_equal(out[~bad], good[~bad])
    np.testing.assert_array_equal(status, bad.astype(np.int32))


def test_refusals():
    with pytest.raises(ValueError, match="sample_beta: a size is negative"):
        _C.sample_beta(0, 0, 0, 0, 7, 2, 0)
    with pytest.raises(ValueError, match="sample_beta: a required pointer is null"):
        _C.sample_beta(0, 0, 0, 0, 8, 2, 0)
    assert sample([], [], [], []).size == 0


def digest():
    mixed = np.resize(np.float32([0.05, 0.7, 1, 3, 40, 1e4]), 6_000)
    out = sample(mixed, mixed[::-1], np.arange(1000), np.arange(1000), 6)
    return hashlib.sha256(out.tobytes()).hexdigest()


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_bits_do_not_depend_on_the_instruction_set(isa, tmp_path):
    # The root goes last, so that an installed package is not shadowed by the source folder.
    code = f"import sys; sys.path.append({str(ROOT)!r})\n"
    code += "from tests.csrc.test_beta import _C, digest; print(_C.isa(), digest())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EESD_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[0] in ("generic", isa)
    assert run.stdout.split()[1] == digest()
