"""The benches of laws run through on a CPU, few draws each, and write files that are in order."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import eesd.captures
from bench import engine_laws, joint_laws
from bench.check_results import problems
from bench.exact_texts import joint_law


def run(
    bench: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> list[dict[str, Any]]:
    """The rows that it wrote."""
    name = bench.__name__.partition(".")[2]
    command = [f"bench/{name}.py", "--device", "cpu", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    path = out / "cpu" / f"{name}.json"
    assert not list(problems(path))
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_joint_laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_laws, "VOCABS", (5,))
    monkeypatch.setattr(joint_laws, "QUICK", 300)
    rows = run(joint_laws, tmp_path, monkeypatch, "--quick")
    assert [row["op"] for row in rows].count("verify_linear") == 4
    assert all(row["draws"] == 300 and row["launches"] is None for row in rows)
    assert min(row["p_value"] for row in rows) > 1e-3


def test_engine_laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eesd.captures, "CAPTURES_ON_CPU", False)  # what it sets ends with the test
    rows = run(
        engine_laws, tmp_path, monkeypatch, "--vocabularies", "5", "--schedules", "thompson",
        "--draws", "900", "--batch", "300",
    )  # fmt: skip
    assert [row["law"] for row in rows] == ["plain", "rejection", "block", "coupled"]
    assert all(row["captured"] and row["draws"] == 900 for row in rows)
    assert rows[3]["ids_equal"] is True
    assert all(0 < row["draft_acceptance_rate"] < 1 for row in rows[1:])


def test_another_law_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eesd.captures, "CAPTURES_ON_CPU", False)
    monkeypatch.setattr(engine_laws, "LAWS", ())
    flat = lambda p: p.sqrt() / p.sqrt().sum(-1, True)  # noqa: E731
    monkeypatch.setattr(engine_laws, "joint_law", lambda p: joint_law(flat(p)))
    with pytest.raises(SystemExit, match="1 rows do not have their law"):
        run(engine_laws, tmp_path, monkeypatch, "--vocabularies", "5", "--draws", "2000")
