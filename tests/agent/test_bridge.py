"""Values from a foreign thread reach the task, in order, on both event loops."""

from __future__ import annotations

import threading
import time

import anyio
import pytest

from dspark_agent.models.bridge import ThreadBridge


@pytest.mark.anyio
async def test_every_value_arrives_in_order() -> None:
    bridge: ThreadBridge[int] = ThreadBridge()

    def produce() -> None:
        for value in range(500):
            bridge.put(value)
            if value % 100 == 0:
                time.sleep(0.001)

    thread = threading.Thread(target=produce)
    thread.start()
    received: list[int] = []
    with anyio.fail_after(10):
        while len(received) < 500:
            received.extend(await bridge.get_all())
    await anyio.to_thread.run_sync(thread.join)
    assert received == list(range(500))


@pytest.mark.anyio
async def test_waiting_can_be_cancelled_and_taken_up_again() -> None:
    bridge: ThreadBridge[str] = ThreadBridge()
    with anyio.move_on_after(0.01) as scope:
        await bridge.get_all()
    assert scope.cancelled_caught
    await anyio.to_thread.run_sync(bridge.put, "late")
    with anyio.fail_after(5):
        assert await bridge.get_all() == ["late"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_value_for_a_loop_that_has_ended_hurts_nobody(backend: str) -> None:
    async def make() -> ThreadBridge[str]:
        return ThreadBridge()

    anyio.run(make, backend=backend).put("nobody there")
