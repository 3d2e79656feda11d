"""``bench pareto`` for people: a table and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dspark_backend.bench.pareto_report import ParetoReport
from dspark_backend.bench.table import number, report_table
from dspark_backend.plot import Plot, rounded_up


def pareto_table(report: ParetoReport) -> Table:
    """Every contender at every number of agents: tokens a second of all and of each, the gain over
    plain decoding by as many, tokens an agent and pass, and how far off the cost model was; then
    what ``step_aware`` gains over each of the others."""
    table = report_table(
        f"{report.model}, {', '.join(report.traces)}, {report.threads} threads, "
        f"{report.rounds} rounds",
        ("tok/s", "each", "gain", "tok/pass", "foreseen", "tokens"),
    )
    plain = next(iter(report.contenders.values()))
    for place, agents in enumerate(report.concurrency):
        table.add_section()
        table.add_row(f"{agents} agent{'s' if agents > 1 else ''}")
        for name, contender in report.contenders.items():
            point = contender.points[place]
            gain = point.tok_per_s / plain.points[place].tok_per_s
            error = point.prediction_error
            table.add_row(
                name,
                f"{point.tok_per_s:.1f}",
                f"{point.tok_per_s_per_agent:.1f}",
                f"{gain:.2f}x",
                number(point.accepted_length, ".2f"),
                "-" if error is None else f"within {error:.0%}",
                "same" if point.same_tokens else "OTHER",
            )
    return table


def leads_table(report: ParetoReport) -> Table:
    """What ``step_aware`` gains over each of the others, by number of agents: in aggregate speed,
    and in an agent's own speed at the other's aggregate; then the same of drafts alone."""
    table = report_table(
        "over the others: all together / each at matched throughput",
        tuple(str(agents) for agents in report.concurrency),
    )
    for pair in dict.fromkeys((lead.ours, lead.over) for lead in report.leads):
        row = [lead for lead in report.leads if (lead.ours, lead.over) == pair]
        table.add_row(
            " over ".join(pair),
            *(
                f"{number(each.speedup, '.2f')} / {number(each.at_throughput, '.2f')}"
                for each in row
            ),
        )
    return table


def plot_pareto(report: ParetoReport, path: Path) -> None:
    """Tokens a second of all over those of each agent, a line for every contender."""
    points = [point for each in report.contenders.values() for point in each.points]
    right = rounded_up(max(point.tok_per_s_per_agent for point in points))
    top = rounded_up(max(point.tok_per_s for point in points))
    plot = Plot("each tok s", "all tok s", right, [right * fifth / 5 for fifth in range(6)], top)
    for place, (name, contender) in enumerate(report.contenders.items()):
        plot.series([(each, all_) for all_, each in contender.curve], place, name)
    plot.write(path)
