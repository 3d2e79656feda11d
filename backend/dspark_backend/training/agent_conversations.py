"""Conversations of agents, made for training: extraction, service through tools, repairing code.

They are like what agents do and unlike any that a benchmark replays: other schemas, other tools,
other texts (``prompt_words/agents.json``). Play them with a model:

    python -m dspark_backend.training.agent_conversations --model M --count 400 --out agents.jsonl

and give the file to ``dspark-agent train --recorded agents.jsonl``.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dspark_backend.engine import Engine
from dspark_backend.training.assistant_prompts import standard_functions
from dspark_backend.training.conversation import Conversation, Turn, play

_PLACE = re.compile(r"\{(?:(\d+)-(\d+)|([\w ]+))\}")
_LONGEST_REPAIR = 14  # lines of a function: a conversation shows it, quotes it and edits it


def agent_conversations(count: int, seed: int = 0) -> list[Conversation]:
    """``count`` conversations, no two alike: half extraction, a third services, the rest repairs;
    the same for a seed on the same release of Python."""
    rng = random.Random(seed)
    functions = [f for f in standard_functions() if f.count("\n") < _LONGEST_REPAIR]
    made: dict[str, Conversation] = {}
    while len(made) < count:
        draw = rng.random()
        if draw < 1 / 2:
            each: Conversation | None = _extraction(rng)
        elif draw < 5 / 6:
            each = _service(rng)
        else:
            each = _repair(rng, rng.choice(functions))
        if each is not None:
            made[each.key] = each
    return list(made.values())


@cache
def _words() -> dict[str, Any]:
    text = files("dspark_backend.training").joinpath("prompt_words", "agents.json")
    words: dict[str, Any] = json.loads(text.read_text(encoding="utf-8"))
    return words


def _filled(rng: random.Random, text: str, same: Mapping[str, str] | None = None) -> str:
    """``text`` with a fact for each ``{word}``, one of ``same`` or a new one at every place, and a
    number for each ``{low-high}``."""

    def fact(place: re.Match[str]) -> str:
        low, high, word = place.groups()
        if word is None:
            return str(rng.randint(int(low), int(high)))
        known = (same or {}).get(word)
        return known if known is not None else _filled(rng, rng.choice(_words()["facts"][word]))

    return _PLACE.sub(fact, text)


def _extraction(rng: random.Random) -> Conversation:
    words = _words()
    kind = rng.choice(words["extractions"])
    schema = rng.choice(kind["schemas"])
    turns = []
    for _ in range(rng.randint(2, 4)):
        text = _filled(rng, rng.choice(kind["texts"]))
        request = rng.choice(words["requests"]).replace("{text}", text)
        turns.append(Turn((_user(request),), schema=schema))
    return Conversation(f"agent-{kind['name']}", rng.choice(words["readers"]), (), tuple(turns))


def _service(rng: random.Random) -> Conversation:
    service = rng.choice(_words()["services"])
    same = {name: _filled(rng, f"{{{word}}}") for name, word in service["same"].items()}
    free = rng.random() < 0.5  # the model picks the tool itself
    turns: list[Turn] = []
    given: tuple[dict[str, Any], ...] = ()
    for each in service["turns"]:
        messages = (*given, _user(_filled(rng, each["request"], same)))
        if each["tool"] is None:
            turns.append(Turn(messages, max_new_tokens=80))
        else:
            turns.append(Turn(messages, "required" if free else {"name": each["tool"]}))
            given = (_result(each["tool"], _filled(rng, each["result"], same)),)
    return Conversation("agent-service", service["system"], tuple(service["tools"]), tuple(turns))


def _repair(rng: random.Random, code: str) -> Conversation | None:
    """A function with a mistake put in, looked at, mended and tested; None where it has no place
    for one."""
    words = _words()["repair"]
    places = [(right, wrong) for right, wrong in words["swaps"] if right in code]
    (node,) = ast.parse(code).body
    if not places or not isinstance(node, ast.FunctionDef):
        return None
    right, wrong = rng.choice(places)
    broken = code.replace(right, wrong, 1)
    stem = node.name.strip("_")
    path, test = f"{rng.choice(('src', 'lib', 'app'))}/{stem}.py", f"tests/test_{stem}.py"
    shown = "\n".join(f"{i:<3}{line}" for i, line in enumerate(broken.splitlines(), start=1))
    hint = f"Somebody wrote '{wrong.strip()}' where '{right.strip()}' belongs. What is wrong?"
    passed = _result("run_tests", f"{rng.randint(2, 9)} passed")
    turns = (
        Turn((_user(f"A test of {stem} fails. Which files are there?"),), {"name": "list_files"}),
        Turn(
            (_result("list_files", f"{path}\n{test}"), _user("Read the code.")),
            {"name": "read_file"},
        ),
        Turn((_result("read_file", shown), _user(hint)), schema=words["finding"]),
        Turn((_user("Edit it."),), {"name": "edit_file"}, max_new_tokens=160),
        Turn(
            (_result("edit_file", f"{path}: 1 replacement"), _user("Now the tests.")),
            {"name": "run_tests"},
        ),
        Turn((passed, _user("Report.")), schema=words["report"]),
    )
    return Conversation("agent-repair", words["system"], tuple(words["tools"]), turns)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _result(tool: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": tool, "content": text}


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversations of agents, played by a model.")
    parser.add_argument("--model", required=True, help="known name, path or hub id")
    parser.add_argument("--count", type=int, default=400, help="conversations to play")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--sessions", type=int, default=16, help="played at once")
    parser.add_argument("--threads", type=int, help="of the engine; all cores when left out")
    parser.add_argument("--out", type=Path, required=True, help="rollouts, appended to")
    args = parser.parse_args()
    with Engine.load(args.model, threads=args.threads, max_context=4096) as engine:
        made = agent_conversations(args.count, args.seed)
        written = play(engine, made, args.out, args.sessions)
    print(f"{written} conversations played: {args.out}")


if __name__ == "__main__":
    main()
