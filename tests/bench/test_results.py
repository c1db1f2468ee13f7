"""The result files are in order, and what is not in order is seen."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.check_results import problems
from bench.results import ROOT, write_results

FILES = sorted(ROOT.rglob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_in_order(path: Path) -> None:
    assert not list(problems(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"commit": None}, "commit: expected str, got None"),
        ({"commit": "abc"}, "commit: expected"),
        ({"machine": "h200"}, "machine: expected 'cpu'"),
        ({"command": "python -m bench.nothing"}, "command: expected python -m bench"),
        ({"command": "python -m bench.main_job --out /tmp"}, "no path of a machine"),
        ({"rows": []}, "rows: expected at least one"),
        ({"rows": [{"V": "32k"}]}, r"rows[0]: V: expected a size, got '32k'"),
        ({"rows": [{"x_linear": -1.0}]}, "x_linear: expected a number above 0"),
        ({"rows": [{"ids_equal": "yes"}]}, "ids_equal: expected true"),
        ({"rows": [{"rows_equal": False}]}, "rows_equal: expected true"),
        ({"rows": [{"ceiling_share": 45.0}]}, "ceiling_share: expected a share"),
        ({"rows": [{"p_value": 1e-4}]}, "p_value: expected 0.001 to 1"),
        ({"rows": [{"p_value_of_another_law": 1.5}]}, "another_law: expected 0.0 to 1"),
        ({"rows": [{"us": 3.0, "us_p20": 4.0}]}, "us_p20 <= us <= us_p80"),
    ],
)
def test_sees_what_is_wrong(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    content = json.loads((ROOT / "cpu" / "main_job.json").read_text(encoding="utf-8"))
    path = tmp_path / "cpu" / "main_job.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    assert any(said in text for text in problems(path))


def test_slices_of_a_long_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row gives way to its like of a later slice, and has the commit it was measured on."""

    def measured(commit: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        monkeypatch.setattr(results, "_run", lambda *command: commit)
        path = write_results("some", list(rows), out=tmp_path, on="cpu", key=("B", "mode"))
        return list(json.loads(path.read_text())["rows"])

    first = measured("a", {"B": 1, "mode": "greedy", "us": 1}, {"B": 8, "mode": "greedy", "us": 2})
    assert [row["commit"] for row in first] == ["a", "a"]
    assert measured("b", {"B": 8, "mode": "greedy", "us": 3}, {"B": 8, "mode": "coupled"}) == [
        {"B": 1, "mode": "greedy", "us": 1, "commit": "a"},
        {"B": 8, "mode": "greedy", "us": 3, "commit": "b"},
        {"B": 8, "mode": "coupled", "commit": "b"},
    ]
