"""The two plots that an evaluation is judged by at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark_backend.plot import INK, Plot


def write_reliability(bins: Sequence[Sequence[tuple[float, float, int]]], path: Path) -> None:
    """Predicted against observed survival, a series a slot; the diagonal is perfect calibration."""
    plot = Plot("predicted", "observed", 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    plot.line((0, 0), (1, 1), INK)
    for slot, rows in enumerate(bins):
        plot.series([(x, y) for x, y, _ in rows], slot, f"slot {slot + 1}")
    plot.write(path)


def write_acceptance(rates: Mapping[str, Sequence[float]], path: Path) -> None:
    """Conditional acceptance by slot, a series a name (sources, temperatures)."""
    size = max(len(values) for values in rates.values())
    plot = Plot("slot", "accepted", size + 0.5, list(range(1, size + 1)))
    for number, (name, values) in enumerate(rates.items()):
        plot.series([(k + 1.0, value) for k, value in enumerate(values)], number, name)
    plot.write(path)
