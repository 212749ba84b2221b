"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds; on stderr."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts the work that is done, and shows the rate and the time left.

    Args:
        total: number of units of work; None where it is not known, and then no time left is shown.
        unit: name of the units in the plural (`records`, `tokens`).
        title: what is being done, shown before the figures.
        stream: where to write; a terminal gets a bar, anything else a line every ten seconds.

    Example:
        >>> with Progress(2, "records", title="embed") as progress:
        ...     progress.advance(2)
    """

    def __init__(self, total: int | None, unit: str, title: str = "", stream: TextIO | None = None):
        self._total, self._unit, self._title = total, unit, title or unit
        self._stream = stream or sys.stderr
        self.done, self._skipped, self._note = 0, 0, ""
        self._bar: Any = None
        self._task: Any = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self._title, total=self._total, rate="")
            self._bar.start()
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units that were done now.

        Args:
            note: another figure, shown beside the rate until the next one.
        """
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rates())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def skip(self, count: int) -> None:
        """Count units that an earlier run has done; they do not enter the rate."""
        self._skipped += count
        self.advance(count)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif time.monotonic() - self._began >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def _speed(self) -> float:
        return (self.done - self._skipped) / max(time.monotonic() - self._began, 1e-6)

    def _rates(self) -> str:
        per_second = self._speed()
        rate = f"{per_second:,.0f} {self._unit}/s" if per_second >= 10 else f"{per_second:.2g} {self._unit}/s"
        return f"{rate}, {self._note}" if self._note else rate

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        speed = self._speed()
        of = "" if self._total is None else f" of {self._total:,}"
        share = "" if self._total is None else f" ({self.done / max(self._total, 1):.0%})"
        line = f"{self._title}: {self.done:,}{of} {self._unit}{share}, {self._rates()}"
        if self._total is not None and speed > 0 and self.done < self._total:
            line += f", {duration((self._total - self.done) / speed)} left"
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A duration in words: `1:05` for 65 seconds, `2:00:00` for two hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
