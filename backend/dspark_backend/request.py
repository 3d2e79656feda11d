"""What a caller asks of the engine for one step, and what comes back: values, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from dspark_backend.metrics import EngineMetrics

if TYPE_CHECKING:
    from dspark_backend.grammar.compile import Grammar
    from dspark_backend.speculation.account import CycleAccount


class StepKind(StrEnum):
    """What the model is writing in a step: the scheduler's and the metrics' first key."""

    TEXT = "text"
    TOOL_CALL = "tool_call"
    TYPED_RESULT = "typed_result"
    MIXED = "mixed"


class Urgency(StrEnum):
    """Who waits for a step: a hint for the scheduler, never a change of the output.

    ``critical``: it is on the critical path of other work. ``interactive``: somebody waits for it.
    ``background``: nobody waits for it now.
    """

    CRITICAL = "critical"
    INTERACTIVE = "interactive"
    BACKGROUND = "background"


class ForcedMode(StrEnum):
    """How tokens that a grammar determines are taken (DSPARK.md, section 6).

    ``canonical``: the canonical tokens of a forced span *are* the output; committed without a
    choice, their KV computed in the next pass. ``verify``: they are a draft that the target
    checks. ``off``: every token is sampled under the mask.
    """

    CANONICAL = "canonical"
    VERIFY = "verify"
    OFF = "off"


class AcceptanceRule(StrEnum):
    """How drafts are held against the target at temperatures above 0 (DSPARK.md, section 6); at 0
    both compare with the most likely token.

    ``coupled``: drafts stand where they are what plain decoding with this seed writes, so the text
    is the same with speculation and without. ``rejection``: drafts are sampled and pass a ratio
    test; the text follows the same distribution, more drafts stand, and which text a seed gives
    depends on the drafter and on what was verified when.
    """

    COUPLED = "coupled"
    REJECTION = "rejection"


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-turn token or a stop token
    STOP_STRING = "stop_string"
    GRAMMAR = "grammar"  # the grammar reached its end
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Noise is keyed by ``(seed, position)``, so with ``coupled``
    acceptance one seed gives one text whatever shares the batch and whoever drafts.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 are off. Penalties
    follow the usual definitions: ``repetition_penalty`` (Keskar et al. 2019) over prompt and
    output, ``presence_penalty`` and ``frequency_penalty`` (subtracted) over this step's output.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    acceptance: AcceptanceRule = AcceptanceRule.COUPLED


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One step: the tokens that are new since the session's last step, and how to go on from them.

    ``tokens`` are appended to the session's log. ``stop`` strings end the step and are not part of
    the text; ``stop_token_ids`` come on top of the model's own end-of-turn tokens (unless
    ``ignore_eos``). The end-of-turn token of ``grammar`` ends the step in any case. With
    ``explain`` the outcome holds an account of every cycle.

    ``max_new_tokens`` 0 computes ``tokens`` and writes nothing: see :meth:`Engine.prefill`.
    ``urgency`` and ``deadline_s`` (seconds from submission) are hints of who goes first among
    many; a step past its deadline goes on.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    grammar: Grammar | None = None
    forced: ForcedMode = ForcedMode.CANONICAL
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    kind: StepKind = StepKind.TEXT
    explain: bool = False
    urgency: Urgency = Urgency.INTERACTIVE
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step produced. ``token_ids`` are all committed new tokens, the end token included;
    ``text`` is their decoding without the end token and without a matched stop string. ``cycles``
    is empty unless the request asked to explain them."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    metrics: EngineMetrics
    cycles: tuple[CycleAccount, ...] = ()
