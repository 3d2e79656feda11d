"""Real MCP servers as processes and on loopback: their tools, resources, questions and deaths."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from dspark_agent import (
    Agent,
    FunctionModel,
    ModelMessage,
    ModelTurn,
    TestModel,
    ToolCallPart,
    ToolFailed,
    ToolReturnPart,
    UsageLimits,
    UserError,
)
from dspark_agent.mcp import (
    Elicitation,
    MCPConnectionError,
    MCPError,
    MCPOutputTooLarge,
    MCPResource,
    MCPServer,
    MCPServerHTTP,
    MCPServerStdio,
    MCPToolChangedError,
    Sampling,
)

pytestmark = [
    pytest.mark.anyio,
    # Streams of responses that a closing client of the mcp package leaves to the collector.
    pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning"),
]
SERVERS = Path(__file__).parent / "mcp_servers"
HELPFUL = str(SERVERS / "helpful.py")


def helpful(**options: Any) -> MCPServerStdio:
    return MCPServerStdio(sys.executable, [HELPFUL, "stdio"], **{"name": "helpful", **options})


def scripted(mode: str, **options: Any) -> MCPServerStdio:
    script = str(SERVERS / "scripted.py")
    return MCPServerStdio(sys.executable, [script, mode], **{"name": mode, **options})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def listening(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The helpful server on loopback, ready to be connected to."""
    process = subprocess.Popen([sys.executable, HELPFUL, "http", str(port)])
    try:
        while True:
            assert process.poll() is None
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    with listening(port):
        yield f"http://127.0.0.1:{port}/mcp"


@pytest.fixture
async def server(url: str) -> AsyncIterator[MCPServer]:
    """The one on loopback: starting a process for every test would take seconds."""
    async with MCPServerHTTP(url) as server:
        yield server


def calls(name: str, then: str = "done", **args: Any) -> FunctionModel:
    """A model that calls a tool once, and then answers."""

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        first = not any(m.kind == "response" for m in messages)
        return ToolCallPart(tool_name=name, args=args) if first else then

    return FunctionModel(answer)


def returned(result: Any) -> ToolReturnPart:
    parts = [part for message in result.all_messages() for part in message.parts]
    (part,) = (part for part in parts if isinstance(part, ToolReturnPart))
    return part


# -- tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_both_transports_work_on_both_event_loops(transport: str, url: str) -> None:
    async with helpful() if transport == "stdio" else MCPServerHTTP(url) as server:
        assert await server.call("add", {"a": 1, "b": 2}) == {"result": 3}


async def test_an_agent_calls_a_servers_tools(server: MCPServer) -> None:
    toolset = await server.toolset(include=["add"])
    result = await Agent(calls("add", a=2, b=3), toolsets=[toolset]).run("Go")
    assert returned(result).content == {"result": 5}


async def test_names_are_cleaned_and_prefixed(server: MCPServer) -> None:
    toolset = await server.toolset(include=["add", "files.search/all"], prefix="my")
    assert list(toolset.tools) == ["my_add", "my_files_search_all"]
    definition = toolset.tools["my_files_search_all"].definition
    assert definition.description == "Search all files."
    assert definition.parameters == {
        "type": "object",
        "properties": {"text": {"type": "string"}, "limit": {"type": "integer", "default": 10}},
        "required": ["text"],
        "additionalProperties": False,
    }
    model = calls("my_files_search_all", text="a", limit=2)
    assert returned(await Agent(model, toolsets=[toolset]).run("Go")).content == {
        "result": ["a0", "a1"]
    }


async def test_tools_are_chosen_by_name_or_by_a_function(server: MCPServer) -> None:
    assert "add" in server.tool_names
    some = await server.toolset(include=lambda name: name.startswith("w"), exclude=["write"])
    assert list(some.tools) == ["wait", "weather"]
    without = await server.toolset(exclude=["add"])
    assert len(without.tools) == len(server.tool_names) - 1
    with pytest.raises(UserError, match="has no tool 'ad'; it has: add, "):
        await server.toolset(include=["ad"])


async def test_wrong_arguments_never_reach_the_server(server: MCPServer) -> None:
    toolset = await server.toolset(include=["add"])
    result = await Agent(calls("add", a="two", c=1), toolsets=[toolset]).run("Go")
    refusal = str(result.all_messages()[2].parts[0].content)
    assert "$.a: 'two' is not of type 'integer'" in refusal
    assert "'c' was unexpected" in refusal
    assert "'b' is a required property" in refusal


async def test_two_servers_with_one_tool_name_are_refused(server: MCPServer) -> None:
    first, second = await server.toolset(include=["add"]), await server.toolset(include=["add"])
    with pytest.raises(UserError, match="two tools are called 'add'"):
        Agent(TestModel(), toolsets=[first, second])


async def test_a_tool_that_fails_tells_the_model(server: MCPServer) -> None:
    toolset = await server.toolset(include=["fail"])
    part = returned(await Agent(calls("fail", why="no paper"), toolsets=[toolset]).run("Go"))
    assert part.outcome == "failed"
    assert "no paper" in part.content
    with pytest.raises(ToolFailed, match="no paper"):
        await server.call("fail", {"why": "no paper"})


async def test_what_is_no_text_is_described(server: MCPServer) -> None:
    assert await server.call("picture") == "a dot\n[image of type image/png, 3 bytes]"


async def test_huge_output_is_an_error_and_the_model_is_told(url: str) -> None:
    async with MCPServerHTTP(url, max_output_chars=1000) as server:
        assert len(await server.call("write", {"characters": 1000})) == 1000
        with pytest.raises(MCPOutputTooLarge, match=r"gave 1001 characters.*max_output_chars=1000"):
            await server.call("write", {"characters": 1001})
        toolset = await server.toolset(include=["write"])
        part = returned(await Agent(calls("write", characters=9999), toolsets=[toolset]).run("Go"))
        assert part.outcome == "failed"
        assert "ask for less" in part.content
        assert len(part.content) < 300


async def test_many_calls_share_one_connection(server: MCPServer) -> None:
    found: dict[int, Any] = {}

    async def add(n: int) -> None:
        found[n] = await server.call("add", {"a": n, "b": n})

    async with anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(add, n)
    assert found == {n: {"result": 2 * n} for n in range(20)}


async def test_secrets_of_this_process_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "x")
    async with scripted("plain", env={"GIVEN": "y"}) as server:
        names = (await server.call("echo", {"text": "environment"})).split()
    assert "GIVEN" in names
    assert "PATH" in names
    assert "MY_SECRET" not in names


async def test_a_tool_rewritten_on_a_server_of_the_newer_protocol_is_refused(
    server: MCPServer,
) -> None:
    agent = Agent(calls("weather", city="Oslo"), toolsets=[await server.toolset()])
    assert returned(await agent.run("Go")).content == {"result": "sun in Oslo"}
    await server.call("rewrite")

    async def run_until_the_news_is_there() -> None:  # it comes on a stream of its own
        with anyio.fail_after(10):
            while True:
                await agent.run("Go")
                await anyio.sleep(0.01)

    with pytest.raises(MCPToolChangedError, match="'weather' has changed while it was in use"):
        await run_until_the_news_is_there()


async def test_a_server_from_the_package_index() -> None:
    async with MCPServerStdio(sys.executable, ["-m", "mcp_server_time"]) as server:
        toolset = await server.toolset(prefix="time")
        model = calls(
            "time_convert_time",
            source_timezone="Europe/Oslo",
            time="12:30",
            target_timezone="Asia/Tokyo",
        )
        content = returned(await Agent(model, toolsets=[toolset]).run("Go")).content
    text = content if isinstance(content, str) else json.dumps(content)
    assert "T12:30:00" in text
    assert "Asia/Tokyo" in text


# -- time, cancellation, death -----------------------------------------------------------------


async def until(path: Path, text: str) -> None:
    with anyio.fail_after(10):
        while not path.exists() or path.read_text() != text:
            await anyio.sleep(0.01)


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_a_cancelled_run_cancels_the_call_on_the_server(
    transport: str, url: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    async with helpful() if transport == "stdio" else MCPServerHTTP(url) as server:
        toolset = await server.toolset(include=["wait"])
        agent = Agent(calls("wait", log=str(log), seconds=60), toolsets=[toolset])
        async with anyio.create_task_group() as group:
            group.start_soon(agent.run, "Go")
            await until(log, "begun")
            group.cancel_scope.cancel()
        await until(log, "cancelled")
        assert await server.call("add", {"a": 1, "b": 1}) == {"result": 2}


async def test_a_call_past_its_time_is_stopped_and_the_model_told(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with MCPServerHTTP(url, timeout=0.3) as server:
        toolset = await server.toolset(include=["wait"])
        agent = Agent(calls("wait", log=str(log), seconds=60), toolsets=[toolset])
        result = await agent.run("Go")
        await until(log, "cancelled")
    assert "wait took longer than 0.3 s" in result.all_messages()[2].parts[0].content


async def test_a_direct_call_past_its_time_is_an_error(server: MCPServer, tmp_path: Path) -> None:
    with pytest.raises(MCPConnectionError, match=r"no answer to tools/call of 'wait' within 0\.1"):
        await server.call("wait", {"log": str(tmp_path / "log"), "seconds": 60}, timeout=0.1)


def says(order: str) -> dict[str, Any]:
    return {"text": order}


async def test_a_server_that_dies_in_a_call_is_started_again() -> None:
    async with scripted("plain") as server:
        before = await server.call("echo", says("pid"))
        with pytest.raises(MCPConnectionError, match="lost during tools/call of 'echo'") as caught:
            await server.call("echo", says("die"))
        assert "whether it was done is not known" in str(caught.value)
        assert "a last word" in str(caught.value)
        assert await server.call("echo", says("pid")) != before


async def test_the_model_is_told_of_a_death_and_can_call_again(tmp_path: Path) -> None:
    order = f"die once:{tmp_path / 'marker'}"

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> Any:
        call = ToolCallPart(tool_name="echo", args=says(order))
        return call if len(messages) < 5 else "done"

    async with scripted("plain") as server:
        agent = Agent(FunctionModel(answer), toolsets=[await server.toolset()])
        result = await agent.run("Go")
    lost, alive = (message.parts[0] for message in result.all_messages()[2:5:2])
    assert isinstance(lost, ToolReturnPart)
    assert lost.outcome == "failed"
    assert "the connection was lost" in lost.content
    assert isinstance(alive, ToolReturnPart)
    assert alive.content == order


async def test_a_server_found_dead_between_calls_costs_no_call() -> None:
    async with scripted("plain") as server:
        pid = await server.call("echo", says("die soon"))
        with anyio.fail_after(10):
            while Path(f"/proc/{pid}").exists():
                await anyio.sleep(0.01)
        await anyio.sleep(0.05)
        assert await server.call("echo", says("pid")) != pid


async def test_a_killed_http_server_is_connected_to_again() -> None:
    port = free_port()
    with listening(port) as process:
        server = MCPServerHTTP(f"http://127.0.0.1:{port}/mcp", name="web")
        async with server:
            toolset = await server.toolset(include=["add"])
            agent = Agent(calls("add", a=1, b=2), toolsets=[toolset])
            assert returned(await agent.run("Go")).content == {"result": 3}
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(MCPConnectionError, match="'web'"):
                await server.call("add", {"a": 1, "b": 2})
            with pytest.raises(MCPConnectionError, match="'web': cannot connect"):
                await agent.run("Go")
            with listening(port):
                assert returned(await agent.run("Go")).content == {"result": 3}


async def test_closing_ends_the_process() -> None:
    async with scripted("plain") as server:
        pid = await server.call("echo", says("pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    with pytest.raises(MCPConnectionError, match="not open"):
        await server.call("echo", says("pid"))
    async with server:
        assert await server.call("echo", says("pid")) != pid


async def test_an_error_inside_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with scripted("plain"):
            raise ZeroDivisionError


async def test_cancelling_while_it_starts_leaves_no_process() -> None:
    server = scripted("silent")
    with anyio.move_on_after(0.5) as scope:
        await server.__aenter__()
    assert scope.cancelled_caught
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(b"scripted.py\0silent" in command for command in commands)


async def test_a_server_is_opened_once() -> None:
    async with scripted("plain") as server:
        with pytest.raises(UserError, match="'plain' is open already"):
            await server.__aenter__()
        assert await server.call("echo", {"text": "still open"}) == "still open"


@pytest.mark.parametrize(
    ("server", "match"),
    [
        (MCPServerStdio("no-such-program", name="gone"), "cannot connect .*no-such-program"),
        (scripted("exit"), "cannot connect (.|\n)*last words(.|\n)*cannot find my settings"),
        (scripted("silent", connect_timeout=0.5), r"not connected within connect_timeout=0\.5 s"),
        (scripted("old-version"), "cannot connect .*1999-01-01"),
        (MCPServerHTTP("http://127.0.0.1:9/mcp"), "127.0.0.1:9/mcp': cannot connect"),
    ],
    ids=lambda value: value.name if isinstance(value, MCPServer) else "",
)
async def test_a_server_that_cannot_be_connected_to(server: MCPServer, match: str) -> None:
    with pytest.raises(MCPConnectionError, match=match) as caught:
        await server.__aenter__()
    assert caught.value.server == server.name


@pytest.mark.parametrize("url", ["", "localhost:80", "ftp://x/y", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="give a URL"):
        MCPServerHTTP(url)


def test_credentials_in_a_url_are_not_shown() -> None:
    assert MCPServerHTTP("https://me:secret@host:1/mcp?key=secret").name == "https://host:1/mcp"


# -- resources ---------------------------------------------------------------------------------


async def test_resources_are_listed_and_read(server: MCPServer) -> None:
    found = await server.list_resources()
    assert found[0] == MCPResource(
        uri="notes://today",
        name="today",
        description="The notes of today.",
        mime_type="text/plain",
    )
    assert [each.uri for each in found if each.is_template] == ["notes://day/{day}"]
    assert await server.read_resource("notes://today") == "Buy milk."
    assert await server.read_resource("notes://day/monday") == "Notes of monday."
    assert "image/png, 3 bytes" in await server.read_resource("notes://picture")
    with pytest.raises(MCPError, match="resources/read of 'notes://nowhere'"):
        await server.read_resource("notes://nowhere")


async def test_the_model_reads_resources_itself(server: MCPServer) -> None:
    toolset = await server.toolset(include=[], resources=True, prefix="notes")
    assert list(toolset.tools) == ["notes_list_resources", "notes_read_resource"]
    agent = Agent(calls("notes_read_resource", uri="notes://today"), toolsets=[toolset])
    assert returned(await agent.run("Go")).content == "Buy milk."
    agent = Agent(calls("notes_list_resources"), toolsets=[toolset])
    assert "notes://today" in returned(await agent.run("Go")).model_text()
    agent = Agent(calls("notes_read_resource", uri="notes://nowhere"), toolsets=[toolset])
    assert returned(await agent.run("Go")).outcome == "failed"


async def test_a_server_without_resources_has_none() -> None:
    async with scripted("plain") as server:
        assert await server.list_resources() == []


# -- what the server asks ----------------------------------------------------------------------


async def test_a_server_lets_our_model_write(url: str) -> None:
    sampling = Sampling(TestModel(custom_output_text="frogs leap"))
    async with MCPServerHTTP(url, sampling=sampling) as server:
        assert await server.call("haiku", {"topic": "pond"}) == "test: frogs leap (endTurn)"
    assert sampling.usage.requests == 1
    assert sampling.usage.output_tokens == 2


async def test_what_the_model_is_asked_is_what_the_server_said(url: str) -> None:
    heard: list[tuple[list[ModelMessage], ModelTurn]] = []

    def answer(messages: list[ModelMessage], turn: ModelTurn) -> str:
        heard.append((messages, turn))
        return "text"

    sampling = Sampling(FunctionModel(answer), max_tokens=50)
    async with MCPServerHTTP(url, sampling=sampling) as server:
        await server.call("haiku", {"topic": "pond"})
    ((message,), turn) = heard[0]
    assert [part.content for part in message.parts] == ["You are a poet.", "Haiku: pond"]  # type: ignore[union-attr]
    assert turn.settings == {"max_tokens": 50, "temperature": 0.5}
    assert not turn.tools


async def test_sampling_ends_at_its_limit_and_where_the_user_says_no() -> None:
    asked: list[tuple[str, str]] = []

    def approve(server: str, prompt: str) -> bool:
        asked.append((server, prompt))
        return len(asked) < 3

    limits = UsageLimits(request_limit=1)
    sampling = Sampling(TestModel(custom_output_text="text"), limits=limits, approve=approve)
    async with scripted("sample", sampling=sampling) as server:
        assert "text" in await server.call("echo", {"text": ""})
        assert "request_limit of 1 reached" in await server.call("echo", {"text": ""})
        assert "the user does not want this" in await server.call("echo", {"text": ""})
    assert asked == [("sample", "Write.")] * 3
    assert sampling.usage.requests == 1


async def test_a_server_may_not_sample_what_it_was_not_allowed_to(url: str) -> None:
    async with scripted("sample") as server:
        assert "not supported" in await server.call("echo", {"text": ""})
    async with scripted("sample-picture", sampling=Sampling(TestModel())) as server:
        assert "samples text only, not 'image'" in await server.call("echo", {"text": ""})
    async with MCPServerHTTP(url) as server:
        with pytest.raises(MCPError, match="sampling"):
            await server.call("haiku", {"topic": "pond"})


async def test_a_servers_question_goes_to_the_hook(url: str) -> None:
    asked: list[Elicitation] = []

    async def answer(question: Elicitation) -> dict[str, Any] | None:
        asked.append(question)
        return {"size": 43} if len(asked) < 2 else None

    async with MCPServerHTTP(url, elicitation=answer, name="shop") as server:
        assert await server.call("order", {"item": "boots"}) == "boots of size 43"
        with pytest.raises(ToolFailed, match="elicitation was decline"):
            await server.call("order", {"item": "boots"})
    assert asked[0].server == "shop"
    assert asked[0].message == "Which size of boots?"
    assert asked[0].schema["properties"]["size"]["type"] == "integer"


async def test_an_answer_that_does_not_fit_the_question_is_not_sent(url: str) -> None:
    async with MCPServerHTTP(url, elicitation=lambda question: {"size": "large"}) as server:
        with pytest.raises(MCPError, match="'large' is not of type 'integer'"):
            await server.call("order", {"item": "boots"})


async def test_a_page_to_open_is_a_question_too() -> None:
    asked: list[str | None] = []

    def answer(question: Elicitation) -> dict[str, Any]:
        asked.append(question.url)
        return {}

    async with scripted("elicit-url", elicitation=answer) as server:
        assert '"accept"' in await server.call("echo", {"text": ""})
    assert asked == ["https://x/y"]


@pytest.mark.parametrize("mode", ["helpful", "scripted"])
async def test_a_hook_that_raises_ends_the_call_with_its_error(mode: str, url: str) -> None:
    def answer(question: Elicitation) -> dict[str, Any]:
        raise ZeroDivisionError

    server, tool, arguments = (
        (MCPServerHTTP(url, elicitation=answer), "order", {"item": "boots"})
        if mode == "helpful"
        else (scripted("elicit-url", elicitation=answer), "echo", {"text": ""})
    )
    async with server:
        with pytest.raises(ZeroDivisionError):
            await server.call(tool, arguments)
