"""Reports as Markdown, which reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_agent.evals.comparison import Comparison, by_case, case_latency, case_score
from dspark_agent.evals.report import CaseReport, EvaluationReport


def report_table(report: EvaluationReport) -> str:
    """A row for each attempt, then means of the scores and medians of the latencies."""
    names = report.score_names
    repeated = any(case.repeat for case in report.cases)
    rows = [_case_row(case, names, repeated) for case in report.cases]
    summary = [
        "all",
        *(_number(report.mean(name)) for name in names),
        _seconds(report.median("seconds")),
        _seconds(report.median("ttft_s")),
        f"{report.median('new_tokens'):.0f}",
        f"{len(report.errors)} failed" if report.errors else "",
    ]
    head = [f"{report.dataset}: {report.name}", *names, "seconds", "first token", "tokens", ""]
    return _markdown(head, [*rows, summary])


def comparison_table(comparison: Comparison) -> str:
    """Two tables, and where scores changed a third with those cases."""
    before, after = comparison.before.name, comparison.after.name
    if before == after:
        before, after = "before", "after"
    quality = [
        [
            score.name,
            _number(score.before),
            _number(score.after),
            f"{score.after - score.before:+.3f}",
            f"{score.better} / {score.worse}",
            f"{score.p_value:.2g}",
        ]
        for score in comparison.scores
    ]
    latency = [
        [
            change.name,
            _number(change.before),
            _number(change.after),
            "-" if change.ratio is None else f"{change.ratio:.2f}x",
        ]
        for change in comparison.latencies
    ]
    tables = [
        _markdown(["score", before, after, "change", "better / worse", "sign test p"], quality),
        _markdown(["median", before, after, "ratio"], latency),
    ]
    if changed := _changed_rows(comparison):
        tables.append(_markdown(["case", "score", before, after, "seconds"], changed))
    if comparison.missing:
        tables.append(f"Not compared, in one report only: {', '.join(comparison.missing)}.")
    return "\n\n".join(tables)


def _changed_rows(comparison: Comparison) -> list[list[str]]:
    old, new = by_case(comparison.before), by_case(comparison.after)
    rows: list[list[str]] = []
    for case in comparison.cases:
        for score in comparison.scores:
            was, is_ = (case_score(found[case], score.name) for found in (old, new))
            if was != is_:
                took = [_seconds(case_latency(found[case], "seconds")) for found in (old, new)]
                rows.append([case, score.name, _number(was), _number(is_), " -> ".join(took)])
    return rows


def _case_row(case: CaseReport, names: Sequence[str], repeated: bool) -> list[str]:
    return [
        f"{case.name} #{case.repeat + 1}" if repeated else case.name,
        *(_number(case.scores[name]) if name in case.scores else "-" for name in names),
        _seconds(case.latency.seconds),
        _seconds(case.latency.ttft_s),
        str(case.latency.new_tokens),
        "" if case.error is None else case.error.splitlines()[0][:60],
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
