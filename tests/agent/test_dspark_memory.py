"""What one conversation of an agent is worth to the next: the real small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dspark_agent import Agent, DSparkModel
from dspark_backend.engine import Engine
from dspark_backend.speculation.policies import Fixed

pytestmark = pytest.mark.real_model

QUESTION = "Explain what a hash table is."


@pytest.fixture
def model() -> Iterator[DSparkModel]:
    # Whole offers: what a pass costs on a busy machine may speak against copies.
    with Engine.load("smollm2-135m", max_context=1024, threads=1, policy=Fixed(8)) as engine:
        yield DSparkModel("smollm2-135m", engine=engine, settings={"max_tokens": 40})


@pytest.mark.anyio
async def test_an_agent_copies_what_it_wrote_in_another_conversation(model: DSparkModel) -> None:
    async def asked(agent: Agent[None, str]) -> tuple[str, int]:
        async with agent.session() as session:
            step = await session.step(QUESTION)
            return step.output, step.metrics.accepted.get("copy", 0)

    agent, other = Agent(model, name="teacher"), Agent(model, name="pupil")
    first, stranger, again = await asked(agent), await asked(other), await asked(agent)
    assert first[0] == stranger[0] == again[0]
    assert again[1] > max(first[1], stranger[1]) + 20
