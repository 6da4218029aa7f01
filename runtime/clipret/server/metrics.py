"""Counters of a service in Prometheus' text format, version 0.0.4. All of it belongs to the event loop."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

__all__ = ["Gauge", "Metrics"]

Labels = tuple[tuple[str, str], ...]
Gauge = tuple[str, Mapping[str, str], float]

_BUCKETS = {
    "clipret_request_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    "clipret_batch_size": (1, 2, 4, 8, 16, 32, 64, 128),
}
_HELP = {
    "clipret_requests_total": "Requests answered, by route and status.",
    "clipret_request_seconds": "Time from the request's header to the end of its answer, by route.",
    "clipret_batch_size": "Searches that the engine was given at once.",
    "clipret_waiting": "Searches that wait for the engine.",
    "clipret_pictures": "Live pictures of a gallery.",
    "clipret_reloads_total": "States of a gallery that were loaded.",
    "clipret_reload_failing": "1 while a gallery's last change could not be loaded.",
}


class Metrics:
    """What the service counts. Labels are routes and gallery names, never what a client chose."""

    def __init__(self) -> None:
        self._counts = defaultdict[tuple[str, Labels], float](float)
        self._histograms = dict[tuple[str, Labels], tuple[list[int], float]]()

    def count(self, name: str, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = name, tuple(sorted(labels.items()))
        buckets = _BUCKETS[name]
        counts, total = self._histograms.get(key) or ([0] * (len(buckets) + 1), 0.0)
        counts[bisect_left(buckets, value)] += 1
        self._histograms[key] = counts, total + value

    def text(self, gauges: Sequence[Gauge]) -> str:
        """Everything, with the values that only the present moment knows."""
        now = {(name, tuple(sorted(labels.items()))): value for name, labels, value in gauges}
        lines, named = list[str](), set[str]()

        def head(name: str, kind: str) -> None:
            if name not in named:
                named.add(name)
                lines.extend((f"# HELP {name} {_HELP[name]}", f"# TYPE {name} {kind}"))

        for (name, labels), value in sorted({**self._counts, **now}.items()):
            head(name, "counter" if name.endswith("_total") else "gauge")
            lines.append(f"{name}{_shown(labels)} {value:.15g}")
        for (name, labels), (counts, total) in sorted(self._histograms.items(), key=lambda entry: entry[0]):
            head(name, "histogram")
            for bound, below in zip((*map(str, _BUCKETS[name]), "+Inf"), accumulate(counts), strict=True):
                lines.append(f"{name}_bucket{_shown((*labels, ('le', bound)))} {below}")
            lines.append(f"{name}_sum{_shown(labels)} {total:.9g}")
            lines.append(f"{name}_count{_shown(labels)} {sum(counts)}")
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
