"""What an agent re-emits, made of a repository's own history: contexts and the answers to them."""

from __future__ import annotations

import difflib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from dspark_backend.training.errors import TrainingError

_LONGEST = 16_000  # characters of a file: about 4 k tokens
_CALLS = 3  # edits of one answer

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class CopyTask:
    """``answer`` is what is written after ``context`` was read; ``scenario`` says what for."""

    scenario: str
    context: tuple[int, ...]
    answer: tuple[int, ...]


def copy_tasks(repository: Path, encode: Encode, each: int) -> list[CopyTask]:
    """At most ``each`` tasks of every scenario, from the Python files of a git repository.

    ``rewrite``: a commit's version of a file after the one before. ``edit``: the commit's first
    changes as tool calls with old and new text. ``test``: a file's tests after the file. ``new``: a
    file after another, unrelated one.

    Raises TrainingError where git finds no repository or there is nothing to learn from.
    """
    tasks: list[CopyTask] = []
    for scenario, pairs in (
        ("rewrite", ((before, after) for _, before, after in _revisions(repository))),
        ("edit", ((before, _calls(*change)) for *change, before in _changes(repository))),
        ("test", _tests(repository)),
        ("new", _strangers(repository)),
    ):
        for read, written in islice(pairs, each):
            context = f"<|im_start|>tool\n{read}<|im_end|>\n<|im_start|>assistant\n"
            tasks.append(CopyTask(scenario, tuple(encode(context)), tuple(encode(written))))
    if not tasks:
        raise TrainingError(f"{repository} has no history of Python files: nothing is copied there")
    return tasks


def _git(repository: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"") or str(error).encode()
        raise TrainingError(
            f"git {arguments[0]} failed in {repository}: {reason.decode(errors='replace').strip()}"
        ) from error
    return done.stdout.decode("utf-8", "replace")


def _revisions(repository: Path) -> Iterator[tuple[str, str, str]]:
    """Path, text before and text after of every modified file, newest commits first."""
    for commit in _git(repository, "rev-list", "--no-merges", "HEAD").split():
        listing = ("diff-tree", "--no-commit-id", "-r", "--diff-filter=M", "--name-only", commit)
        for path in _git(repository, *listing).splitlines():
            if path.endswith(".py"):
                before = _git(repository, "show", f"{commit}^:{path}")
                after = _git(repository, "show", f"{commit}:{path}")
                if before and after and max(len(before), len(after)) <= _LONGEST:
                    yield path, before, after


def _changes(repository: Path) -> Iterator[tuple[str, str, str, str]]:
    """Path, before, after, and the text that was read: raw, or inside JSON every other time."""
    for number, (path, before, after) in enumerate(_revisions(repository)):
        read = before if number % 2 else json.dumps({"path": path, "content": before})
        yield path, before, after, read


def _calls(path: str, before: str, after: str) -> str:
    """The first changes as tool calls, each with the line above it."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    calls: list[str] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if tag != "equal" and len(calls) < _CALLS:
            arguments = {
                "path": path,
                "old_text": "".join(old[max(0, i1 - 1) : i2]),
                "new_text": "".join(new[max(0, j1 - 1) : j2]),
            }
            call = json.dumps({"name": "edit_file", "arguments": arguments})
            calls.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(calls)


def _files(repository: Path) -> dict[str, str]:
    paths = _git(repository, "ls-files", "*.py").splitlines()
    texts = {path: (repository / path).read_text(encoding="utf-8") for path in paths}
    return {path: text for path, text in texts.items() if 0 < len(text) <= _LONGEST}


def _tests(repository: Path) -> Iterator[tuple[str, str]]:
    """Code and its tests: ``test_a_b.py`` belongs to ``a_b.py``, else to ``b.py`` or ``a.py``."""
    files = _files(repository)
    stem_of = {path: PurePosixPath(path).stem for path in files}
    code = {stem: path for path, stem in stem_of.items() if not stem.startswith("test_")}
    for path, stem in stem_of.items():
        name = stem.removeprefix("test_")
        if name != stem:
            words = name.split("_")
            tested = next((code[key] for key in (name, words[-1], words[0]) if key in code), None)
            if tested is not None:
                yield files[tested], files[path]


def _strangers(repository: Path) -> Iterator[tuple[str, str]]:
    """Every file after the one that is half the repository away."""
    texts = list(_files(repository).values())
    for number, text in enumerate(texts):
        yield texts[(number + len(texts) // 2) % len(texts)], text
