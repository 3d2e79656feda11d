"""How a step's tokens are chosen: the settings every model understands, or says it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from dspark_agent.urgency import Urgency


class ModelSettings(TypedDict, total=False):
    """Settings of one model turn; what is left out takes the model's default.

    Merged from the general to the particular: model, agent, session or run, step.

    ``max_tokens``: new tokens at most. ``temperature`` 0 is greedy. ``top_k``, ``min_p``,
    ``repetition_penalty`` and ``forced`` (how tokens that a grammar determines are taken) exist
    in the embedded model only; a remote model refuses them. ``logit_bias`` maps token ids to
    what is added to their logits. ``stop_sequences`` end the turn and are not part of the text.
    ``parallel_tool_calls``: whether one turn may hold several calls. ``retry_temperature``: the
    temperature of a turn that follows a refused one, where greedy decoding of a small model would
    only repeat itself; its seed is moved on by the step's number. ``urgency``: who waits for the
    turn, a hint for a model that many agents share; an agent that another one's tool runs is at
    least as urgent as that one.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    stop_sequences: Sequence[str]
    parallel_tool_calls: bool
    retry_temperature: float
    forced: Literal["canonical", "verify", "off"]
    urgency: Urgency


def merge_settings(*layers: ModelSettings | None) -> ModelSettings:
    """Later layers win; None layers count for nothing."""
    merged = ModelSettings()
    for layer in layers:
        if layer is not None:
            merged.update(layer)
    return merged
