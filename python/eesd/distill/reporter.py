"""Progress on stderr: a bar on a terminal where rich is installed, plain lines otherwise."""

import sys
from types import TracebackType
from typing import Any


class Reporter:
    """A context manager. `say` prints a line; `show` moves the bar, or prints a line."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Reporter":
        if not self.quiet and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            except ImportError:
                return self
            self._bar = Progress(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def show(self, progress: float, line: str) -> None:
        """Where the run stands; progress is 0 to 1."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(progress, 1.0), description=line)
        else:
            self.say(f"{progress:6.1%}  {line}")

    def warn(self, line: str) -> None:
        """A line that is printed even where quiet."""
        if self._bar is not None:
            self._bar.console.print(f"warning: {line}", style="bold yellow", markup=False)
        else:
            print(f"warning: {line}", file=sys.stderr, flush=True)
