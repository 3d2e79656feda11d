"""``chat``: its commands with lines from a pipe, and Ctrl-C with a real terminal and process."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dspark_agent import (
    FunctionModel,
    Model,
    ModelTurn,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from dspark_agent.cli import chat as chat_command
from dspark_agent.cli import main
from dspark_agent.models.testing import Messages

Chat = Callable[..., tuple[str, str]]


def parrot(messages: Messages, turn: ModelTurn) -> str:
    """Says how many things the user has said, and the last of them."""
    said = [p.content for m in messages for p in m.parts if isinstance(p, UserPromptPart)]
    return f"{len(said)}: {said[-1]}"


def writer(messages: Messages, turn: ModelTurn) -> ToolCallPart | str:
    """Writes a file when it is asked anything, then says what came of it."""
    last = messages[-1].parts[-1]
    if isinstance(last, ToolReturnPart):
        return f"it said: {last.model_text()}"
    return ToolCallPart(tool_name="write_file", args={"path": "a.txt", "content": "hello\n"})


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Chats with a model, one line after the other; gives what went to stdout and stderr."""

    def run(model: Model, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(chat_command, "open_model", lambda *_names, **_options: model)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *options]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err

    return run


@pytest.mark.parametrize("again", ["/new", "/clear"])
@pytest.mark.parametrize("leave", ["/quit", "/exit"])
def test_a_chat_remembers_until_it_is_told_to_start_over(
    chat: Chat, again: str, leave: str
) -> None:
    shown, _ = chat(FunctionModel(parrot), "one", "", "two", again, "three", leave, "four")
    assert re.findall(r"\d: \w+", shown) == ["1: one", "2: two", "1: three"]


def test_the_help_names_every_command_and_what_it_does(chat: Chat) -> None:
    shown, _ = chat(FunctionModel(parrot), "/help")
    for name in ("help", "tools", "new", "undo", "retry", "history", "save", "load", "stats"):
        assert re.search(rf"/{name}\b.* {{2}}\w", shown), name
    assert "/quit, /exit" in shown


def test_a_wrong_command_is_corrected_and_the_chat_goes_on(chat: Chat) -> None:
    shown, complaints = chat(FunctionModel(parrot), "/hlep", "/xyzzy", "/save", "/undo", "hi")
    assert "no command /hlep: did you mean /help?" in complaints
    assert "no command /xyzzy; /help names them" in complaints
    assert "/save needs the name of a file" in complaints
    assert "nothing to take back" in complaints
    assert "1: hi" in shown


def test_the_last_question_is_taken_back_or_asked_again(chat: Chat) -> None:
    shown, _ = chat(FunctionModel(parrot), "one", "two", "/undo", "three", "/retry", "/undo", "x")
    assert re.findall(r"\d: \w+", shown) == ["1: one", "2: two", "2: three", "2: three", "2: x"]
    assert "taken back: two" in shown


def test_the_figures_and_the_conversation_can_be_seen(chat: Chat) -> None:
    for command in ("/stats", "/table"):
        shown, _ = chat(FunctionModel(parrot), "one", command, "/history")
        assert "where the time went" in shown
        assert "1 turns, 0 tool calls" in shown
        assert "> one" in shown


def test_a_saved_chat_goes_on_in_this_process_and_the_next(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    shown, _ = chat(FunctionModel(parrot), "one", f"/save {file}", "/new", f"/load {file}", "two")
    assert "2: two" in shown
    shown, _ = chat(FunctionModel(parrot), "three", options=("--history", str(file)))
    assert "2: three" in shown


def test_a_file_that_is_no_chat_is_named(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chat.json"
    file.write_text('{"messages": 3}')
    _, complaints = chat(FunctionModel(parrot), f"/load {file}", f"/load {tmp_path / 'none'}")
    assert "chat.json is not a saved chat: messages" in complaints.replace("\n", "")
    assert "No such file" in complaints
    assert main(["chat", "--history", str(file)]) == 2
    assert "is not a saved chat" in capsys.readouterr().err


def test_a_mistake_ends_a_chat_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--base-url", "http://localhost:1"]) == 2
    assert "--base-url is for openai: models" in capsys.readouterr().err
    assert main(["chat", "--tool", "edit"]) == 2
    assert "--tool needs --workspace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "is_written", "said"),
    [
        ("y", True, "it said"),
        ("", False, "not allowed: the user said no"),
        ("wrong folder", False, "not allowed: the user said: wrong folder"),
    ],
)
def test_a_tool_that_changes_something_asks_first(
    chat: Chat, tmp_path: Path, word: str, is_written: bool, said: str
) -> None:
    options = ("--workspace", str(tmp_path), "--tool", "edit")
    shown, _ = chat(FunctionModel(writer), "do it", word, options=options)
    assert 'write_file {"path": "a.txt"' in shown
    assert (tmp_path / "a.txt").exists() is is_written
    assert said in shown


def test_always_is_asked_once_and_yes_never(chat: Chat, tmp_path: Path) -> None:
    options = ("--workspace", str(tmp_path), "--tool", "edit")
    shown, _ = chat(FunctionModel(writer), "do it", "a", "do it", "do it", options=options)
    assert shown.count("allow?") == 1
    assert shown.count("it said: ") == 3
    shown, _ = chat(FunctionModel(writer), "do it", options=(*options, "--yes"))
    assert "allow?" not in shown
    assert shown.count("it said: ") == 1


def test_with_nobody_to_ask_nothing_is_allowed(chat: Chat, tmp_path: Path) -> None:
    options = ("--workspace", str(tmp_path), "--tool", "edit")
    shown, _ = chat(FunctionModel(writer), "do it", options=options)
    assert "nobody is there to allow it" in shown
    assert not (tmp_path / "a.txt").exists()


def test_tools_that_only_read_do_not_ask(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")

    def reader(messages: Messages, turn: ModelTurn) -> ToolCallPart | str:
        if isinstance(messages[-1].parts[-1], ToolReturnPart):
            return "done"
        return ToolCallPart(tool_name="read_file", args={"path": "a.txt"})

    options = ("--workspace", str(tmp_path), "--tool", "edit")
    shown, _ = chat(FunctionModel(reader), "look", "/tools", options=options)
    assert "allow?" not in shown
    assert "done" in shown
    assert re.search(r"^\? write_file", shown, re.MULTILINE)
    assert re.search(r"^ {2}read_file", shown, re.MULTILINE)


def test_an_answer_that_has_no_turn_left_asks_nothing_and_refuses_the_call(
    chat: Chat, tmp_path: Path
) -> None:
    options = ("--workspace", str(tmp_path), "--tool", "edit", "--max-steps", "1")
    shown, complaints = chat(FunctionModel(writer), "do it", "/history", options=options)
    assert "request_limit of 1 reached" in complaints.replace("\n", " ")
    assert "allow?" not in shown
    assert not (tmp_path / "a.txt").exists()


def test_a_chat_saved_at_a_question_goes_on_with_the_call_refused(
    chat: Chat, tmp_path: Path
) -> None:
    options = ("--workspace", str(tmp_path), "--tool", "edit")
    file = tmp_path / "chat.json"
    chat(FunctionModel(writer), "do it", f"/save {file}", options=(*options, "--max-steps", "1"))

    def last(messages: Messages, turn: ModelTurn) -> str:
        return " / ".join(str(part.content) for part in messages[-1].parts)

    shown, _ = chat(FunctionModel(last), "go on", options=(*options, "--history", str(file)))
    assert "not allowed: the user stopped the answer / go on" in shown
    assert not (tmp_path / "a.txt").exists()


def test_an_answer_that_fails_leaves_a_chat_to_go_on_with(chat: Chat, tmp_path: Path) -> None:
    def looper(messages: Messages, turn: ModelTurn) -> Any:
        last = messages[-1].parts[-1]
        if isinstance(last, UserPromptPart) and last.content == "again":
            return f"still here, {len(messages)} messages"
        return ToolCallPart(tool_name="list_files", args={})

    options = ("--workspace", str(tmp_path), "--max-steps", "2")
    shown, complaints = chat(FunctionModel(looper), "loop", "again", options=options)
    assert "request_limit of 2 reached" in complaints.replace("\n", " ")
    assert "what was done before stands (2 steps)" in complaints
    assert "still here" in shown


# -- a real terminal -----------------------------------------------------------------------------

REAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this terminal's Ctrl-C is for this process
from dspark_agent.cli import main
sys.exit(main(["chat", *sys.argv[1:]]))
"""
FAKE = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import anyio
from dspark_agent import ModelResponse, TextPart, ToolCallPart, ToolReturnPart, UserPromptPart
from dspark_agent.cli import chat, main
from dspark_agent.models.base import Model, TextChunk, TranscriptSession

class Slow(Model):
    name = "slow"
    async def open(self, widest, *, token_log=None):
        return Words()

class Words(TranscriptSession):
    def _empty_copy(self):
        return Words()
    async def respond(self, messages, turn, emit):
        last = messages[-1].parts[-1]
        said = [p.content for m in messages for p in m.parts if isinstance(p, UserPromptPart)]
        if last.content == "write":
            call = ToolCallPart(tool_name="write_file", args={"path": "a.txt", "content": "x"})
            return ModelResponse(parts=(call,))
        answer = f"heard {len(said)}: {said[-1]}"
        if said[-1] == "long":
            for number in range(1000):
                await emit(TextChunk(f"word{number} "))
                await anyio.sleep(0.02)
        await emit(TextChunk(answer))
        return ModelResponse(parts=(TextPart(content=answer),))

chat.open_model = lambda *names, **options: Slow()
sys.exit(main(["chat", *sys.argv[1:]]))
"""


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, program: str, arguments: list[str]) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=child, stdout=child, stderr=child, start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(child)
        self._read = ""

    @property
    def shown(self) -> str:
        """What was shown since the last typing, without colours."""
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self._read)

    def type(self, keys: str) -> None:
        """Type as a person would, not in the instant between a prompt and the reading after it."""
        time.sleep(0.2)
        self._read = ""
        os.write(self._fd, keys.encode())

    def expect(self, pattern: str, seconds: float = 60) -> None:
        """Read until the pattern appears in what was shown since the last typing."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._fd], [], [], left)[0]:
                self._read += os.read(self._fd, 4096).decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)


@contextmanager
def terminal(*arguments: str, program: str = FAKE) -> Iterator[Terminal]:
    opened = Terminal(program, list(arguments))
    try:
        opened.expect("> ")
        yield opened
    finally:
        opened.close()


CTRL_C = "\x03"
CTRL_D = "\x04"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on() -> None:
    with terminal() as term:
        term.type("one\n")
        term.expect(r"heard 1: one[\s\S]*> ")
        term.type("long\n")
        term.expect("word3 ")
        term.type(CTRL_C)
        term.expect(r"stopped; the conversation is as it was[\s\S]*> ")
        assert "word900" not in term.shown
        term.type("three\n")
        term.expect("heard 2: three")
        term.expect(r"> $")
        term.type(CTRL_D)
        assert term.process.wait(30) == 0


def test_ctrl_c_at_a_question_of_a_tool_refuses_it_and_stops(tmp_path: Path) -> None:
    with terminal("--workspace", str(tmp_path), "--tool", "edit") as term:
        term.type("write\n")
        term.expect("and why: $")
        term.type(CTRL_C)
        term.expect(r"stopped[\s\S]*> $")
        assert not (tmp_path / "a.txt").exists()
        term.type("write\n")
        term.expect("and why: $")
        term.type("yes\n")
        term.expect("heard 2: write")
        assert (tmp_path / "a.txt").read_text() == "x"


def test_ctrl_c_between_answers_leaves_at_the_second_time() -> None:
    with terminal() as term:
        term.type(CTRL_C)
        term.expect(r"Ctrl-C again[\s\S]*> $")
        term.type("one\n")
        term.expect(r"heard 1: one[\s\S]*> $")
        term.type(CTRL_C)
        term.expect(r"Ctrl-C again[\s\S]*> $")
        term.type(CTRL_C)
        assert term.process.wait(30) == 130


@pytest.mark.real_model
def test_ctrl_c_reaches_the_token_loop_of_a_real_model() -> None:
    options = ("--model", "smollm2-135m", "--threads", "1", "--max-tokens", "7000")
    with terminal(*options, program=REAL) as term:
        term.type("Count from one to five hundred, with a comma after each number.\n")
        term.expect(r"\w+\W+\w+\W+\w+\W+\w+")
        term.type(CTRL_C)
        term.expect(r"stopped; the conversation is as it was[\s\S]*> $")
        term.type("/history\n")
        term.expect(r"/history\s+> $")
        term.type("Say hello.\n")
        term.expect(r"tokens, [\s\S]*> $")
        term.type("/stats\n")
        term.expect("2 turns, 0 tool calls")  # a turn counts when it begins
