"""A program that is killed: run by test_durable_kill.py, once for each boundary of its journal.

``python durable_child.py FOLDER`` forks a real process for every boundary, lets the kernel kill it
there (SIGKILL), starts another that goes on, and prints what was done as JSON, a line each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio

from dspark_agent import (
    Agent,
    DeferredToolRequests,
    DeferredToolResults,
    FunctionModel,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    ModelTurn,
    RunContext,
    RunResult,
    SqliteJournal,
    ToolApproved,
    ToolCallPart,
    ToolInterruptedError,
)

RUN_ID = "nightly"


def call(name: str, call_id: str, /, **args: Any) -> ToolCallPart:
    return ToolCallPart(tool_name=name, args=args, tool_call_id=call_id)


SCRIPT: tuple[Any, ...] = (
    [call("note", "n1", text="a"), call("note", "n2", text="b")],
    [call("note", "n3", txt="c"), call("flag", "f4", name="c")],  # the first is refused
    [call("remove", "r5", path="x"), call("remove", "r6", path="y"), call("note", "n7", text="d")],
    "almost",  # refused by the validator
    "done",
)


class Ledger:
    """What really happened, on disk, whatever becomes of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger"

    def add(self, *words: object) -> None:
        with self.path.open("a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


class Killing:
    """A SqliteJournal that kills the process at one of its writes."""

    def __init__(self, folder: Path, at: int, before: bool) -> None:
        self.folder = folder
        self.journal = SqliteJournal(folder / "runs.sqlite")
        self.at, self.before, self.written = at, before, 0

    def open(self, run_id: str) -> Any:
        self.log = self.journal.open(run_id)
        self.where, self.read, self.close = self.log.where, self.log.read, self.log.close
        return self

    def append(self, entry: str) -> None:
        self.written += 1
        if self.written != self.at:
            self.log.append(entry)
            return
        (self.folder / "killed").write_text(entry)
        if not self.before:
            self.log.append(entry)
        os.kill(os.getpid(), signal.SIGKILL)


def make_agent(ledger: Ledger) -> Agent[object, Any]:
    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        step = sum(isinstance(message, ModelResponse) for message in messages)
        ledger.add("model", step)
        return SCRIPT[step]

    output_type: Any = str | DeferredToolRequests
    agent: Agent[object, Any] = Agent(FunctionModel(answer), output_type=output_type)

    @agent.instructions
    def now() -> str:
        return f"The process is {os.getpid()}."  # another one each time, and said only once

    @agent.tool
    def note(ctx: RunContext[object], text: str) -> dict[str, str]:
        """Note."""
        ledger.add("tool", ctx.tool_call_id)
        return {"noted": text}

    @agent.tool(idempotent=True)
    async def flag(ctx: RunContext[object], name: str) -> str:
        """Flag."""
        ledger.add("tool", ctx.tool_call_id)
        return f"flagged {name}"

    @agent.tool(requires_approval=True, sequential=True)
    def remove(ctx: RunContext[object], path: str) -> str:
        """Remove."""
        ledger.add("tool", ctx.tool_call_id)
        return f"removed {path}"

    @agent.output_validator
    def strict(output: str) -> str:
        if output != "done":
            raise ModelRetry("not done yet")
        return output

    return agent


RESULTS = {"n1": {"noted": "a"}, "n2": {"noted": "b"}, "n7": {"noted": "d"}, "r6": "removed y"}


async def go(folder: Path, at: int, before: bool) -> tuple[RunResult[Any], list[str]]:
    """The program: the same lines whether it begins or goes on. Its operator approves r6, denies
    r5, and looks into the ledger when a call is in doubt."""
    ledger = Ledger(folder)
    agent, journal = make_agent(ledger), Killing(folder, at, before)
    in_doubt: list[str] = []
    decided = DeferredToolResults(approvals={"r5": False, "r6": True})
    while True:
        try:
            if RUN_ID in journal.journal.unfinished():
                result = await agent.resume(RUN_ID, journal=journal, deferred_tool_results=decided)
            else:
                result = await agent.run("Tidy up", journal=journal, run_id=RUN_ID)
        except ToolInterruptedError as error:
            ids = [call_id for _, call_id in error.calls]
            in_doubt += ids
            ran = {i for i in ids if f"tool {i}" in ledger.lines()}
            decided = DeferredToolResults(
                calls=decided.calls | {i: RESULTS[i] for i in ran},
                approvals={k: v for k, v in decided.approvals.items() if k not in ran}
                | {i: ToolApproved(again=True) for i in ids if i not in ran},
            )
        else:
            if not isinstance(result.output, DeferredToolRequests):
                return result, in_doubt


def process(folder: Path, at: int, before: bool) -> int:
    """Run the program in a process of its own; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        result, in_doubt = anyio.run(go, folder, at, before)
        told = {
            "output": result.output,
            "in_doubt": in_doubt,
            "interrupted": [c.tool_call_id for c in result.interrupted],
            "requests": result.usage.requests,
            "tool_calls": result.usage.tool_calls,
            "messages": [
                [part.model_dump(mode="json") for part in message.parts]
                for message in result.history.messages
            ],
        }
        (folder / "told").write_text(json.dumps(told))
    except BaseException as error:
        (folder / "told").write_text(json.dumps({"error": repr(error)}))
        os._exit(1)
    os._exit(0)


def boundary(folder: Path, at: int, before: bool) -> bool:
    """Kill at one boundary, go on, tell; whether there was such a boundary."""
    folder.mkdir()
    killed = process(folder, at, before)
    if os.WIFSIGNALED(killed):
        process(folder, 0, False)
    report = {
        "at": at,
        "before": before,
        "signal": os.WTERMSIG(killed) if os.WIFSIGNALED(killed) else None,
        "killed": json.loads((folder / "killed").read_text())
        if at and os.WIFSIGNALED(killed)
        else None,
        "ledger": Ledger(folder).lines(),
        "left": sorted(path.name for path in folder.iterdir()),
        **json.loads((folder / "told").read_text()),
    }
    print(json.dumps(report), flush=True)
    return os.WIFSIGNALED(killed)


def main(folder: Path) -> None:
    for before in (False, True):
        at = 1
        while boundary(folder / f"{'before' if before else 'after'}-{at}", at, before):
            at += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
