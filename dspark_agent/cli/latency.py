"""The table that says where the wall clock of every step went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from dspark_agent.metrics import StepMetrics
    from dspark_agent.step import StepResult

_PARTS = ("queue_s", "prefill_s", "decode_s", "grammar_s", "verify_s", "tool_s", "overhead_s")


def latency_table(steps: Sequence[StepResult[Any]], labels: Sequence[str] = ()) -> Table:
    """One row a step and their sum; milliseconds, the parts in the order in which they happen.

    ``labels`` name the steps; a step without one goes by its kind. Cached tokens are those of the
    conversation so far that were not computed again.
    """
    table = Table(
        title="where the time went (ms)", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("step")
    for heading in ("queue", "prefill"):
        table.add_column(heading, justify="right")
    table.add_column("new / cached", justify="right")
    for heading in ("ttft", "decode", "grammar", "verify", "tool", "overhead", "total"):
        table.add_column(heading, justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("tok/s", justify="right")
    for number, step in enumerate(steps):
        label = labels[number] if number < len(labels) else step.kind.value
        table.add_row(f"{number + 1} {label}", *_cells(step.metrics))
    if len(steps) > 1:
        table.add_section()
        table.add_row("all", *_sums([step.metrics for step in steps]))
    return table


def one_line(metrics: StepMetrics) -> str:
    """A step's account in a line, for under its output."""
    read = metrics.prefill_new_tokens + metrics.prefill_cached_tokens
    cached = f", {metrics.prefill_cached_tokens / read:.0%} of the context cached" if read else ""
    tool = f", tools {_ms(metrics.tool_s)} ms" if metrics.tool_s else ""
    return (
        f"{metrics.total_s:.2f} s: first token after {_ms(metrics.ttft_s)} ms, "
        f"{metrics.new_tokens} tokens at {metrics.tok_per_s:.0f} tok/s{tool}{cached}"
    )


def _cells(metrics: StepMetrics) -> list[str]:
    queue, prefill, *rest = (_ms(getattr(metrics, part)) for part in _PARTS)
    return [
        queue,
        prefill,
        f"{metrics.prefill_new_tokens} / {metrics.prefill_cached_tokens}",
        _ms(metrics.ttft_s),
        *rest,
        _ms(metrics.total_s),
        str(metrics.new_tokens),
        f"{metrics.tok_per_s:.0f}",
    ]


def _sums(all_: Sequence[StepMetrics]) -> list[str]:
    def total(field: str) -> float:
        return float(sum(getattr(metrics, field) for metrics in all_))

    queue, prefill, *rest = (_ms(total(part)) for part in _PARTS)
    new, cached = total("prefill_new_tokens"), total("prefill_cached_tokens")
    return [
        queue,
        prefill,
        f"{new:.0f} / {cached:.0f}",
        "",
        *rest,
        _ms(total("total_s")),
        f"{total('new_tokens'):.0f}",
        "",
    ]


def _ms(seconds: float) -> str:
    """Milliseconds: whole ones where they matter, a tenth where there is less than ten."""
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"
