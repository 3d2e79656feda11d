"""The remote model against a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest
from pydantic import BaseModel

from dspark_agent import (
    Agent,
    AgentEvent,
    ContextLengthError,
    DeadlineExceeded,
    FinishReason,
    ModelError,
    ModelHTTPError,
    ModelSettings,
    OpenAIModel,
    TextDelta,
    ToolCallDelta,
    UsageLimits,
    UserError,
    infer_model,
)
from dspark_agent.models.sse import EventDecoder


class City(BaseModel):
    name: str
    people: int


def population(city: str) -> int:
    """How many people live there."""
    return len(city)


class Server:
    """Gives out its ``answers`` in order: (status, headers, body pieces); keeps the requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], list[str]]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = threading.Event()
        self.pause_s = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.requests.append(json.loads(body))
                sent = {name.lower(): value for name, value in self.headers.items()}
                server.headers.append({"path": self.path, **sent})
                status, headers, pieces = server.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(piece.encode())
                        self.wfile.flush()
                        time.sleep(server.pause_s)
                except OSError:
                    server.hung_up.set()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def streams(self, *chunks: dict[str, Any], done: bool = True) -> None:
        pieces = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        if done:
            pieces.append("data: [DONE]\n\n")
        self.answers.append((200, {"Content-Type": "text/event-stream"}, pieces))

    def refuses(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        sent = {"Content-Type": "application/json", **(headers or {})}
        self.answers.append((status, sent, [body]))

    def breaks_off(self, *chunks: dict[str, Any]) -> None:
        """Promises more than it sends, and hangs up."""
        self.streams(*chunks, done=False)
        self.answers[-1][1]["Content-Length"] = "100000"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def model_on(server: Server, **options: Any) -> OpenAIModel:
    return OpenAIModel("m1", base_url=server.base_url, **options)


def text(*deltas: str, reason: str = "stop") -> list[dict[str, Any]]:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": d}}]} for d in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    return chunks


def call_delta(index: int, **fields: Any) -> dict[str, Any]:
    delta = {"tool_calls": [{"index": index, **fields}]}
    return {"choices": [{"index": 0, "delta": delta}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 8},
    },
}


@pytest.mark.anyio
async def test_text_is_streamed_and_counted(server: Server) -> None:
    server.streams(*text("Hel", "lo ", "there"), USAGE)
    agent = Agent(model_on(server, api_key="secret"), instructions="Be brief.")
    async with agent.run_stream("Hi", model_settings={"temperature": 0.5}) as stream:
        deltas = [event.delta async for event in stream if isinstance(event, TextDelta)]
        result = await stream.result()
    assert deltas == ["Hel", "lo ", "there"]
    assert result.output == "Hello there"
    assert (result.usage.input_tokens, result.usage.cached_tokens) == (11, 8)
    assert result.usage.output_tokens == 3
    metrics = result.steps[0].metrics
    assert 0 < metrics.ttft_s <= metrics.total_s
    assert metrics.parts_s == pytest.approx(metrics.total_s, rel=0.02)
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.requests[0] == {
        "model": "m1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }


@pytest.mark.anyio
async def test_tools_are_called_and_their_results_sent_back(server: Server) -> None:
    server.streams(
        call_delta(0, id="c1", type="function", function={"name": "population", "arguments": ""}),
        call_delta(0, function={"arguments": '{"city": '}),
        call_delta(0, function={"arguments": '"Rome"}'}),
        call_delta(1, id="c2", function={"name": "population", "arguments": '{"city": "Ulm"}'}),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    )
    server.streams(*text("4 and 3"))
    agent = Agent(model_on(server), tools=[population])
    events: list[Any] = []
    result = await agent.run("How many?", on_event=events.append)
    assert result.output == "4 and 3"
    assert result.steps[0].response.finish_reason is FinishReason.TOOL_CALL
    assert [call.args for call in result.steps[0].tool_calls] == [{"city": "Rome"}, {"city": "Ulm"}]
    deltas = [(e.index, e.delta) for e in events if isinstance(e, ToolCallDelta)]
    assert deltas == [(0, '{"city": '), (0, '"Rome"}'), (1, '{"city": "Ulm"}')]
    first, second = server.requests
    assert first["tools"][0]["function"]["name"] == "population"
    assert first["tool_choice"] == "auto"
    assert second["messages"][1]["tool_calls"][1] == {
        "type": "function",
        "id": "c2",
        "function": {"name": "population", "arguments": '{"city": "Ulm"}'},
    }
    assert [(m["tool_call_id"], m["content"]) for m in second["messages"][2:]] == [
        ("c1", "4"),
        ("c2", "3"),
    ]


@pytest.mark.anyio
async def test_arguments_that_are_no_json_come_back_as_a_retry(server: Server) -> None:
    function = {"name": "population", "arguments": '{"city": '}
    done = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    server.streams(call_delta(0, id="c1", function=function), done)
    fixed = {"name": "population", "arguments": '{"city": "Rome"}'}
    server.streams(call_delta(0, id="c2", function=fixed), done)
    async with Agent(model_on(server), tools=[population]).session() as session:
        step = await session.step("Go", tool_choice="population")
    assert (step.tool_result, step.attempts) == (4, 2)
    assert server.requests[0]["tool_choice"] == {
        "type": "function",
        "function": {"name": "population"},
    }
    assert "Invalid JSON" in server.requests[1]["messages"][2]["content"]


@pytest.mark.anyio
async def test_a_typed_result_is_asked_for_by_schema(server: Server) -> None:
    server.streams(*text('{"name": "Rome", ', '"people": 3}'))
    agent = Agent(model_on(server, strict_schemas=True), output_type=City)
    assert (await agent.run("Which?")).output == City(name="Rome", people=3)
    asked = server.requests[0]["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["strict"] is True
    assert list(asked["json_schema"]["schema"]["properties"]) == ["name", "people"]


@pytest.mark.anyio
async def test_a_result_or_words_is_asked_for_in_words(server: Server) -> None:
    server.streams(*text("I do not know."))
    agent = Agent(model_on(server), output_type=City | str)
    assert (await agent.run("Which?")).output == "I do not know."
    (request,) = server.requests
    assert "response_format" not in request
    assert request["messages"][-1]["content"] == (
        'Which?\n\nAnswer in words or with JSON: {"name": string, "people": integer}'
    )


@pytest.mark.anyio
async def test_settings_are_translated_or_refused(server: Server) -> None:
    server.streams(*text("ok"))
    settings: ModelSettings = {
        "max_tokens": 7,
        "stop_sequences": ["END"],
        "logit_bias": {5: -1.0},
        "seed": 3,
    }
    agent = Agent(model_on(server), model_settings=settings)
    await agent.run("Go")
    sent = server.requests[0]
    assert (sent["max_tokens"], sent["stop"], sent["seed"]) == (7, ["END"], 3)
    assert sent["logit_bias"] == {"5": -1.0}
    with pytest.raises(UserError, match="'top_k'"):
        await agent.run("Go", model_settings={"top_k": 4})


@pytest.mark.anyio
async def test_a_refusal_carries_status_and_reason(server: Server) -> None:
    server.refuses(401, '{"error": {"message": "no such key", "code": "invalid_api_key"}}')
    with pytest.raises(ModelHTTPError, match="401: no such key") as caught:
        await Agent(model_on(server)).run("Hi")
    assert caught.value.status_code == 401
    server.refuses(400, '{"error": {"message": "9000 tokens", "code": "context_length_exceeded"}}')
    with pytest.raises(ContextLengthError, match="9000 tokens"):
        await Agent(model_on(server)).run("Hi")
    server.refuses(404, "<html>not here</html>")
    with pytest.raises(ModelHTTPError, match="404: <html>not here</html>"):
        await Agent(model_on(server)).run("Hi")


@pytest.mark.anyio
async def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.refuses(503, "busy")
    server.streams(*text("ok"))
    assert (await Agent(model_on(server, max_retries=1)).run("Hi")).output == "ok"
    server.refuses(503, "still busy")
    with pytest.raises(ModelHTTPError, match=r"still busy \(sent 1 time"):
        await Agent(model_on(server, max_retries=0)).run("Hi")


@pytest.mark.anyio
async def test_pauses_count_as_queue_and_not_as_prefill(server: Server) -> None:
    server.refuses(429, "slow down", {"Retry-After": "0.3"})
    server.streams(*text("ok"))
    result = await Agent(model_on(server)).run("Hi")
    metrics = result.steps[0].metrics
    assert metrics.queue_s >= 0.3
    assert metrics.ttft_s >= metrics.queue_s
    assert metrics.parts_s == pytest.approx(metrics.total_s, rel=0.02)


@pytest.mark.anyio
async def test_a_server_that_wants_too_long_a_pause_is_not_waited_for(server: Server) -> None:
    server.refuses(429, "quota", {"Retry-After": "3600"})
    with pytest.raises(ModelHTTPError, match="asks to wait 3600 s, max_retry_wait is 5 s"):
        await Agent(model_on(server, max_retry_wait=5.0)).run("Hi")
    assert len(server.requests) == 1


@pytest.mark.anyio
async def test_a_deadline_holds_while_a_server_is_waited_for(server: Server) -> None:
    server.refuses(503, "busy", {"Retry-After": "20"})
    with pytest.raises(DeadlineExceeded):
        await Agent(model_on(server)).run("Hi", limits=UsageLimits(wall_seconds=0.5))


@pytest.mark.anyio
async def test_a_connection_lost_before_the_answer_is_opened_again(server: Server) -> None:
    server.breaks_off()
    server.streams(*text("ok"))
    seen: list[AgentEvent] = []
    result = await Agent(model_on(server)).run("Hi", on_event=seen.append)
    assert result.output == "ok"
    assert len(server.requests) == 2
    assert [event.delta for event in seen if isinstance(event, TextDelta)] == ["ok"]


@pytest.mark.anyio
async def test_a_connection_lost_in_the_answer_is_an_error(server: Server) -> None:
    server.breaks_off(*text("half")[:1])
    with pytest.raises(ModelHTTPError, match="no answer from"):
        await Agent(model_on(server)).run("Hi")
    assert len(server.requests) == 1


@pytest.mark.anyio
async def test_nobody_there_is_a_clear_error() -> None:
    model = OpenAIModel("m", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(ModelHTTPError, match="is the server running") as caught:
        await Agent(model).run("Hi")
    assert caught.value.status_code is None


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        (text("cut off")[:1], "before the answer was finished"),
        ([{"error": {"message": "out of memory"}}], "out of memory"),
        ([{"choices": "none"}], "not a completion chunk"),
        ([call_delta(0, id="c")], "without a name"),
    ],
)
@pytest.mark.anyio
async def test_a_broken_stream_undoes_the_step(
    server: Server, chunks: list[dict[str, Any]], says: str
) -> None:
    server.streams(*chunks)
    server.streams(*text("ok"))
    async with Agent(model_on(server)).session() as session:
        with pytest.raises(ModelError, match=says):
            await session.step("Hi")
        assert session.messages == ()
        assert (await session.step("Hi")).output == "ok"


@pytest.mark.anyio
async def test_an_answer_cut_by_its_length_says_so_to_the_model(server: Server) -> None:
    server.streams(*text('{"name": "Ro', reason="length"))
    server.streams(*text('{"name": "Rome", "people": 3}'))
    result = await Agent(model_on(server), output_type=City).run("Which?")
    assert "cut off at the token limit" in str(result.steps[0].retry_reason)
    assert result.steps[0].response.finish_reason is FinishReason.LENGTH


@pytest.mark.anyio
async def test_cancelling_hangs_up(server: Server) -> None:
    server.pause_s = 0.02
    server.streams(*text(*["word "] * 500))
    server.streams(*text("ok"))
    async with Agent(model_on(server)).session() as session:
        with anyio.move_on_after(0.2) as scope:
            await session.step("Hi")
        assert scope.cancelled_caught
        assert await anyio.to_thread.run_sync(server.hung_up.wait, 5)
        assert session.messages == ()
        server.pause_s = 0
        assert (await session.step("Hi")).output == "ok"


@pytest.mark.anyio
async def test_forks_have_their_own_connection(server: Server) -> None:
    for answer in ("one", "two", "three"):
        server.streams(*text(answer))
    async with Agent(model_on(server)).session() as session:
        await session.step("Hi")
        async with await session.fork() as child:
            await child.step("you")
        await session.step("me")
    contents = [[m["content"] for m in request["messages"]] for request in server.requests]
    assert contents == [["Hi"], ["Hi", "one", "you"], ["Hi", "one", "me"]]


@pytest.mark.anyio
async def test_a_client_of_the_callers_stays_open(server: Server) -> None:
    server.streams(*text("ok"))
    async with httpx.AsyncClient() as client:
        await Agent(model_on(server, http_client=client)).run("Hi")
        assert not client.is_closed


def test_server_sent_events() -> None:
    lines = [": hello", "", "event: x", "data: a", "data:b", "", "data: [DONE]", "", "", "data: c"]
    decoder = EventDecoder()
    assert [data for line in lines if (data := decoder.feed(line)) is not None] == ["a\nb"]


def test_a_remote_name_needs_its_server() -> None:
    with pytest.raises(UserError, match="base_url"):
        infer_model("openai:gpt-x")
    model = infer_model("openai:gpt-x", base_url="http://localhost/v1/")
    assert isinstance(model, OpenAIModel)
    assert (model.name, model.url) == ("gpt-x", "http://localhost/v1/chat/completions")
