"""Calls a model repeats without getting anywhere: small models loop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_agent.messages import ToolCallPart


@dataclass(slots=True)
class RepeatGuard:
    """Counts identical calls (same tool, same arguments) since the last new one.

    A call not made before is progress and starts the count again, so that running the tests after
    every edit is no repetition, while A, B, A, B, ... is.
    """

    seen: Counter[str] = field(default_factory=Counter)
    tools: dict[str, str] = field(default_factory=dict)

    def copy(self) -> RepeatGuard:
        return RepeatGuard(self.seen.copy(), dict(self.tools))

    def record(self, calls: Sequence[ToolCallPart]) -> list[str | None]:
        """Count one step's calls; for each, what to tell the model about its repetition."""
        keys = [_key(call) for call in calls]
        if any(key not in self.seen for key in keys):
            self.seen = Counter(dict.fromkeys(self.seen, 0))
        notes: list[str | None] = []
        for call, key in zip(calls, keys, strict=True):
            self.seen[key] += 1
            self.tools[key] = call.tool_name
            notes.append(_note(call.tool_name, self.seen[key]) if self.seen[key] > 1 else None)
        return notes

    def barred(self, limit: int | None) -> frozenset[str]:
        """Tools with a call that was repeated more than ``limit`` times since the last new one."""
        if limit is None:
            return frozenset()
        return frozenset(self.tools[key] for key, n in self.seen.items() if n - 1 > limit)


def _key(call: ToolCallPart) -> str:
    args = call.args if isinstance(call.args, str) else json.dumps(call.args, sort_keys=True)
    return f"{call.tool_name}({args})"


def _note(name: str, count: int) -> str:
    return (
        f"Note: this is call number {count} of {name} with the same arguments. "
        "Do something else: use this result, change the arguments, or call another tool."
    )
