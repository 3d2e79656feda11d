"""The reports as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.filesize import decimal
from rich.table import Table

from dspark_backend.bench.cost import CostReport
from dspark_backend.bench.decode import DecodeReport, DecodeTotals
from dspark_backend.bench.quality import QualityReport
from dspark_backend.bench.simulate import SimulateReport
from dspark_backend.bench.steps_report import StepsPeer, StepsReport, StepsTotals
from dspark_backend.request import StepKind

if TYPE_CHECKING:  # importing it takes Triton, which a GPU alone needs
    from dspark_backend.bench.kernels import KernelsReport

_OURS = "dspark"


def decode_table(report: DecodeReport) -> Table:
    """Medians of every contender and the ratio of ours to theirs."""
    table = report_table(
        f"{report.model}, {len(report.runs)} prompts, {report.threads} threads",
        ("precision", "tok/s", "ttft ms", "tokens/pass", "peak RSS", "ours/theirs"),
    )

    def row(name: str, precision: str, totals: DecodeTotals, ratio: float | None) -> None:
        table.add_row(
            name,
            precision,
            number(totals.tok_per_s, ".1f"),
            _milliseconds(totals.ttft_s),
            number(totals.accepted_length, ".2f"),
            decimal(totals.peak_rss_bytes),
            "" if name == _OURS else times(ratio),
        )

    row(_OURS, report.precision, report.totals, None)
    for name, peer in report.peers.items():
        row(name, peer.precision, peer.totals, peer.ratio_tok_per_s)
    return table


def steps_table(report: StepsReport) -> Table:
    """Summed, median and p95 step time by kind for every contender, and ours over theirs: whole
    steps, and without their prefills."""
    steps = sum(len(run.steps) for run in report.runs)
    table = report_table(
        f"{report.model}, {len(report.runs)} runs of {steps} steps, {report.threads} threads",
        (
            "steps",
            "sum s",
            "median ms",
            "p95 ms",
            "tokens",
            "valid",
            "cached",
            "speed-up",
            "decoding",
        ),
    )

    def row(name: str, totals: StepsTotals, peer: StepsPeer | None) -> None:
        def ratios(kind: StepKind | None = None) -> tuple[str, str]:
            if peer is None:
                return "", ""
            if kind is None:
                return times(peer.speedup), times(peer.decoding)
            return times(peer.speedup_by_kind.get(kind)), times(peer.decoding_by_kind.get(kind))

        table.add_row(
            name,
            str(totals.step_s.count),
            f"{totals.step_s.sum:.2f}",
            _milliseconds(totals.step_s.median),
            _milliseconds(totals.step_s.p95),
            str(totals.new_tokens),
            f"{totals.valid_share:.0%}",
            "" if totals.cached_share is None else f"{totals.cached_share:.1%}",
            *ratios(),
        )
        for kind, spread in totals.step_s.by_kind.items():
            table.add_row(
                f"  {kind.value}",
                str(spread.count),
                f"{spread.sum:.2f}",
                _milliseconds(spread.median),
                _milliseconds(spread.p95),
                "",
                "",
                "",
                *ratios(kind),
            )

    row(_OURS, report.totals, None)
    for name, peer in report.peers.items():
        row(name, peer.totals, peer)
    return table


def quality_table(report: QualityReport) -> Table:
    """Perplexities side by side."""
    table = report_table(
        f"{report.model}, {report.tokens} tokens of {report.text}", ("perplexity", "against bf16")
    )
    table.add_row("bf16", f"{report.reference_perplexity:.3f}", "")
    if report.precision != "bf16":
        table.add_row(
            report.precision, f"{report.perplexity:.3f}", f"{report.relative_change:+.2%}"
        )
    return table


def cost_table(report: CostReport) -> Table:
    """The measured curve, its slopes, and how far off it is elsewhere."""
    cost = report.table
    table = report_table(
        f"{report.model} in {report.precision}, context {cost.context}, {report.threads} threads",
        ("ms", "ms each", "against one"),
    )
    for what, counts, seconds in (
        ("rows", cost.rows, cost.verify_s),
        ("anchors", cost.anchors, cost.draft_s),
    ):
        for count, took in zip(counts, seconds, strict=True):
            ratio = f"{took / seconds[0]:.2f}x"
            table.add_row(
                f"{count} {what}", f"{took * 1e3:.2f}", f"{took / count * 1e3:.2f}", ratio
            )
        if counts:
            table.add_section()
    table.add_row("a further request", f"{cost.request_s * 1e3:.3f}", "", "")
    table.add_row("1000 further positions", f"{cost.position_s * 1e6:.3f}", "", "")
    table.add_row("1000 more to a row", f"{cost.pair_s * 1e6:.3f}", "", "")
    error = f"{report.median_error:.1%}"
    table.add_row(f"median error, {len(report.checks)} other passes", error, "", "")
    return table


def kernels_table(report: KernelsReport) -> Table:
    """Every kernel's time beside torch's, and how much of a copy's bandwidth it reaches."""
    speed = report.copy_bytes_per_s / 1e9
    table = report_table(
        f"{report.size} in {report.dtype}, a copy moves {speed:.0f} GB/s",
        ("shape", "us", "torch us", "torch/ours", "MB", "of a copy", "apart"),
    )
    for row in report.rows:
        table.add_row(
            row.op,
            row.shape,
            f"{row.ours_s * 1e6:.1f}",
            f"{row.torch_s * 1e6:.1f}",
            f"{row.torch_s / row.ours_s:.2f}x",
            f"{row.moved_bytes / 1e6:.2f}",
            f"{row.share:.0%}",
            number(row.apart, ".2g"),
        )
    return table


def simulate_table(report: SimulateReport) -> Table:
    """Every policy at every number of agents: tokens a second of all and of each, over plain
    decoding; then by agent and pass the tokens written, the drafts verified, how many of those
    held, and how often the drafter was called; milliseconds a cycle."""
    table = report_table(
        f"{report.curve} (assumed, not measured), {report.steps} steps, {report.records}",
        ("tok/s", "each", "gain", "tok/\npass", "ver-\nified", "held", "draf-\nted", "ms"),
    )
    agents = 0
    for result in report.results:
        if result.agents != agents:
            agents = result.agents
            table.add_section()
            table.add_row(f"{agents} agent{'s' if agents > 1 else ''}")
        table.add_row(
            result.policy,
            f"{result.tok_per_s:.0f}",
            f"{result.tok_per_s_per_agent:.0f}",
            f"{result.speedup:.2f}x",
            f"{result.accepted_length:.2f}",
            f"{result.verified:.2f}",
            "-" if result.held_share is None else f"{result.held_share:.0%}",
            f"{result.drafted_share:.0%}",
            f"{result.cycle_s * 1000:.1f}",
        )
    return table


def report_table(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table whose first column names the rows and whose others hold figures."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, min_width=len(title)
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def number(value: float | None, form: str) -> str:
    """``value`` in the format ``form``; a dash where there is none."""
    return "-" if value is None else format(value, form)


def times(value: float | None) -> str:
    """A ratio; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}x"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"
