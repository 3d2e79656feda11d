"""Prompts as a coding assistant gets them, for training a drafter that will serve one.

Collections of exercises ("write a function that ...") are one kind of prompt; people also ask for
explanations, reviews, conversions, tests, queries and configuration. This makes such requests out
of the subjects in ``prompt_words/`` (written for this project) and of functions of the standard
library of the Python it runs on:

    python -m dspark_backend.training.assistant_prompts --count 4000 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

_FUNCTION_FRAMES = (
    "Write a Python function that {}.",
    "Write a function that {}.",
    "Write a Python function that {}, with type hints and a docstring.",
    "Write a Python function that {} and raises ValueError for bad input.",
    "Write a Python function that {}, then test its edge cases.",
    "Write a Python function that {}, and name its running time.",
    "How do I write a function that {}? Keep it short.",
    "I need a helper that {}. Use only the standard library.",
    "Write a type-annotated function that {} and show how to call it.",
    "Write a JavaScript function that {}.",
    "Write a TypeScript function that {}.",
    "Write a Go function that {}.",
    "Write a pytest test for a function that {}.",
    "Write two versions of a function that {}: a simple one and a fast one.",
)
_CLASS_FRAMES = (
    "Write a Python class for {}.",
    "Write a dataclass for {}, with type hints.",
    "Write a class that models {}, with docstrings and a short example.",
    "Implement {} as a Python class and test it with pytest.",
    "Design {} in Python: which classes and methods would you write? Show the code.",
    "Write {} in JavaScript as a class.",
)
_CONCEPT_FRAMES = (
    "Explain {} in three sentences, then show an example.",
    "What is {}? Give a short example.",
    "When should I use {}, and when not?",
    "Explain {} to a beginner.",
    "What are common mistakes with {}? Show better code.",
    "Explain {} with an example that surprises people.",
    "Write two sentences on {} and a code example for each.",
)
_ARTIFACT_FRAMES = ("{}", "{} Explain each part.", "{} Keep it as short as possible.")
_SNIPPET_FRAMES = (
    "Explain what this function does:\n\n{}",
    "Review this code:\n\n{}",
    "Write a docstring for this function:\n\n{}",
    "Add type hints to this function:\n\n{}",
    "Write pytest tests for this function:\n\n{}",
    "Rename the variables of this function so that they say what they hold:\n\n{}",
    "Simplify this function without changing what it does:\n\n{}",
    "What could go wrong when this function is called? Show a safer version.\n\n{}",
    "Rewrite this function with early returns:\n\n{}",
    "What does this return, and for which inputs does it fail?\n\n{}",
    "Convert this Python function to JavaScript:\n\n{}",
    "Add logging to this function:\n\n{}",
    "Split this function into two smaller ones:\n\n{}",
    "Is there a bug in this code? If so, repair it.\n\n{}",
)
# Tests, other people's packages, and tables that repeat one function a file.
_LEFT_OUT = {"test", "tests", "site-packages", "lib2to3", "idlelib", "encodings"}
_SHORTEST, _LONGEST = 4, 22  # lines of a function


def assistant_prompts(seed: int = 0) -> list[str]:
    """All requests, shuffled: a seed gives the same ones on the same release of Python."""
    rng = random.Random(seed)
    requests = [
        frame.format(subject)
        for name, frames in (
            ("functions", _FUNCTION_FRAMES),
            ("classes", _CLASS_FRAMES),
            ("concepts", _CONCEPT_FRAMES),
            ("artifacts", _ARTIFACT_FRAMES),
        )
        for subject in _words(name)
        for frame in frames
    ]
    requests += [
        rng.choice(_SNIPPET_FRAMES).format(f"```python\n{code}\n```")
        for code in standard_functions()
    ]
    rng.shuffle(requests)
    return requests


def standard_functions() -> Iterator[str]:
    """Source of the standard library's short functions, in the order of their files."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if _LEFT_OUT & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files of the library are wrong on purpose
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                if _SHORTEST <= len(lines) <= _LONGEST:
                    yield "\n".join(lines)


def _words(name: str) -> list[str]:
    text = files("dspark_backend.training").joinpath("prompt_words", f"{name}.txt")
    return text.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests as a coding assistant gets them.")
    parser.add_argument("--count", type=int, default=4000, help="prompts to write")
    parser.add_argument("--seed", type=int, default=0, help="which of them, in which order")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to write")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for text in assistant_prompts(args.seed)[: args.count]:
            messages = [{"role": "user", "content": text}]
            out.write(json.dumps({"source": "assistant", "messages": messages}) + "\n")


if __name__ == "__main__":
    main()
