"""A conversation as a value: what was said, and the tokens it was said in."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from dspark_agent.messages import ModelMessage, ModelRequest, ModelResponse


class History(BaseModel):
    """A session's conversation, to store and to go on from later.

    ``token_log`` are the model's tokens of the first ``logged_messages`` messages; a session of
    the same model and tools resumes from them exactly. Any other renders the messages anew.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    messages: tuple[ModelMessage, ...] = ()
    model_name: str = ""
    tool_names: tuple[str, ...] = ()
    token_log: tuple[int, ...] | None = None
    logged_messages: int = 0

    @classmethod
    def of(cls, history: History | Sequence[ModelRequest | ModelResponse] | None) -> History:
        """A history from messages alone, or as it is."""
        if isinstance(history, History):
            return history
        return cls(messages=tuple(history or ()))

    def resumes(self, model_name: str, tool_names: Sequence[str]) -> bool:
        """Whether the token log can be gone on from with this model and these tools."""
        same = self.model_name == model_name and self.tool_names == tuple(tool_names)
        return same and bool(self.token_log)
