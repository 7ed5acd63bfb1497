"""Workers: whether, and when, another worker is started in the place of one that could not start."""

from __future__ import annotations

from collections.abc import Sequence


class FailedStarts:
    """Counts workers that did not get ready, in a row, and says when the next one is due.

    One that raises will hardly do better the next time. One whose process was ended (by somebody, or because memory was
    short while many started) is not at fault: many more of these are replaced, later and later. Knows no clock.

    Parameters
    ----------
    errors : workers in a row that may raise, the last of which is not replaced.
    kills : the same for processes that were ended.
    pauses : seconds before the next one, by how many were ended; the last holds for all others.
    """

    def __init__(self, errors: int, kills: int, pauses: Sequence[float]) -> None:
        self.errors, self.kills = errors, kills
        self._pauses = pauses
        self._raised = self._ended = 0
        self._due: list[float] = []

    @property
    def waiting(self) -> int:
        """Workers that are due later."""
        return len(self._due)

    def joined(self) -> None:
        """Take note that a worker is ready: counting begins anew."""
        self._raised = self._ended = 0

    def raised(self, now: float) -> bool:
        """Take note that a worker raised; return whether another one is started."""
        self._raised += 1
        if self._raised >= self.errors:
            return False
        self._due.append(now)
        return True

    def ended(self, now: float) -> bool:
        """Take note that a worker's process ended before it was ready; return whether another one is started."""
        self._ended += 1
        if self._ended >= self.kills:
            return False
        self._due.append(now + self._pauses[min(self._ended, len(self._pauses)) - 1])
        return True

    def take(self, now: float) -> int:
        """Return how many workers are due, which are not any more then."""
        later = [due for due in self._due if due > now]
        count, self._due = len(self._due) - len(later), later
        return count
