"""Work that computes in parallel, kept from leaving a team of threads behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def apart(build: Callable[[], T]) -> T:
    """Run ``build`` in a thread that then ends.

    An OpenMP runtime keeps a team of threads for every thread that ever computed in parallel, and
    lets all teams sleep between products as soon as their threads outnumber the cores: waking them
    doubles the time of a pass. So only the engine's own thread may have a team.
    """
    built: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            built.append(build())
        except BaseException as error:
            failure.append(error)

    # A daemon: Ctrl-C in a long download must end the process, not wait for the download.
    thread = threading.Thread(target=run, name="dspark-load", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return built[0]
