"""Agent steps on a terminal, as they happen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from dspark_agent.cli.console import plain
from dspark_agent.cli.latency import one_line

if TYPE_CHECKING:
    from dspark_agent.events import AgentEvent, StepEnd, ToolResult

_SHOWN_LINES = 12


class StepsView:
    """An ``on_event`` callable that prints: what the model writes as it writes it, each tool's
    result shortened, and a line of figures at the end of a step. Without ``headings`` no line
    announces a step, as in a chat."""

    def __init__(self, console: Console, *, headings: bool = True) -> None:
        self._console = console
        self._headings = headings
        self._midline = False

    def __call__(self, event: AgentEvent) -> None:
        from dspark_agent import events

        match event:
            case events.StepStart(step=step, kind=kind, attempt=attempt):
                if self._headings:
                    again = f", attempt {attempt}" if attempt > 1 else ""
                    self._line(f"[step]step {step + 1}[/] [note]{kind.value}{again}[/]")
            case events.ContextCompacted(left_out=left_out):
                self._line(f"[note]context full: {len(left_out)} messages summed up[/]")
            case events.TextDelta(delta=delta):
                self._write(delta)
            case events.ToolCallStart(tool_name=name):
                self._end_line()
                self._write(f"-> {name} ", "bold")
            case events.ToolCallDelta(delta=delta):
                self._write(delta)
            case events.ToolCallEnd():
                self._end_line()
            case events.ToolResult():
                self._result(event)
            case events.StepEnd():
                self._done(event)
            case events.PartialOutput():
                pass  # its JSON was written as text

    def _result(self, event: ToolResult) -> None:
        from dspark_agent.messages import RetryPromptPart

        self._end_line()
        refused = isinstance(event.part, RetryPromptPart)
        lines = event.part.model_text().splitlines() or ["(nothing)"]
        for line in lines[:_SHOWN_LINES]:
            self._console.print(plain(f"   {line}", "yellow" if refused else "dim"))
        if len(lines) > _SHOWN_LINES:
            self._console.print(f"   [note]... {len(lines) - _SHOWN_LINES} more lines[/]")

    def _done(self, event: StepEnd) -> None:
        self._end_line()
        if event.result.retry_reason is not None:
            self._console.print(plain(f"   taken again: {event.result.retry_reason}", "yellow"))
        self._line(f"   [note]{one_line(event.result.metrics)}[/]")

    def _line(self, markup: str) -> None:
        self._end_line()
        self._console.print(markup)

    def _write(self, text: str, style: str = "") -> None:
        if text:
            self._console.print(plain(text, style), end="", soft_wrap=True)
            self._midline = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._midline:
            self._console.print()
            self._midline = False
