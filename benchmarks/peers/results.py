"""What was measured of each server, and the table that sets ours beside the better peer."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

OURS = "Shoal"


@dataclass(frozen=True, slots=True)
class Measure:
    """A row of the table."""

    name: str
    higher_is_better: bool


READY = Measure("start to ready, s", higher_is_better=False)
PREFILL = Measure("prefill, tok/s", higher_is_better=True)


def throughput(streams: int) -> Measure:
    return Measure(f"{_streams(streams)}: tok/s", higher_is_better=True)


def tpot(streams: int) -> Measure:
    return Measure(f"{_streams(streams)}: TPOT p50, ms", higher_is_better=False)


def ttft(streams: int, share: str) -> Measure:
    return Measure(f"{_streams(streams)}: TTFT {share}, ms", higher_is_better=False)


def _streams(count: int) -> str:
    return f"{count} stream{'s' * (count > 1)}"


class Results:
    """One value a server, measure and round."""

    def __init__(self) -> None:
        self._values: dict[Measure, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, server: str, values: Mapping[Measure, float]) -> None:
        for measure, value in values.items():
            self._values[measure][server].append(value)

    def servers(self) -> list[str]:
        return list(dict.fromkeys(name for servers in self._values.values() for name in servers))

    def median(self, measure: Measure, server: str) -> float:
        """Of all rounds; 0 where it was not taken."""
        return statistics.median(self._values[measure][server] or [0.0])

    def table(self) -> str:
        """Markdown: the medians of all rounds, and the ratio of ours to the better peer of the same round."""
        names = self.servers()
        compared = OURS in names and len(names) > 1
        heads = ["measure", *names, *(["ours ÷ better peer"] if compared else [])]
        lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
        for measure, servers in self._values.items():
            cells = [_shown(statistics.median(servers[name])) if servers[name] else "–" for name in names]
            if compared:
                cells.append(_ratio(measure, servers))
            lines.append(f"| {measure.name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _ratio(measure: Measure, servers: Mapping[str, list[float]]) -> str:
    """The median of the rounds' ratios; after it the lowest and the highest, where there are several."""
    better = max if measure.higher_is_better else min
    peers = [values for name, values in servers.items() if name != OURS and values]
    rounds = zip(servers[OURS], *peers, strict=False)
    ratios = [ours / better(others) for ours, *others in rounds if others and better(others)]
    if not ratios:
        return "–"
    text = f"{statistics.median(ratios):.2f}"
    return text if len(ratios) == 1 else f"{text} ({min(ratios):.2f}–{max(ratios):.2f})"


def _shown(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
