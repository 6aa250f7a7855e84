"""When the successor of a process that died may start: at once, and later and later if they die young."""

YOUNG_SECONDS = 10.0
FIRST_SECONDS = 0.1
LONGEST_SECONDS = 5.0


class Restarts:
    """Of one place. Time comes in."""

    def __init__(self) -> None:
        self._young = 0
        """How many in a row died young."""

    def delay_seconds(self, lived_ns: int) -> float:
        """For the successor of one that has lived for so long."""
        if lived_ns >= YOUNG_SECONDS * 1e9:
            self._young = 0
            return 0.0
        self._young += 1
        if self._young == 1:
            return 0.0
        return float(min(FIRST_SECONDS * 2 ** (self._young - 2), LONGEST_SECONDS))
