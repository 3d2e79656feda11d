"""The SDK's errors: one tree under :class:`DSparkError`, and the two exceptions tools raise.

Every message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_agent.limits import UsageLimits


class DSparkError(Exception):
    """Root of everything the SDK raises on purpose."""


class UserError(DSparkError):
    """The SDK was used in a way that cannot work: a wrong declaration or a wrong call."""


class SchemaError(UserError):
    """A signature, output type or JSON Schema cannot be offered to a model."""


class SessionClosedError(UserError):
    """The session was closed, or already has a step in flight."""


class ModelError(DSparkError):
    """The model, or the engine or server it runs on, failed."""


class ModelNotFoundError(ModelError):
    """No model goes by that name, or none of its sources could be reached."""


class ContextLengthError(ModelError):
    """The step does not fit in the model's context window; nothing was truncated."""


class ModelHTTPError(ModelError):
    """A remote model answered with an error, or not at all.

    ``status_code`` is None where no response arrived; ``body`` is the response's text, if any.
    """

    def __init__(self, message: str, *, status_code: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.status_code = status_code
        self.body = body


class MCPError(DSparkError):
    """An MCP server refused a request or failed; the root of its errors.

    ``server`` names it; ``code`` is the JSON-RPC code of a refusal, None for anything else.
    """

    def __init__(self, server: str, message: str, *, code: int | None = None) -> None:
        super().__init__(f"MCP server {server!r}: {message}")
        self.server = server
        self.code = code


class MCPConnectionError(MCPError):
    """The server could not be started or reached, died, or did not answer in time."""


class MCPProtocolError(MCPError):
    """The server's answer is not what the protocol, or its own schema, says it is."""


class MCPOutputTooLarge(MCPError):  # noqa: N818 - reads as the event it reports
    """A result was longer than ``max_output_chars``; it was dropped, not cut."""


class MCPToolChangedError(MCPError):
    """A tool is not what was approved: its definition has changed, or it is gone."""


class UnexpectedModelBehavior(DSparkError):  # noqa: N818 - the name pydantic-ai's users know
    """The model did not do what the step asked for, after every retry."""


class OutputError(UnexpectedModelBehavior):
    """The output was rejected more often than ``retries`` allows.

    ``text`` is the last answer as the model wrote it, ``reason`` the last complaint.
    """

    def __init__(self, reason: str, *, text: str, attempts: int) -> None:
        super().__init__(
            f"the output was rejected {attempts} time(s), the last time because: {reason}\n"
            f"last answer: {text!r}"
        )
        self.reason = reason
        self.text = text
        self.attempts = attempts


class ToolRetriesExceeded(UnexpectedModelBehavior):
    """One tool asked for a retry more often in a row than its ``retries`` allow."""

    def __init__(self, tool_name: str, reason: str, *, retries: int) -> None:
        super().__init__(
            f"tool {tool_name!r} asked for a retry more than {retries} time(s) in a row, "
            f"the last time because: {reason}"
        )
        self.tool_name = tool_name
        self.reason = reason
        self.retries = retries


class GuardrailTripped(DSparkError):  # noqa: N818 - reads as the event it reports
    """A guard stopped the run: ``guard`` is its name, ``reason`` what it gave.

    ``place`` is ``input`` (nothing was sent to the model) or ``output`` (the step was undone);
    ``value`` the prompt or output that it stopped.
    """

    def __init__(self, guard: str, reason: str, *, place: str, value: object) -> None:
        super().__init__(f"{place} guard {guard!r} stopped the run: {reason}")
        self.guard = guard
        self.reason = reason
        self.place = place
        self.value = value


class UsageLimitExceeded(DSparkError):  # noqa: N818 - the name pydantic-ai's users know
    """A limit of :class:`~dspark_agent.UsageLimits` was reached; ``limit_name`` says which, and
    ``limits`` is the object it belongs to."""

    def __init__(
        self, limit_name: str, *, limit: int, used: int, limits: UsageLimits | None = None
    ) -> None:
        super().__init__(
            f"{limit_name} of {limit} reached (next would be {used}); raise it in UsageLimits, "
            "or narrow the steps"
        )
        self.limit_name = limit_name
        self.limit = limit
        self.used = used
        self.limits = limits


class DeadlineExceeded(DSparkError):  # noqa: N818 - reads as the event it reports
    """``wall_seconds`` passed before the run or step was done; the work was cancelled."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not done within wall_seconds={seconds:g}; the work was cancelled")
        self.seconds = seconds


class RunCancelled(DSparkError):  # noqa: N818 - reads as the event it reports
    """Somebody called :meth:`RunContext.cancel`; ``reason`` is what they gave."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the run was cancelled: {reason}")
        self.reason = reason


class JournalError(DSparkError):
    """A run's journal cannot be read or written, or does not fit the run that goes on from it."""


class JournalLockedError(JournalError):
    """Somebody else is writing the run; ``path`` is the journal, ``owner`` who has it."""

    def __init__(self, path: str, run_id: str, *, owner: str) -> None:
        super().__init__(
            f"{path}: run {run_id!r} is being written by {owner}; wait for it or end it, then "
            "resume"
        )
        self.path = path
        self.run_id = run_id
        self.owner = owner


class ToolInterruptedError(DSparkError):
    """Tool calls had begun when the run was cut off, and nobody knows whether they took effect.

    ``calls`` are pairs of tool name and ``tool_call_id``.
    """

    def __init__(self, where: str, calls: Sequence[tuple[str, str]]) -> None:
        named = ", ".join(f"{name} ({call_id})" for name, call_id in calls)
        super().__init__(
            f"{where}: begun, but no end recorded: {named}. Find out what the calls did, then "
            "resume with deferred_tool_results=DeferredToolResults(...): calls={ID: RESULT} for a "
            "call that took effect, approvals={ID: ToolApproved(again=True)} to run it (again). "
            "A tool declared idempotent=True is run again without asking."
        )
        self.calls = tuple(calls)


class ModelRetry(Exception):  # noqa: N818 - the name pydantic-ai's users know
    """Raised by a tool or output validator: the model should try again, and this is why.

    Counts against the tool's (or the output's) ``retries``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ToolFailed(Exception):  # noqa: N818 - reads as the event it reports
    """Raised by a tool: its work failed, and the model should know. Not counted as a retry."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ApprovalRequired(Exception):  # noqa: N818 - the name pydantic-ai's users know
    """Raised by a tool before it does anything: this call needs approval.

    The run pauses; once approved, the tool is called again with ``ctx.tool_call_approved`` set.
    ``metadata`` (JSON) goes to whoever decides.
    """

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__("this call needs approval")
        self.metadata = dict(metadata or {})
