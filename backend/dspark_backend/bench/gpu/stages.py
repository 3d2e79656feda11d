"""Stages of a check that has only so much time: what each said, and what was not run and why."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.host import HostFacts

SCHEMA_VERSION: Final = 1

Facts = dict[str, Any]


class Ending(StrEnum):
    """``passed``: it ran, and what it checks holds. ``failed``: it does not hold. ``broken``: it
    could not run to its end. ``skipped``: there was no time left for it."""

    PASSED = "passed"
    FAILED = "failed"
    BROKEN = "broken"
    SKIPPED = "skipped"


class CheckFailedError(Exception):
    """What a stage checks does not hold."""


class StageReport(BaseModel):
    """One stage: ``facts`` are its figures, as JSON; ``said`` is why it did not pass."""

    model_config = ConfigDict(frozen=True)

    name: str
    ending: Ending
    seconds: float
    facts: Facts = {}
    said: str = ""


class GpuReport(BaseModel):
    """The JSON of a check."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    stages: tuple[StageReport, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage ran and held."""
        return all(stage.ending is Ending.PASSED for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Stage:
    """``run`` is given the seconds that are left, and returns its facts; it raises
    :class:`CheckFailedError` where what it checks does not hold."""

    name: str
    run: Callable[[float], Facts]


def run_stages(
    stages: Sequence[Stage],
    limit_s: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_stage: Callable[[StageReport], None] | None = None,
) -> tuple[StageReport, ...]:
    """All of ``stages``, one after the other; after ``limit_s`` the one that runs is ended, and no
    further one begun. A stage that dies keeps no other from running.

    To be called in the main thread, which the end of the time interrupts."""
    began = clock()
    reports = []
    for stage in stages:
        started = clock()
        left_s = limit_s - (started - began)
        facts: Facts = {}
        said = ""
        if left_s <= 0.0:
            ending, said = Ending.SKIPPED, f"the {limit_s:.0f} s of the check were over"
        else:
            try:
                with _at_most(left_s):
                    facts, ending = stage.run(left_s), Ending.PASSED
            except CheckFailedError as failure:
                ending, said = Ending.FAILED, str(failure)
            except Exception as error:
                # Whatever it is, it is this stage's: the others' answers are worth having.
                ending, said = Ending.BROKEN, f"{type(error).__name__}: {error}"
        report = StageReport(
            name=stage.name, ending=ending, seconds=clock() - started, facts=facts, said=said
        )
        reports.append(report)
        if on_stage is not None:
            on_stage(report)
    return tuple(reports)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in this block when it takes longer."""

    def over(number: int, frame: object) -> None:
        raise TimeoutError(f"not over after {seconds:.0f} s, when the time of the check was")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def markdown(report: GpuReport) -> str:
    """The report for people: a line a stage, then a table of each one's figures."""
    host = report.host
    versions = ", ".join(f"{name} {version}" for name, version in host.packages.items())
    lines = [
        "# GPU check",
        "",
        f"{host.gpu or 'no GPU'}; {host.cpu}, {host.cores} cores; {versions}",
        "",
        "| stage | ending | seconds | |",
        "|---|---|---|---|",
    ]
    for stage in report.stages:
        said = " ".join(stage.said.split()).replace("|", "\\|")[:300]
        lines.append(f"| {stage.name} | {stage.ending.value} | {stage.seconds:.1f} | {said} |")
    for stage in report.stages:
        if stage.facts:
            lines += ["", f"## {stage.name}", "", *_table(stage.facts)]
    return "\n".join(lines) + "\n"


def _table(facts: Facts) -> list[str]:
    rows = facts.get("rows")
    lines = ["| what | figure |", "|---|---|"]
    lines += [f"| {name} | {_figure(value)} |" for name, value in facts.items() if name != "rows"]
    lines = lines if len(lines) > 2 else []
    if rows:
        columns = list(rows[0])
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [
            "| " + " | ".join(_figure(row.get(name)) for name in columns) + " |" for row in rows
        ]
    return lines


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
