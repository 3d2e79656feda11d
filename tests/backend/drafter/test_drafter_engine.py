"""An engine with a drafter from disk writes what it writes without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_backend.drafter.checkpoint import Storage, write_drafter
from dspark_backend.engine import Engine
from dspark_backend.errors import ModelFormatError, RequestError
from dspark_backend.request import SamplingParams, StepRequest
from dspark_backend.speculation.policies import Fixed, Threshold
from dspark_backend.speculation.signals import Signals

MakeDrafter = Callable[..., Any]
PROMPTS = [tuple(range(5 + i, 40 + 5 * i)) for i in range(4)]


def written(random: Any, folder: Path) -> Path:
    write_drafter(folder, random.config, random.state, random.d2t, storage=Storage.INT8)
    return folder


def texts(
    engine: Engine, sampling: SamplingParams, *, drafts: bool | None
) -> list[tuple[int, ...]]:
    """``drafts``: whether drafts are verified, None where the policy may find that none pays."""
    sessions = [engine.open_session() for _ in PROMPTS]
    handles = [
        engine.submit(session, StepRequest(prompt, 30, sampling, ignore_eos=True))
        for session, prompt in zip(sessions, PROMPTS, strict=True)
    ]
    outcomes = [handle.result(60) for handle in handles]
    drafted = sum(outcome.metrics.proposed.get("dspark", 0) for outcome in outcomes)
    assert drafts is None or (drafted > 0) is drafts
    for session in sessions:
        session.close()
    return [outcome.token_ids for outcome in outcomes]


@pytest.mark.parametrize("head", ["none", "vanilla", "rnn"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_on_equals_off(
    head: str, temperature: float, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    random = make_drafter("qwen3", head=head, draft_vocab=200)
    sampling = SamplingParams(temperature=temperature, seed=5)
    with Engine.load(random.target_folder, threads=1, speculation=False) as plain:
        expected = texts(plain, sampling, drafts=False)
    folder = written(random, tmp_path / "drafter")
    for policy in (None, Fixed(2), Threshold(5, 0.2)):
        # A drafter that knows nothing is soon not asked any more, unless one insists.
        signals = None if policy is None else Signals.drafts_alone()
        options = {"drafter": folder, "policy": policy, "signals": signals}
        with Engine.load(random.target_folder, threads=1, **options) as fast:
            drafts = None if policy is None else True
            assert texts(fast, sampling, drafts=drafts) == expected


def test_a_drafter_that_is_not_there_or_not_for_this_model_is_refused(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    random = make_drafter("qwen3")
    with pytest.raises(RequestError, match="no drafter ships"):
        Engine.load(random.target_folder, speculation=True)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        Engine.load(random.target_folder, drafter=tmp_path / "missing")
    other = make_drafter("qwen3", hidden_size=32, intermediate_size=64)
    with pytest.raises(ModelFormatError, match="hidden"):
        Engine.load(random.target_folder, drafter=written(other, tmp_path / "other"))
    with Engine.load(
        random.target_folder, drafter=written(random, tmp_path / "d"), speculation=False
    ) as plain:
        assert not plain.speculative
