"""Typed reads of a JSON object: what is missing or of another kind is named."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` naming the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Fields:
    """A JSON object; a `ValueError` names the field, what fits and what came."""

    content: dict[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> ValueError:
        got = self.content.get(name)
        return ValueError(f"{self.where}: {name}: expected {expected}, got {got!r}")

    def refuse(self, name: str, whose: str = "") -> None:
        """Where the field is present, and neither null nor false nor empty."""
        if value := self.content.get(name):
            raise ValueError(f"{self.where}: {name} = {value!r} is not supported{whose}")

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.content.get(name) is not None

    def size(
        self, name: str, default: int | None = None, most: int | None = None, *, least: int = 1
    ) -> int:
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, "an integer, 0 or more" if least == 0 else "a positive integer")
        if most is not None and value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "a number")
        if not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """False where it is absent or null."""
        value = self.content.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true or false")
        return bool(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.content.get(name)
        if not isinstance(value, dict | None):
            raise self.wrong(name, "an object or null")
        return value or {}

    def token(self, name: str) -> int | None:
        value = self.content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise self.wrong(name, "an integer or null")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.wrong(name, "an integer, a list of integers or null")
        return tuple(ids)

    def architecture(self) -> Any:
        names = self.content.get("architectures")
        if not isinstance(names, str | list | None):
            raise self.wrong("architectures", "a list of names")
        names = [names] if isinstance(names, str) else names or [self.content.get("model_type")]
        return names[0]
