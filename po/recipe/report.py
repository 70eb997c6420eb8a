"""What is wrong with a recipe, all of it, and what was translated in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from po.errors import UserError
from po.recipe.text import Keys, show


@dataclass
class Report:
    """Collects while a recipe is read; `stop` ends it with everything that was wrong, in one message."""

    file: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # the top-level keys that something is wrong in
    origin: dict[Keys, str] = field(default_factory=dict)  # a place in the recipe: how the user wrote it

    def wrong(self, at: Keys, message: str) -> None:
        """A problem at a place of the recipe (in its own terms, so with what the user wrote where that differs)."""
        self.broken |= {str(at[0])} if at else set()
        written = next((self.origin[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self.origin), None)
        place = f"{show(at)} ({written})" if written and show(at) else show(at)
        self.problems.append(": ".join(part for part in (self.file, place, message) if part))

    def note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)

    def stop(self) -> None:
        """Raise UserError if anything was wrong."""
        if len(self.problems) == 1:
            raise UserError(self.problems[0])
        if self.problems:
            raise UserError(
                "\n".join([f"{self.file}: {len(self.problems)} problems", *(f"  {p}" for p in self.problems)])
            )
