"""OpenTelemetry for agents: spans and metrics, named by the GenAI semantic conventions.

Needs the extra: ``pip install 'dspark-agent[otel]'``. Nothing is recorded unless an agent is
given a :class:`Telemetry`, and nothing that was said unless that asks for it.
"""

from __future__ import annotations

try:
    import opentelemetry as _api  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dspark_agent.otel needs OpenTelemetry: pip install 'dspark-agent[otel]'"
    ) from error

from dspark_agent.otel.telemetry import Telemetry

__all__ = ["Telemetry"]
