"""What a verification found, gathered so that one problem does not hide the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamapro_jax.errors import UserError


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    file: where. subject: the tensor, leaf, row or key in it, if there is one. expected: None where
    `found` is a whole message.
    """

    file: str
    subject: str | None
    found: str
    expected: str | None = None

    def __str__(self) -> str:
        if self.expected is None:
            # Messages begin with the file themselves.
            return self.found if self.found.startswith(self.file) else f"{self.file}: {self.found}"
        subject = f"{self.subject}: " if self.subject else ""
        return f"{self.file}: {subject}found {self.found}, expected {self.expected}"


@dataclass
class Findings:
    """path: what was verified. kind: what it is. checked: how many of what. notes: what was not
    checked, and what was proven."""

    path: str
    kind: str
    checked: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems

    def problem(
        self, file: str | Path, subject: str | None, found: object, expected: object
    ) -> None:
        self.problems.append(Problem(str(file), subject, str(found), str(expected)))

    def compare(
        self, file: str | Path, subject: str | None, found: object, expected: object
    ) -> bool:
        """Whether both are the same; a problem when they are not."""
        if found != expected:
            self.problem(file, subject, found, expected)
        return found == expected

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number

    @contextmanager
    def collecting(self, file: str | Path) -> Iterator[None]:
        """What the block raises, of input and of the system, becomes a problem of `file`."""
        try:
            yield
        except (UserError, OSError) as error:
            self.problems.append(Problem(str(file), None, str(error)))

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "good": self.good,
            "checked": self.checked,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": self.notes,
        }

    def as_text(self) -> str:
        counts = ", ".join(f"{number:,} {what}" for what, number in self.checked.items())
        verdict = "good" if self.good else f"NOT GOOD, {len(self.problems)} problems"
        counts = f" ({counts} checked)" if counts else ""
        lines = [f"{self.path}: {self.kind}: {verdict}{counts}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@contextmanager
def progress(label: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; the block calls what it gets with how much was done since."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    disable = not (shown and console.is_terminal)
    with Progress(console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, advance=done)
