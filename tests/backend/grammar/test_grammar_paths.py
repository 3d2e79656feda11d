"""Looking along several paths of one grammar, on real tokenizers: no path may colour another.

Two tools whose first argument is alike: after its value the one's arguments end, the other's go on.
A parser that went back from the first and on to the second once allowed the end there as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.grammar.dialect import Dialect
from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.speculation.trail import Trail

STRING = {"type": "string"}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }
    return {"name": name, "description": "", "parameters": parameters}


TOOLS = (
    tool("get_balance", account=STRING),
    tool("transfer", account=STRING, to=STRING, amount={"type": "number"}),
    tool("block", card=STRING, reason={"enum": ["lost", "stolen"]}),
)
CALLS = (
    '{"name": "get_balance", "arguments": {"account": "AC-2460"}}',
    '{"name": "transfer", "arguments": {"account": "AC-2460", "to": "Noor", "amount": 91.0}}',
    '{"name": "block", "arguments": {"card": "AC-2460", "reason": "lost"}}',
)


@pytest.fixture(
    params=[
        pytest.param("smollm2", marks=pytest.mark.real_model),
        pytest.param("qwen2.5", marks=pytest.mark.slow),
    ]
)
def real_dialect(
    request: pytest.FixtureRequest, dialect_named: Callable[[str], Dialect]
) -> Dialect:
    return dialect_named(request.param)


@pytest.mark.parametrize("canonical", [True, False])
def test_what_was_looked_at_before_changes_no_mask(real_dialect: Dialect, canonical: bool) -> None:
    grammar = real_dialect.grammar(TurnSpec(TOOLS, tool_choice="required", allow_text=False))
    assert grammar is not None
    texts = [real_dialect.tokenizer.encode(f"<tool_call>\n{call}\n</tool_call>") for call in CALLS]
    fresh = {}
    for tokens in texts:
        for end in range(len(tokens) + 1):
            matcher = grammar.matcher(canonical=canonical)
            matcher.accept(tokens[:end])
            mask = torch.zeros(matcher.words, dtype=torch.int32)
            matcher.fill_mask(mask)
            fresh[tuple(tokens[:end])] = mask
    rng = np.random.default_rng(1)
    for _ in range(12):
        trail = Trail(grammar.matcher(canonical=canonical), canonical=canonical)
        committed = int(rng.integers(0, 4))
        trail.commit(texts[0][:committed])
        for which in rng.permutation(3):
            for end in range(committed, len(texts[which]) + 1):
                path = texts[which][:end]
                assert torch.equal(trail.mask(path[committed:]), fresh[tuple(path)]), path
