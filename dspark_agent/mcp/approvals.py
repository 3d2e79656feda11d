"""Which definitions of a server's tools were approved: a tool that changes is asked about again.

A server can show a harmless tool at first and rewrite its description, which the model reads as
it reads any instruction, once it is trusted ("rug pull").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dspark_agent.errors import UserError

Definition = Mapping[str, Any]
"""A tool as the server describes it: name, description, schemas, annotations."""


@dataclass(frozen=True, slots=True)
class ToolChange:
    """What an ``approve`` hook is asked about: a tool that is new (``before`` is None), or is
    described in other words or by another schema than the one approved."""

    server: str
    tool_name: str
    before: Definition | None
    after: Definition

    def __str__(self) -> str:
        """The parts that differ, one a line."""
        before = self.before or {}
        lines = [
            f"{key}: {json.dumps(before.get(key))} -> {json.dumps(self.after.get(key))}"
            for key in sorted({*before, *self.after})
            if before.get(key) != self.after.get(key)
        ]
        return "\n".join(lines)


class _Approved(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: str
    definition: dict[str, Any]


class _Book(BaseModel):
    model_config = ConfigDict(extra="forbid")

    servers: dict[str, dict[str, _Approved]] = {}


class ToolApprovals:
    """The approved definitions, by server and tool, with their sha256.

    Args:
        path: a JSON file to keep them in (read now, written with every approval); None keeps
            them as long as this object lives.

    Raises:
        UserError: the file is not one of these, or was edited by hand.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._book = _Book()
        if self._path is not None and self._path.exists():
            self._book = _read(self._path)

    def approved(self, server: str, tool_name: str) -> Definition | None:
        """The definition that was approved, None where none was."""
        entry = self._book.servers.get(server, {}).get(tool_name)
        return None if entry is None else entry.definition

    def approve(self, server: str, tool_name: str, definition: Definition) -> None:
        """Approve a definition, in place of an earlier one."""
        entry = _Approved(sha256=digest(definition), definition=dict(definition))
        self._book.servers.setdefault(server, {})[tool_name] = entry
        self._save()

    def forget(self, server: str, tool_name: str | None = None) -> None:
        """Forget one tool, or the whole server: it counts as new the next time."""
        if tool_name is None:
            self._book.servers.pop(server, None)
        else:
            self._book.servers.get(server, {}).pop(tool_name, None)
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        new.write_text(self._book.model_dump_json(indent=1), encoding="utf-8")
        new.replace(self._path)


def digest(definition: Definition) -> str:
    """sha256 of a definition, whatever the order of its keys."""
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> _Book:
    try:
        book = _Book.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"ToolApprovals({str(path)!r}): not a file of approvals: {error}") from None
    for server, tools in book.servers.items():
        for name, entry in tools.items():
            if digest(entry.definition) != entry.sha256:
                raise UserError(
                    f"ToolApprovals({str(path)!r}): tool {name!r} of {server!r} does not have the "
                    "sha256 it was approved with; forget it, and look at the tool again"
                )
    return book
