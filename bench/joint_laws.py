"""The ops' draws on narrow vocabularies: chi-square of joint tables against their exact laws.

Two tokens by `verify_linear` and `verify_tree` under every law, with rounds that stop at the first
token continued by a second; one child and two without replacement by `sample_draft`. Both forms of
the verifiers run: the race in all rows, and in the one where the walk stopped. Splits are of 8 ids,
so that a row of 17 has three. `p_value_of_another_law` is the same counts' against the law at a
temperature 1.01 times as high: what the test would see. Exits with 1 where a p-value is at most
1e-3.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from bench.harness import arguments, print_table
from bench.joint_tables import Candidates, World, chi_square, linear_counts, tree_counts
from bench.results import write_results
from eesd_kernels import Law

LEAST, ANOTHER = 1e-3, 1.01
VOCABS = (5, 17)
DRAWS, QUICK = 1_000_000, 1500
LAUNCHES: dict[str, dict[str, int]] = {
    "race in all rows": {"FOLD_BELOW": 1 << 60},
    "race in one": {"FOLD_BELOW": 0, "PROGRAMS": 1, "RACING": 1},
    "race in one, by several": {"FOLD_BELOW": 0, "PROGRAMS": 1, "RACING": 1 << 60},
}
"""Constants of `eesd_kernels.triton.rows`: one program a row takes all its splits in turn, or one
that races takes one."""
SPLIT = 8
TREES = {"2 and 2": (2, 2), "4": (4,)}
DRAWN = {"sampled": 0.7, "coupled": 1.0, "block": 1.6}
"""Temperatures of `sample_draft`. A deterministic draft is no draw: it has the best candidates."""

Row = dict[str, object]


def main() -> None:
    """Count, print a table, write `joint_laws.json`."""
    args = arguments(__doc__.splitlines()[0])
    draws = QUICK if args.quick else DRAWS
    rows: list[Row] = []
    for vocab in VOCABS:
        for launches in LAUNCHES if args.device == "cuda" else [None]:
            with _launched(launches):
                rows += _verified(vocab, launches, draws, args.device)
        rows += _drawn(vocab, draws, args.device)
    print_table(rows)
    on = "cpu" if args.device == "cpu" else None
    print(write_results("joint_laws", rows, out=args.out, on=on))
    wrong = [row for row in rows if float(str(row["p_value"])) <= LEAST]
    if wrong:
        raise SystemExit(f"{len(wrong)} tables do not have their law")


@contextlib.contextmanager
def _launched(how: str | None) -> Iterator[None]:
    """The verifiers' kernels in one form; None: not on a GPU, as they are."""
    if how is None:
        yield
        return
    from eesd_kernels.triton import rows

    constants = {**LAUNCHES[how], "SPLIT": SPLIT}
    before = {name: getattr(rows, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(rows, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(rows, name, value)


def _verified(vocab: int, launches: str | None, draws: int, device: str) -> Iterator[Row]:
    linear, tree = World(vocab, 3, device), World(vocab, 4, device)
    for law in Law:
        counts = linear_counts(linear, law, law, draws)
        yield _row("verify_linear", law, "linear", "1", launches, counts, _laws(linear))
        for children, shape in TREES.items():
            counts = tree_counts(tree, shape, law, law, draws)
            yield _row("verify_tree", law, "tree", children, launches, counts, _laws(tree))


def _laws(world: World) -> tuple[Tensor, Tensor]:
    return world.law(), world.law(ANOTHER)


def _drawn(k: int, draws: int, device: str) -> Iterator[Row]:
    candidates = Candidates(k, device)
    for law, t in DRAWN.items():
        for n in (1, 2):
            counts = candidates.counts(n, Law[law.upper()], t, draws)
            laws = candidates.law(n, t), candidates.law(n, t * ANOTHER)
            yield {
                "temperature": t,
                **_row("sample_draft", Law[law.upper()], None, str(n), None, counts, laws),
            }


def _row(
    op: str,
    law: Law,
    draft: str | None,
    children: str,
    launches: str | None,
    counts: Tensor,
    laws: Sequence[Tensor],
) -> Row:
    fit, another = (chi_square(counts, law) for law in laws)
    return {
        "op": op,
        "law": law.name.lower(),
        "draft": draft,
        "children": children,
        "launches": launches,
        "V": counts.shape[0],
        "draws": int(counts.sum()),
        "degrees": fit.degrees,
        "p_value": fit.p_value,
        "p_value_of_another_law": another.p_value,
    }


if __name__ == "__main__":
    main()
