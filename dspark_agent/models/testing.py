"""Models without a model, for tests: users get them too.

:class:`TestModel` calls each tool once and then answers; :class:`FunctionModel` answers with what
a Python function returns. Both stream, and count words as tokens.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from dspark_agent.errors import ModelError
from dspark_agent.limits import RequestUsage
from dspark_agent.messages import (
    FinishReason,
    ModelRequest,
    ModelResponse,
    ResponsePart,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
)
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    Emit,
    Model,
    ModelSession,
    ModelTurn,
    TextChunk,
    TranscriptSession,
)
from dspark_agent.models.sample import sample

Messages = list[ModelRequest | ModelResponse]
Answer = ModelResponse | str | ToolCallPart | Sequence[ResponsePart]
AnswerFunction = Callable[[Messages, ModelTurn], Answer | Awaitable[Answer]]


class FunctionModel(Model):
    """A model that is a function of the messages so far and of what the turn may emit.

    The function (sync or async) returns a whole response, a text, one call, or a list of parts.
    """

    provider = "test"

    def __init__(self, function: AnswerFunction, *, model_name: str = "function") -> None:
        self.function = function
        self._name = model_name

    @property
    def name(self) -> str:
        return self._name

    async def open(
        self, widest: ModelTurn, *, token_log: Sequence[int] | None = None
    ) -> ModelSession:
        return _FunctionSession(self)


class TestModel(FunctionModel):
    """Calls the tools once each with made-up arguments, then answers.

    Args:
        call_tools: ``"all"``, or the names of the tools to call.
        custom_output_text: what to answer where text is asked for; by default a summary of the
            tools' results as JSON.
        custom_output_args: the typed result's JSON value; by default the smallest that fits.
        seed: varies the made-up values.
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    def __init__(
        self,
        *,
        call_tools: Sequence[str] | Literal["all"] = "all",
        custom_output_text: str | None = None,
        custom_output_args: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(self._answer, model_name="test")
        self.call_tools = call_tools
        self.custom_output_text = custom_output_text
        self.custom_output_args = custom_output_args
        self.seed = seed

    def _answer(self, messages: Messages, turn: ModelTurn) -> Answer:
        calls = self._calls(messages, turn)
        if calls:
            return calls
        if turn.output_schema is not None and self.custom_output_text is None:
            made_up = sample(turn.output_schema, seed=self.seed)
            args = self.custom_output_args
            return json.dumps(made_up if args is None else args)
        if self.custom_output_text is not None:
            return self.custom_output_text
        returned = {
            part.tool_name: part.model_text()
            for message in messages
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        }
        return json.dumps(returned) if returned else "success (no tool calls)"

    def _calls(self, messages: Messages, turn: ModelTurn) -> list[ResponsePart]:
        if turn.tool_choice == "none" or not turn.tools:
            return []
        wanted = [t for t in turn.tools if turn.tool_choice in ("auto", "required", t.name)]
        if turn.tool_choice == "auto" or turn.output_tools:
            done = {c.tool_name for m in messages if isinstance(m, ModelResponse)
                    for c in m.tool_calls}  # fmt: skip
            chosen = turn.tool_names if self.call_tools == "all" else self.call_tools
            wanted = [tool for tool in turn.tools if tool.name in chosen and tool.name not in done
                      and tool.name not in turn.output_tools]  # fmt: skip
            if not wanted and turn.output_tools:
                return [self._final(turn)]
        if not turn.settings.get("parallel_tool_calls", True):
            wanted = wanted[:1]
        return [
            ToolCallPart(tool_name=t.name, args=sample(t.parameters, seed=self.seed))
            for t in wanted
        ]

    def _final(self, turn: ModelTurn) -> ToolCallPart:
        tool = next(tool for tool in turn.tools if tool.name == turn.output_tools[0])
        args = self.custom_output_args
        made_up = sample(tool.parameters, seed=self.seed)
        return ToolCallPart(tool_name=tool.name, args=made_up if args is None else args)


class _FunctionSession(TranscriptSession):
    def __init__(self, model: FunctionModel) -> None:
        super().__init__()
        self.model = model

    def _empty_copy(self) -> TranscriptSession:
        return _FunctionSession(self.model)

    async def respond(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        began = time.perf_counter()
        answer = self.model.function(list(messages), turn)
        if inspect.isawaitable(answer):
            answer = await answer
        first = time.perf_counter()
        parts = _parts(answer)
        await _stream(parts, emit)
        usage = RequestUsage(
            input_tokens=sum(_words(part) for message in messages for part in message.parts),
            output_tokens=sum(_words(part) for part in parts),
        )
        if isinstance(answer, ModelResponse):
            return answer
        done = time.perf_counter()
        return ModelResponse(
            parts=tuple(parts),
            model_name=self.model.name,
            usage=usage,
            finish_reason=_finish(parts),
            metrics=StepMetrics(
                prefill_s=first - began,
                prefill_new_tokens=usage.input_tokens,
                ttft_s=first - began,
                decode_s=done - first,
                total_s=done - began,
                new_tokens=usage.output_tokens,
            ),
        )


def _parts(answer: Answer) -> Sequence[ResponsePart]:
    match answer:
        case ModelResponse():
            return answer.parts
        case str():
            return [TextPart(content=answer)]
        case ToolCallPart():
            return [answer]
        case list() | tuple():
            return answer
        case _:
            raise ModelError(f"FunctionModel: its function returned {answer!r}: not an answer")


def _finish(parts: Sequence[ResponsePart]) -> FinishReason:
    calls = any(isinstance(part, ToolCallPart) for part in parts)
    return FinishReason.TOOL_CALL if calls else FinishReason.STOP


def _words(part: object) -> int:
    if isinstance(part, ToolCallPart):
        return 1 + len(_split(part.args_json()))
    if isinstance(part, TextPart | SystemPromptPart):
        return len(_split(part.content))
    return len(_split(str(getattr(part, "content", ""))))


def _split(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


async def _stream(parts: Sequence[ResponsePart], emit: Emit) -> None:
    index = 0
    for part in parts:
        if isinstance(part, TextPart):
            for word in _split(part.content):
                await emit(TextChunk(word))
            continue
        await emit(CallStart(index, part.tool_name))
        for word in _split(part.args_json()):
            await emit(CallChunk(index, word))
        await emit(CallEnd(index, part))
        index += 1
