"""The test that joint tables are put to is SciPy's, and sees what it is there to see."""

import pytest
import torch
from scipy import stats

from bench.joint_tables import Candidates, World, chi_square, linear_counts, tree_counts
from eesd_kernels import Law

LAWS = pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)


@pytest.mark.parametrize("cells", [2, 25, 289, 4913])
def test_is_scipys_where_no_cell_is_rare(cells: int) -> None:
    g = torch.Generator().manual_seed(cells)
    law = torch.rand(cells, generator=g, dtype=torch.float64) + 0.1
    law /= law.sum()
    counts = torch.bincount(torch.multinomial(law, 200 * cells, True, generator=g), minlength=cells)
    for other in (law, law.flip(0)):
        want = stats.chisquare(counts.numpy(), (other * 200 * cells).numpy()).pvalue
        got = chi_square(counts.view(1, -1), other.view(1, -1))
        assert got.degrees == cells - 1
        assert got.p_value == pytest.approx(want, rel=1e-6, abs=1e-200)


def test_rare_cells_count_as_one_and_empty_ones_not_at_all() -> None:
    law = torch.tensor([0.5, 0.4, 0.06, 0.03, 0.01, 0.0])
    fit = chi_square(torch.tensor([45, 44, 8, 2, 1, 0]), law)  # 6 + (3 + 1 -> 4, + 6 -> 10)
    assert fit.degrees == 2
    assert fit.p_value == pytest.approx(
        stats.chisquare([45, 44, 11], [50, 40, 10]).pvalue, rel=1e-6
    )
    assert chi_square(torch.tensor([45, 44, 8, 2, 0, 1]), law).p_value == 0


@LAWS
def test_tables_of_the_ops(law: Law) -> None:
    draws = 600 if law is Law.BLOCK else 20_000  # block verification is Python on a CPU
    world = World(5, 3)
    counts = linear_counts(world, law, law, draws)
    assert int(counts.sum()) == draws
    assert chi_square(counts, world.law()).p_value > 1e-3
    assert chi_square(tree_counts(world, (2,), law, law, 600), world.law()).p_value > 1e-3


def test_candidates_of_another_temperature_would_show() -> None:
    row = Candidates(5)
    for n in (1, 2):
        counts = row.counts(n, Law.SAMPLED, 0.7, 300_000)
        assert chi_square(counts, row.law(n, 0.7)).p_value > 1e-3
        assert chi_square(counts, row.law(n, 0.73)).p_value < 1e-3
