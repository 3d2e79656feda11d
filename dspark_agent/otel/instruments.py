"""The metrics: the GenAI conventions' own, and where a step's time and tokens came from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.metrics import Meter
from opentelemetry.util.types import AttributeValue

from dspark_agent.messages import ModelResponse
from dspark_agent.metrics import PARTS, StepMetrics
from dspark_agent.trace import StepTrace

_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS = tuple(4**power for power in range(14))
_KEPT = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")
"""Attributes of metrics: few values each, so no conversation's id."""


class Instruments:
    """One meter's histograms and counters."""

    def __init__(self, meter: Meter) -> None:
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._first = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            unit="s",
            description="Time to the first token of a turn.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )
        self._part = meter.create_histogram(
            "dspark.step.part.duration",
            unit="s",
            description="A part of a step's wall clock: queue, prefill, decode, tool and so on.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._proposed = meter.create_counter(
            "dspark.tokens.proposed", unit="{token}", description="Tokens proposed, by source."
        )
        self._accepted = meter.create_counter(
            "dspark.tokens.accepted", unit="{token}", description="Proposed tokens that stood."
        )

    @contextmanager
    def duration(self, attributes: Mapping[str, AttributeValue]) -> Iterator[None]:
        """Record how long an operation takes, and the error that ends it."""
        began = time.perf_counter()
        kept = _kept(attributes)
        try:
            yield
        except BaseException as error:
            is_error = isinstance(error, Exception)
            kept["error.type"] = type(error).__name__ if is_error else "cancelled"
            raise
        finally:
            self._duration.record(time.perf_counter() - began, kept)

    def turn(self, attributes: Mapping[str, AttributeValue], answer: ModelResponse) -> None:
        """Record what one model turn used."""
        kept = _kept(attributes) | {"gen_ai.response.model": answer.model_name}
        self._first.record(answer.metrics.ttft_s, kept)
        for kind, tokens in (
            ("input", answer.usage.input_tokens),
            ("output", answer.usage.output_tokens),
        ):
            self._tokens.record(tokens, kept | {"gen_ai.token.type": kind})

    def step(self, step: StepTrace, account: StepMetrics) -> None:
        """Record where a step's time went and who proposed its tokens."""
        whose: dict[str, AttributeValue] = {
            "gen_ai.request.model": step.model,
            "gen_ai.agent.name": step.agent,
            "dspark.step.kind": step.kind.value,
        }
        for part in PARTS:
            if seconds := getattr(account, part):
                self._part.record(seconds, whose | {"dspark.step.part": part.removesuffix("_s")})
        for source, tokens in account.proposed.items():
            by = whose | {"dspark.token.source": source}
            self._proposed.add(tokens, by)
            self._accepted.add(account.accepted.get(source, 0), by)


def _kept(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
    return {name: attributes[name] for name in _KEPT}
