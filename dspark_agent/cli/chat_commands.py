"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.markup import escape

from dspark_agent.cli.boundary import UsageError
from dspark_agent.cli.console import err, out, plain
from dspark_agent.cli.latency import latency_table
from dspark_agent.history import History
from dspark_agent.messages import ModelRequest, ModelResponse, SystemPromptPart, UserPromptPart

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from dspark_agent.session import Session, SessionMark
    from dspark_agent.tools import Tool


@dataclass(frozen=True, slots=True)
class Leave:
    """This conversation is over; ``following`` is what the next one starts from, if any."""

    following: History | None


@dataclass(slots=True)
class Talk:
    """A conversation as its commands see it. ``asks`` says whether a tool's calls wait for the
    user's word; ``ask`` has a question answered."""

    session: Session[Any, Any]
    portal: BlockingPortal
    tools: Mapping[str, Tool[Any]]
    asks: Callable[[str], bool]
    ask: Callable[[Session[Any, Any], str], None]
    marks: list[tuple[str, SessionMark]] = field(default_factory=list)

    def say(self, said: str) -> None:
        """Ask, and remember where the conversation stood before."""
        self.marks.append((said, self.session.mark()))
        self.ask(self.session, said)


Command = Callable[[Talk, str], Leave | None]


def run_command(talk: Talk, line: str) -> Leave | None:
    """Run a line such as ``/save chat.json``; what was wrong with it is said, not raised."""
    name, _, argument = line[1:].partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *_ALIASES], n=1)
        hint = f": did you mean /{close[0]}?" if close else "; /help names them"
        err().print(f"[bad]error:[/] no command {escape('/' + name)}{hint}")
        return None
    try:
        return COMMANDS[name](talk, argument.strip())
    except (UsageError, OSError) as error:
        err().print(f"[bad]error:[/] {escape(str(error))}", soft_wrap=True)
        return None


def read_history(path: Path) -> History:
    """A conversation that ``/save`` wrote.

    Raises:
        UsageError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        return History.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is not a saved chat: {place}: {first['msg']}") from error


def _help(talk: Talk, argument: str) -> None:
    """names the commands"""
    for name, command in COMMANDS.items():
        also = "".join(f", /{alias}" for alias, of in _ALIASES.items() if of == name)
        out().print(f"  [step]/{name}[/]{also}  [note]{command.__doc__}[/]")
    err().print("[note]Ctrl-C stops an answer; Ctrl-D leaves[/]")


def _tools(talk: Talk, argument: str) -> None:
    """lists what the model may call; those marked ? ask you first"""
    if not talk.tools:
        out().print("none: start the chat with --workspace FOLDER, and --tool for more")
    for tool in talk.tools.values():
        mark = "?" if talk.asks(tool.name) else " "
        summary = tool.definition.description.partition("\n")[0]
        out().print(plain(f"{mark} {tool.name:<18} {summary}"), soft_wrap=True)


def _new(talk: Talk, argument: str) -> Leave:
    """starts a new conversation"""
    err().print("[note]a new conversation[/]")
    return Leave(History())


def _undo(talk: Talk, argument: str) -> None:
    """takes your last question and its answer back (what tools did stays done)"""
    if not talk.marks:
        raise UsageError("there is nothing to take back")
    said, mark = talk.marks.pop()
    talk.portal.call(talk.session.rollback, mark)
    out().print(plain(f"taken back: {said}", "dim"), soft_wrap=True)


def _retry(talk: Talk, argument: str) -> None:
    """takes your last question back and asks it again"""
    if not talk.marks:
        raise UsageError("there is nothing to ask again")
    said, mark = talk.marks.pop()
    talk.portal.call(talk.session.rollback, mark)
    talk.say(said)


def _history(talk: Talk, argument: str) -> None:
    """shows the conversation so far"""
    for message in talk.session.messages:
        _show(message)


def _save(talk: Talk, argument: str) -> None:
    """FILE writes the conversation, to /load it or to start with --history"""
    if not argument:
        raise UsageError("/save needs the name of a file")
    Path(argument).write_text(talk.session.history.model_dump_json() + "\n", encoding="utf-8")
    err().print(f"[note]wrote {escape(argument)}[/]", soft_wrap=True)


def _load(talk: Talk, argument: str) -> Leave:
    """FILE goes on from a saved conversation"""
    if not argument:
        raise UsageError("/load needs the name of a file")
    history = read_history(Path(argument))
    err().print(f"[note]{len(history.messages)} messages[/]")
    return Leave(history)


def _stats(talk: Talk, argument: str) -> None:
    """shows where the time of every step went, and what was used"""
    out().print(latency_table(talk.session.steps))
    usage = talk.session.usage
    out().print(
        f"{usage.requests} turns, {usage.tool_calls} tool calls, {usage.output_tokens} tokens "
        f"written; {usage.input_tokens} read, {usage.cached_tokens} of them not again"
    )


def _quit(talk: Talk, argument: str) -> Leave:
    """leaves"""
    return Leave(None)


COMMANDS: Mapping[str, Command] = {
    "help": _help,
    "tools": _tools,
    "new": _new,
    "undo": _undo,
    "retry": _retry,
    "history": _history,
    "save": _save,
    "load": _load,
    "stats": _stats,
    "quit": _quit,
}
_ALIASES: Mapping[str, str] = {"clear": "new", "table": "stats", "exit": "quit"}


def _show(message: ModelRequest | ModelResponse) -> None:
    if isinstance(message, ModelResponse):
        if message.text:
            out().print(plain(message.text), soft_wrap=True)
        for call in message.tool_calls:
            out().print(plain(f"-> {call.tool_name} {call.args_json()}", "bold"), soft_wrap=True)
        return
    for part in message.parts:
        if isinstance(part, UserPromptPart):
            out().print(plain(f"> {part.content}", "cyan"), soft_wrap=True)
        elif not isinstance(part, SystemPromptPart):
            out().print(plain(f"   {part.model_text()}", "dim"), soft_wrap=True)
