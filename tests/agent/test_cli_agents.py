"""``run`` with models that are written down, and how steps look on a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dspark_agent import (
    Agent,
    FunctionModel,
    Model,
    ModelMessage,
    ModelRetry,
    ModelTurn,
    TestModel,
    ToolCallPart,
    UserPromptPart,
)
from dspark_agent.cli import main
from dspark_agent.cli import run as run_command
from dspark_agent.cli.console import plain
from dspark_agent.cli.latency import latency_table, one_line
from dspark_agent.cli.steps_view import StepsView

UseModel = Callable[[Model], None]


@pytest.fixture
def use_model(monkeypatch: pytest.MonkeyPatch) -> UseModel:
    """Has ``run`` open the given model, whatever name it is asked for."""

    def use(model: Model) -> None:
        monkeypatch.setattr(run_command, "open_model", lambda *_names, **_options: model)

    return use


def parrot(messages: list[ModelMessage], turn: ModelTurn) -> str:
    """Says how many things the user has said, and the last of them."""
    said = [
        part.content
        for message in messages
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]
    return f"{len(said)}: {said[-1]}"


def test_run_writes_the_answer_to_stdout_and_the_steps_to_stderr(
    use_model: UseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(FunctionModel(parrot))
    assert main(["run", "say it"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "1: say it\n"
    assert "step 1" in shown.err
    assert "where the time went" in shown.err


def test_run_reads_stdin_and_can_be_quiet(
    use_model: UseModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(FunctionModel(parrot))
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert main(["run", "-", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "1: from a pipe\n"
    assert shown.err == ""


def test_run_answers_in_the_form_of_a_schema(
    use_model: UseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    )
    use_model(TestModel(custom_output_args={"n": 7}))
    assert main(["run", "count", "--schema", str(schema), "-q"]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 7}
    schema.write_text("not json")
    assert main(["run", "count", "--schema", str(schema)]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_run_offers_the_tools_it_was_told_to(
    use_model: UseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("milk\n")
    offered: list[set[str]] = []

    def look(messages: list[ModelMessage], turn: ModelTurn) -> str | ToolCallPart:
        offered.append({tool.name for tool in turn.tools})
        if len(offered) == 1:
            return ToolCallPart(tool_name="read_file", args={"path": "notes.txt"})
        return "done"

    use_model(FunctionModel(look))
    assert main(["run", "look", "--workspace", str(tmp_path)]) == 0
    assert offered[0] == {"list_files", "read_file", "search"}
    shown = capsys.readouterr().err
    assert "-> read_file" in shown
    assert "milk" in shown

    offered.clear()
    assert main(["run", "look", "-w", str(tmp_path), "-t", "edit", "-t", "tests"]) == 0
    assert {"edit_file", "run_tests"} <= offered[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "x", "--tool", "read"], "--tool needs --workspace"),
        (["run", " "], "the prompt is empty"),
        (["run", "x", "-m", "openai:gpt", "--precision", "int8"], "--precision"),
        (["run", "x", "-m", "no-such-model"], "no-such-model"),
    ],
)
def test_run_names_a_mistake(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_a_limit_that_is_reached_is_one_line(
    use_model: UseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_model(FunctionModel(lambda *_: ToolCallPart(tool_name="list_files", args={})))
    assert main(["run", "loop", "-w", str(tmp_path), "--max-steps", "2"]) == 2
    assert "request_limit of 2 reached" in " ".join(capsys.readouterr().err.split())


def view() -> tuple[StepsView, io.StringIO]:
    written = io.StringIO()
    return StepsView(Console(file=written, width=100)), written


def test_steps_are_shown_with_calls_results_and_figures() -> None:
    def listing(folder: str) -> str:
        """List.

        Args:
            folder: where.
        """
        return "\n".join(f"file {i} of [bold]{folder}[/]" for i in range(20))

    agent = Agent(TestModel(custom_output_text="all done"), tools=[listing])
    show, written = view()
    result = agent.run_sync("go", on_event=show)
    text = written.getvalue()
    assert "step 1" in text
    assert "-> listing {" in text
    assert "file 11 of [bold]" in text, "markup in a tool's text is text"
    assert "file 12" not in text
    assert "... 8 more lines" in text
    assert "all done" in text
    assert text.count(" tokens, ") == len(result.steps) == 2


def test_a_refused_call_is_shown_with_its_reason() -> None:
    def fussy(word: str) -> str:
        """Fuss.

        Args:
            word: any.
        """
        raise ModelRetry("another word, please")

    answers = iter([ToolCallPart(tool_name="fussy", args={"word": "a"}), "never mind"])
    agent = Agent(FunctionModel(lambda *_: next(answers)), tools=[fussy])
    show, written = view()
    agent.run_sync("go", on_event=show)
    assert "another word, please" in written.getvalue()


def test_control_characters_do_not_reach_the_terminal() -> None:
    shown = plain("a\x1b[31mred\x1b[0m\r\x07b\tc\nd").plain
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "\x07" not in shown
    assert shown.endswith("b\tc\nd")


def test_the_table_has_a_row_for_every_step_and_their_sum() -> None:
    def look() -> str:
        """Look."""
        return "a bug"

    steps = Agent(TestModel(custom_output_text="x"), tools=[look]).run_sync("go").steps
    written = io.StringIO()
    Console(file=written, width=80).print(latency_table(steps))
    lines = written.getvalue().splitlines()
    assert [line.split()[:2] for line in lines if line[:1].isdigit()] == [
        ["1", "look"],
        ["2", "mixed"],
    ]
    assert any(line.startswith("all") for line in lines)
    assert max(map(len, lines)) <= 80
    assert "tokens" in one_line(steps[0].metrics)
