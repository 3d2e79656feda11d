"""A remote model behind an OpenAI-compatible chat-completions server."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import anyio
import httpx

from dspark_agent.errors import ContextLengthError, ModelHTTPError, UserError
from dspark_agent.messages import FinishReason, ModelRequest, ModelResponse
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.backoff import PASSING, Backoff, PassingFailure, asked_wait_s
from dspark_agent.models.base import Emit, Model, ModelSession, ModelTurn, TranscriptSession
from dspark_agent.models.chat import function_tools, server_messages
from dspark_agent.models.completion import Completion
from dspark_agent.models.outline import ask_for_result
from dspark_agent.models.sse import EventDecoder
from dspark_agent.settings import ModelSettings

_SAME_NAME = ("max_tokens", "temperature", "top_p", "seed", "presence_penalty",
              "frequency_penalty")  # fmt: skip
_EMBEDDED_ONLY = ("top_k", "min_p", "repetition_penalty", "forced")


class OpenAIModel(Model):
    """A model behind ``POST {base_url}/chat/completions``, streamed.

    Args:
        model: the server's name for it.
        base_url: for example ``https://api.openai.com/v1`` or ``http://127.0.0.1:8000/v1``.
        api_key: sent as bearer token. Never read from the environment.
        http_client: yours, and yours to close; by default each session has its own.
        timeout: seconds of silence, connecting or between two chunks, before giving up.
        max_retries: how often a request that was refused with 408, 409, 429 or 5xx, could not be
            sent, or lost its connection before the answer began, is sent again, with growing
            pauses (or the one that the server asks for). They count as ``queue_s`` of the step.
        max_retry_wait: the longest of those pauses, in seconds; a server that asks for a longer
            one is not asked again.
        strict_schemas: ask the server to enforce output schemas strictly. OpenAI then wants every
            property required; ``False`` is safe, since outputs are validated here anyway.
        settings: this model's own defaults.
    """

    provider = "openai"

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str | None = None,
        http_client: httpx.AsyncClient | None = None,
        timeout: float = 60.0,
        max_retries: int = 2,
        max_retry_wait: float = 30.0,
        strict_schemas: bool = False,
        settings: ModelSettings | None = None,
    ) -> None:
        self.settings = settings
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.backoff = Backoff(max_retries, max_retry_wait)
        self.strict_schemas = strict_schemas
        self._name = model
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = http_client
        self._timeout = timeout

    @property
    def name(self) -> str:
        return self._name

    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        return _OpenAISession(self)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def client(self) -> httpx.AsyncClient:
        """A client for one session; a connection pool belongs to one event loop."""
        return self._client or httpx.AsyncClient(verify=self._tls, timeout=self._timeout)

    @property
    def owns_clients(self) -> bool:
        """Whether sessions close their clients."""
        return self._client is None

    @asynccontextmanager
    async def post(
        self, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of the server's streamed answer, once it has begun well.

        Raises:
            ContextLengthError: the server says that the conversation is too long.
            ModelHTTPError: it refuses for good, or breaks off.
            PassingFailure: it refuses for now, or cannot be reached.
        """
        try:
            request = client.build_request("POST", self.url, json=body, headers=self._headers)
            response = await client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise PassingFailure(_unreachable(self.url, error)) from error
        if not response.is_success:
            problem = await _refusal(self.url, response)
            if isinstance(problem, ModelHTTPError) and response.status_code in PASSING:
                asked = asked_wait_s(response.headers, datetime.now(tz=UTC))
                raise PassingFailure(problem, asked)
            raise problem
        lines = response.aiter_lines()
        try:
            yield lines
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error
        finally:
            with anyio.CancelScope(shield=True), suppress(httpx.HTTPError, httpx.StreamError):
                await response.aclose()
                # Runs httpx's nested generators to their end: trio wants none left behind.
                async for _ in lines:
                    pass


class _OpenAISession(TranscriptSession):
    def __init__(self, model: OpenAIModel) -> None:
        super().__init__()
        self._model = model
        self._client = model.client()

    def _empty_copy(self) -> TranscriptSession:
        return _OpenAISession(self._model)

    async def close(self) -> None:
        if self._model.owns_clients:
            await self._client.aclose()

    async def respond(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        began = time.perf_counter()
        body = _body(self._model, messages, turn)
        backoff = self._model.backoff
        failures = 0
        while True:
            try:
                return await self._attempt(body, emit, began)
            except PassingFailure as failure:
                failures += 1
                pause_s = backoff.pause_s(failures, failure.asked_s)
                if pause_s is None:
                    raise backoff.given_up(failure, failures) from failure
            await anyio.sleep(pause_s)

    async def _attempt(self, body: dict[str, Any], emit: Emit, began: float) -> ModelResponse:
        """Send the request once; ``began`` is when the turn did."""
        sent = time.perf_counter()
        first: float | None = None
        completion = Completion()
        events = EventDecoder()
        try:
            async with self._model.post(self._client, body) as lines:
                async for line in lines:
                    data = events.feed(line)
                    for event in completion.feed(data) if data is not None else ():
                        first = first or time.perf_counter()
                        await emit(event)
        except ModelHTTPError as error:
            if first is None and error.status_code is None:
                raise PassingFailure(error) from error
            raise  # the caller has seen a part of the answer
        for event in completion.end():
            await emit(event)
        done = time.perf_counter()
        usage = completion.usage
        return ModelResponse(
            parts=completion.parts(),
            model_name=self._model.name,
            usage=usage,
            finish_reason=completion.finish_reason or FinishReason.ERROR,
            metrics=StepMetrics(
                queue_s=sent - began,
                prefill_s=(first or done) - sent,
                prefill_new_tokens=usage.input_tokens - usage.cached_tokens,
                prefill_cached_tokens=usage.cached_tokens,
                ttft_s=(first or done) - began,
                decode_s=done - (first or done),
                total_s=done - began,
                new_tokens=usage.output_tokens,
            ),
        )


def _body(
    model: OpenAIModel, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model.name,
        "messages": server_messages(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        **_settings(turn.settings),
    }
    if turn.tools:
        body["tools"] = function_tools(turn.tools)
        named = turn.tool_choice not in ("auto", "required", "none")
        function = {"type": "function", "function": {"name": turn.tool_choice}}
        body["tool_choice"] = function if named else turn.tool_choice
        if "parallel_tool_calls" in turn.settings:
            body["parallel_tool_calls"] = turn.settings["parallel_tool_calls"]
    if turn.output_schema is not None and turn.allow_text:
        ask_for_result(body["messages"], turn)  # no response_format allows words beside JSON
    elif turn.output_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {
                "name": "output",
                "schema": turn.output_schema,
                "strict": model.strict_schemas,
            },
        }
    return body


def _settings(settings: ModelSettings) -> dict[str, Any]:
    given: dict[str, Any] = dict(settings)
    for name in _EMBEDDED_ONLY:
        if name in given:
            raise UserError(f"model_settings: {name!r} exists in the embedded model only")
    body = {name: given[name] for name in _SAME_NAME if name in given}
    if "stop_sequences" in given:
        body["stop"] = list(given["stop_sequences"])
    if "logit_bias" in given:
        body["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    return body


def _unreachable(url: str, error: httpx.HTTPError) -> ModelHTTPError:
    reason = str(error) or type(error).__name__
    return ModelHTTPError(f"no answer from {url}: {reason}; is the server running and reachable?")


async def _refusal(url: str, response: httpx.Response) -> ModelHTTPError | ContextLengthError:
    try:
        body = (await response.aread()).decode(errors="replace")
    finally:
        await response.aclose()
    message, code = _reason(body)
    if code == "context_length_exceeded":
        return ContextLengthError(message)
    return ModelHTTPError(
        f"{url} answered {response.status_code}: {message}",
        status_code=response.status_code,
        body=body,
    )


def _reason(body: str) -> tuple[str, str | None]:
    """What an error body says, and its code."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:500] or "no reason given", None
