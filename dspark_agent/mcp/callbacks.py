"""What a server may ask of its client: to let our model write, and to ask the user."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mcp_types as types

from dspark_agent.errors import DSparkError
from dspark_agent.json_schema import complaints
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import (
    FinishReason,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    UserPromptPart,
)
from dspark_agent.models import infer_model
from dspark_agent.models.base import Model, ModelEvent, ModelTurn
from dspark_agent.settings import ModelSettings

SamplingHook = Callable[[str, str], Awaitable[bool] | bool]
"""``(server, prompt)``: whether a server's prompt may go to the model."""


@dataclass(frozen=True, slots=True)
class Elicitation:
    """A server's question to the user.

    ``schema`` is the JSON Schema of the answer; where ``url`` is given instead, the user is to
    open that page, and ``{}`` says that they do.
    """

    server: str
    message: str
    schema: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None


Answer = Mapping[str, Any] | None
ElicitationHook = Callable[[Elicitation], Awaitable[Answer] | Answer]
"""Gives the user's answer, an object that fits the schema, or None to decline."""


@dataclass(slots=True)
class Sampling:
    """Lets servers have ``model`` write for them.

    Only text; no tools. ``limits`` hold over all requests (``wall_seconds`` apart), ``usage`` is
    what they have used. ``max_tokens`` bounds each answer. ``approve`` is asked before each.
    """

    model: Model | str
    limits: UsageLimits = field(default_factory=UsageLimits)
    max_tokens: int = 1024
    approve: SamplingHook | None = None
    usage: RunUsage = field(default_factory=RunUsage)

    async def answer(
        self, server: str, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.ErrorData:
        """Answer one request, or say why not."""
        try:
            messages = _messages(params)
        except ValueError as error:
            return _refusal(str(error))
        prompt = "\n".join(
            block.text
            for block in params.messages[-1].content_as_list
            if isinstance(block, types.TextContent)
        )
        if self.approve is not None and not await _answered(self.approve(server, prompt)):
            return _refusal("the user does not want this")
        try:
            response = await self._write(messages, params)
        except DSparkError as error:
            return _refusal(str(error))
        cut = response.finish_reason is FinishReason.LENGTH
        return types.CreateMessageResult(
            role="assistant",
            content=types.TextContent(type="text", text=response.text),
            model=response.model_name,
            stop_reason="maxTokens" if cut else "endTurn",
        )

    async def _write(
        self,
        messages: list[ModelRequest | ModelResponse],
        params: types.CreateMessageRequestParams,
    ) -> ModelResponse:
        self.model = infer_model(self.model)
        self.limits.check_request(self.usage)
        self.usage.count_request()
        settings = ModelSettings(max_tokens=max(1, min(params.max_tokens, self.max_tokens)))
        left = self.limits.output_tokens_left(self.usage)
        if left is not None:
            settings["max_tokens"] = min(left, settings["max_tokens"])
        if params.temperature is not None:
            settings["temperature"] = params.temperature
        if params.stop_sequences:
            settings["stop_sequences"] = params.stop_sequences
        turn = ModelTurn(tool_choice="none", settings=settings)
        session = await self.model.open(turn)
        try:
            response = await session.step(messages, turn, _ignore)
        finally:
            await session.close()
        self.usage.count_tokens(response.usage)
        return response


class Hooks:
    """What a server's client answers for us. A hook that raises is the caller's error: the server
    is refused, and the error comes out of the request that is in flight."""

    def __init__(
        self, server: str, sampling: Sampling | None, elicitation: ElicitationHook | None
    ) -> None:
        self.server = server
        self.sampling = sampling
        self.elicitation = elicitation
        self._failures: list[Exception] = []

    async def sample(
        self, _: object, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.ErrorData:
        """Answer a sampling request."""
        assert self.sampling is not None
        try:
            return await self.sampling.answer(self.server, params)
        except Exception as error:
            return self._failed(error)

    async def elicit(
        self, _: object, params: types.ElicitRequestParams
    ) -> types.ElicitResult | types.ErrorData:
        """Answer a question to the user."""
        assert self.elicitation is not None
        try:
            return await _elicited(self.server, self.elicitation, params)
        except Exception as error:
            return self._failed(error)

    def raise_failure(self) -> None:
        """Raise what a hook raised, once."""
        if self._failures:
            raise self._failures.pop(0)

    def _failed(self, error: Exception) -> types.ErrorData:
        self._failures.append(error)
        return types.ErrorData(code=types.INTERNAL_ERROR, message="the client failed to answer")


async def _elicited(
    server: str, hook: ElicitationHook, params: types.ElicitRequestParams
) -> types.ElicitResult | types.ErrorData:
    """The hook's answer to a server's question, checked against the question's schema."""
    if isinstance(params, types.ElicitRequestURLParams):
        question = Elicitation(server, params.message, url=params.url)
    else:
        schema = dict(params.requested_schema)
        question = Elicitation(server, params.message, schema)
    answer = await _answered(hook(question))
    if answer is None:
        return types.ElicitResult(action="decline")
    if question.url is not None:
        return types.ElicitResult(action="accept")
    found = complaints(question.schema, dict(answer))
    if found:
        return _refusal(f"the user's answer does not fit the question: {'; '.join(found)}")
    return types.ElicitResult(action="accept", content=dict(answer))


def _messages(
    params: types.CreateMessageRequestParams,
) -> list[ModelRequest | ModelResponse]:
    """The server's messages as ours.

    Raises:
        ValueError: there is no text to answer, or something that is no text.
    """
    messages: list[ModelRequest | ModelResponse] = []
    system = [SystemPromptPart(content=params.system_prompt)] if params.system_prompt else []
    for message in params.messages:
        texts = []
        for block in message.content_as_list:
            if not isinstance(block, types.TextContent):
                raise ValueError(f"this client samples text only, not {block.type!r}")
            texts.append(block.text)
        text = "\n".join(texts)
        if message.role == "assistant":
            messages.append(ModelResponse(parts=(TextPart(content=text),)))
        else:
            messages.append(ModelRequest(parts=(*system, UserPromptPart(content=text))))
            system = []
    if not messages or isinstance(messages[-1], ModelResponse):
        raise ValueError("the last message of a sampling request must be the user's")
    return messages


async def _ignore(event: ModelEvent) -> None:
    pass


async def _answered(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def _refusal(message: str) -> types.ErrorData:
    return types.ErrorData(code=types.INVALID_REQUEST, message=message)
