"""Prompt files and traces: what is accepted, what is refused, and what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dspark_backend.bench.editing_trace import editing_runs
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.jsonl import shipped, shipped_names
from dspark_backend.bench.prompt import read_prompts
from dspark_backend.bench.trace import NamedTool, read_trace

STEP = {
    "messages": [{"role": "user", "content": "hi"}],
    "tool_choice": "none",
    "output_schema": None,
    "max_new_tokens": 4,
}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_prompt_is_its_messages_or_the_first_turn(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path, {"messages": chat, "source": "x"}, {"turns": ["first", "second"]})
    first, second = read_prompts(path)
    assert first.chat() == chat
    assert second.chat() == [{"role": "user", "content": "first"}]


def test_limit_takes_the_first_rows_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"turns": ["a"]}\n\n{"turns": ["b"]}\nnot json\n', encoding="utf-8")
    assert [row.turns[0] for row in read_prompts(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "messages"),
        ({"messages": [], "turns": []}, "messages"),
        ({"messages": [{"role": "user"}], "turns": ["x"]}, "either"),
        ({"turns": "x"}, "turns"),
    ],
    ids=["neither", "both empty", "both", "no list"],
)
def test_a_bad_prompt_names_the_file_and_line(
    tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    path = write(tmp_path, {"turns": ["fine"]}, row)
    with pytest.raises(BenchError, match=rf"rows\.jsonl, line 2: .*{complaint}"):
        read_prompts(path)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no rows"):
        read_prompts(write(tmp_path))
    with pytest.raises(BenchError, match="cannot read"):
        read_prompts(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": []}, "steps"),
        ({"steps": [STEP | {"tool_choice": {"name": "gone"}}]}, "gone"),
        ({"steps": [STEP | {"tool_choice": "required"}]}, "no tool"),
        ({"steps": [STEP | {"max_new_tokens": 0}]}, "greater than 0"),
        ({"steps": [STEP | {"surprise": 1}]}, "surprise"),
    ],
    ids=["no steps", "unknown tool", "required without tools", "no room", "unknown field"],
)
def test_a_bad_trace_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path, {"name": "run", "steps": [STEP]} | change)
    with pytest.raises(BenchError, match=complaint):
        read_trace(path)


def test_the_system_text_opens_the_conversation(tmp_path: Path) -> None:
    (run,) = read_trace(write(tmp_path, {"name": "r", "system": "be", "steps": [STEP]}))
    assert run.opening() == [{"role": "system", "content": "be"}, *STEP["messages"]]
    (run,) = read_trace(write(tmp_path, {"name": "r", "steps": [STEP]}))
    assert run.opening() == STEP["messages"]


def test_the_shipped_prompts_and_traces_are_readable() -> None:
    assert shipped_names("prompts") == ["code"]
    assert len(read_prompts(shipped("prompts", "code"))) == 32
    assert shipped_names("traces") == ["coding", "extraction", "file-editing", "tool-use"]


@pytest.mark.parametrize("name", ["coding", "extraction", "file-editing", "tool-use"])
def test_a_shipped_trace_uses_what_it_declares(name: str) -> None:
    runs = read_trace(shipped("traces", name))
    assert len({run.name for run in runs}) == len(runs) == 4
    for run in runs:
        assert 2 <= len(run.steps) <= 6
        answered = {m["name"] for step in run.steps for m in step.messages if m["role"] == "tool"}
        assert answered <= {tool["function"]["name"] for tool in run.tools}
        for tool in run.tools:
            jsonschema.Draft202012Validator.check_schema(tool["function"]["parameters"])
        for before, step in zip(run.steps, run.steps[1:], strict=False):
            if isinstance(before.tool_choice, NamedTool):
                assert step.messages[0]["name"] == before.tool_choice.name


def test_file_editing_is_made_of_its_files_and_writes_again_what_was_read() -> None:
    path = shipped("traces", "file-editing")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows == editing_runs(path.with_suffix(""))
    read = []
    for run in read_trace(path):
        for before, step in zip(run.steps[::2], run.steps[1::2], strict=True):
            assert [before.tool_choice, step.tool_choice] == [
                NamedTool(name="read_file"),
                NamedTool(name="write_file"),
            ]
            shown, wish = step.messages
            text = shown["content"]
            assert 40 <= len(text.splitlines()) <= 120
            assert before.messages[-1]["content"].removeprefix("Read ")[:-1] in wish["content"]
            read.append(text)
    assert len(set(read)) == len(read) == 8


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").write_text('{"turns": ["mine"]}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_prompts(shipped("prompts", "code"))[0].turns == ("mine",)
    with pytest.raises(BenchError, match=r"absent: no such file.*code"):
        shipped("prompts", "absent")
