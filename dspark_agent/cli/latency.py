"""The table that says where the wall clock of every step went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from dspark_agent.metrics import StepMetrics
    from dspark_agent.step import StepResult

_HEADINGS = (
    "queue",
    "pre-\nfill",
    "new",
    "cach-\ned",
    "ttft",
    "de-\ncode",
    "gram-\nmar",
    "veri-\nfy",
    "tool",
    "over-\nhead",
    "total",
    "tok-\nens",
)
_PARTS = ("queue_s", "prefill_s", "decode_s", "grammar_s", "verify_s", "tool_s", "overhead_s")


def latency_table(steps: Sequence[StepResult[Any]]) -> Table:
    """One row a step and their sum; milliseconds, the parts in the order in which they happen.

    A step goes by the tool it called, else by its kind. Cached tokens are those of the
    conversation so far that were not computed again.
    """
    table = Table(
        title="where the time went (ms)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("step", min_width=9)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, step in enumerate(steps):
        called = ", ".join(call.tool_name for call in step.tool_calls)
        table.add_row(f"{number + 1} {called or step.kind.value}", *_cells(step.metrics))
    if len(steps) > 1:
        table.add_section()
        table.add_row("all", *_sums([step.metrics for step in steps]))
    return table


def one_line(metrics: StepMetrics) -> str:
    """A step's account in a line, for under its output."""
    read = metrics.prefill_new_tokens + metrics.prefill_cached_tokens
    facts = [f"{metrics.total_s:.2f} s", f"first token {_ms(metrics.ttft_s)} ms"]
    if metrics.tool_s:
        facts.append(f"tools {_ms(metrics.tool_s)} ms")
    facts.append(f"{metrics.new_tokens} tokens, {metrics.tok_per_s:.0f}/s")
    if read:
        facts.append(f"{metrics.prefill_cached_tokens / read:.0%} cached")
    return " | ".join(facts)


def _cells(metrics: StepMetrics) -> list[str]:
    queue, prefill, *rest = (_ms(getattr(metrics, part)) for part in _PARTS)
    return [
        queue,
        prefill,
        str(metrics.prefill_new_tokens),
        str(metrics.prefill_cached_tokens),
        _ms(metrics.ttft_s),
        *rest,
        _ms(metrics.total_s),
        str(metrics.new_tokens),
    ]


def _sums(all_: Sequence[StepMetrics]) -> list[str]:
    def total(field: str) -> float:
        return float(sum(getattr(metrics, field) for metrics in all_))

    queue, prefill, *rest = (_ms(total(part)) for part in _PARTS)
    return [
        queue,
        prefill,
        f"{total('prefill_new_tokens'):.0f}",
        f"{total('prefill_cached_tokens'):.0f}",
        "",
        *rest,
        _ms(total("total_s")),
        f"{total('new_tokens'):.0f}",
    ]


def _ms(seconds: float) -> str:
    """Milliseconds: whole ones where they matter, a tenth where there is less than ten."""
    milliseconds = seconds * 1000
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"
