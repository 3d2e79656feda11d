"""Makes the trace ``file-editing``: ``python -m dspark_backend.bench.editing_trace``.

An agent reads a file, then writes all of it back with one small change: nearly all that it writes
it has read. The files and the changes are in the folder ``traces/file-editing``, made up for it and
plain enough for a model of half a billion parameters. A run opens with an edit that is done
already, without which such a model writes half of a file.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

from dspark_backend.bench.jsonl import shipped

_SYSTEM: Final = (
    "You edit files. Read a file before you change it. To change it, write the whole file again: "
    "every line as it was, but for what was asked for."
)


def editing_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs as lines of a trace file, see :mod:`dspark_backend.bench.trace`."""
    said = tomllib.loads((folder / "runs.toml").read_text(encoding="utf-8"))
    return [_run(folder, said["example"], run["name"], run["edits"]) for run in said["runs"]]


def _run(
    folder: Path, example: dict[str, str], name: str, edits: list[dict[str, str]]
) -> dict[str, Any]:
    path, content = example["file"], example["written"]
    before: list[dict[str, Any]] = [
        _user(_read_wish(path)),
        _call("read_file", path=path),
        _result("read_file", example["read"]),
        _user(_write_wish(example["wish"], path)),
        _call("write_file", path=path, content=content),
    ]
    steps = []
    for edit in edits:
        path = edit["file"]
        text = _text(folder, path)
        before += [_result("write_file", "Written."), _user(_read_wish(path))]
        steps.append(_step(before, "read_file", 64))
        given = [_result("read_file", text), _user(_write_wish(edit["wish"], path))]
        # A token is two characters or more, so half of them are as many again as it takes.
        steps.append(_step(given, "write_file", 64 + len(json.dumps(text)) // 2))
        before = []
    return {"name": name, "system": _SYSTEM, "tools": [_READ, _WRITE], "steps": steps}


def _text(folder: Path, name: str) -> str:
    # Programs of the trace are none of this package's: they are not called `.py` there.
    stored = next(path for path in (folder / name, folder / f"{name}.txt") if path.is_file())
    return stored.read_text(encoding="utf-8")


def _read_wish(path: str) -> str:
    return f"Read {path}."


def _write_wish(wish: str, path: str) -> str:
    return f"{wish} Write {path} again."


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _result(tool: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": tool, "content": text}


def _call(tool: str, **arguments: str) -> dict[str, Any]:
    function = {"name": tool, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


def _step(messages: list[dict[str, Any]], tool: str, most: int) -> dict[str, Any]:
    return {
        "messages": messages,
        "tool_choice": {"name": tool},
        "output_schema": None,
        "max_new_tokens": most,
    }


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {
        key: {"type": "string", "description": about} for key, about in parameters.items()
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


_READ: Final = _tool("read_file", "Read a text file.", path="file of the project")
_WRITE: Final = _tool(
    "write_file",
    "Write a whole file; replaces the file if there is one.",
    path="file of the project",
    content="all of its text",
)


def main() -> None:
    """Writes the trace to the standard output."""
    for run in editing_runs(shipped("traces", "file-editing").with_suffix("")):
        sys.stdout.write(json.dumps(run, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
