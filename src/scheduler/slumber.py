"""Sleep that was asked for and how long what still runs is waited for. Pure; owned by the loop, which tells the crew.

The model is on its way to sleep from the moment that somebody asks: nothing new is accepted, what is open is finished,
within a limit, and then the ranks give up their memory. A later wish replaces an earlier one. Whoever asked is
answered once things are as they were last wished to be.
"""


class Slumber:
    """The last wish, and who waits for it."""

    def __init__(self) -> None:
        self.level = 0
        """What was last asked for; see ``Rest``."""
        self.until_ns = 0
        """When what is still open is aborted, in monotonic nanoseconds."""
        self._askers: list[tuple[int, int]] = []

    def ask(self, frontend_no: int, query_no: int, level: int, until_ns: int) -> None:
        """A wish. A second one for sleep does not prolong the wait of the first."""
        if not self.level:
            self.until_ns = until_ns
        self.level = level
        self._askers.append((frontend_no, query_no))

    def is_settled(self, asleep: int, serving: bool) -> bool:
        """Whether the ranks are as was wished; one that sleeps more deeply does."""
        return asleep >= self.level if self.level else serving

    def take_askers(self) -> list[tuple[int, int]]:
        """(frontend number, query number) of all who wait, once."""
        askers, self._askers = self._askers, []
        return askers
