"""A drafter made by one call, served: the same tokens, in as many passes as replay foresees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.catalog import ModelFiles
from dspark_backend.drafter.checkpoint import DrafterFiles, open_drafter, write_drafter
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.drafter.model import DraftModel
from dspark_backend.engine import Engine
from dspark_backend.request import SamplingParams, StepKind, StepRequest
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.precision import Precision
from dspark_backend.training.cycles import Cycles, draft_everywhere
from dspark_backend.training.evaluate import replay_all
from dspark_backend.training.evaluation_run import load_model
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.recipe import TrainConfig, train
from dspark_backend.training.rollout import Rollout, RolloutConfig, read_rollouts
from dspark_backend.training.trainer import TrainerConfig

# Replaying knows neither budgets nor copies.
WHOLE_BLOCKS: dict[str, Any] = {"policy": Fixed(64), "signals": Signals.drafts_alone()}


@dataclass
class Trained:
    folder: Path
    held_out: list[Rollout]


@pytest.fixture(scope="module")
def trained(tiny_files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("run")
    prompts = out / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Count to {i}"}]} for i in range(80)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    config = TrainConfig(
        model=str(tiny_files.folder),
        prompts=prompts,
        out=out,
        block_size=3,
        rank=8,
        draft_vocab=400,
        held_out=0.2,
        answer_tokens=1600,
        held_out_tokens=300,
        rollout=RolloutConfig(temperature=0.0, max_answer_tokens=40, sessions=8),
        trainer=TrainerConfig(steps=80, sequences=4, anchors=20, peak_rate=1e-2, bf16=False),
        precision="int8x16",
        threads=1,
    )
    train(config)
    return Trained(out / "drafter", list(read_rollouts(out / "held-out.jsonl"))[:6])


@pytest.fixture(scope="module")
def replayed(trained: Trained, tiny_files: ModelFiles) -> list[Cycles]:
    files = open_drafter(trained.folder, tiny_files.config)
    source = features(files, tiny_files)
    return replay_all(load_model(files, tiny_files, 512), source, trained.held_out, files.d2t)


def features(files: DrafterFiles, target: ModelFiles) -> DecoderFeatures:
    taps = files.config.target_layer_ids
    return DecoderFeatures(target, Precision.INT8X16, taps, files.d2t, 512)


def test_the_engine_accepts_as_many_drafts_as_replaying_foresees(
    trained: Trained, replayed: list[Cycles], tiny_files: ModelFiles
) -> None:
    accepted = 0
    options = {"drafter": trained.folder, **WHOLE_BLOCKS}
    with Engine.load(tiny_files.folder, precision="int8x16", threads=1, **options) as engine:
        for rollout in trained.held_out:
            with engine.open_session() as session:
                outcome = engine.step(session, StepRequest(rollout.prompt, 40))
            assert outcome.token_ids == rollout.answer
            accepted += outcome.metrics.accepted.get("dspark", 0)
    foreseen = sum(int(cycles.accepted.sum()) for cycles in replayed)
    assert foreseen > 10
    # Not to the draft: replay computes in float32, the engine in int8 with bfloat16 features.
    assert accepted == pytest.approx(foreseen, rel=0.15)


def test_the_engine_is_as_sure_as_replaying_is(
    draft_model: Callable[..., DraftModel],
    tiny_files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a confidence head of large random weights a survival hangs on every feature: a context
    that is fed late, in another order or from another tap shows here."""
    model = draft_model("none")
    assert model.confidence_head is not None
    torch.nn.init.normal_(model.confidence_head.proj.weight, std=0.5, generator=seeded())
    write_drafter(tmp_path / "d", model.config, model.state_dict(), None)
    made: dict[int, Proposal] = {}
    propose = DSparkDrafter.propose

    def recorded(self: DSparkDrafter, anchors: Sequence[Anchor]) -> list[Proposal]:
        proposals = propose(self, anchors)
        made.update(zip([a.context.length for a in anchors], proposals, strict=True))
        return proposals

    monkeypatch.setattr(DSparkDrafter, "propose", recorded)
    options = {"drafter": tmp_path / "d", **WHOLE_BLOCKS}
    with Engine.load(tiny_files.folder, precision="int8x16", threads=1, **options) as engine:
        made.clear()  # loading measures what drafting costs
        prompt = tuple(engine.tokenizer.encode("The quick brown fox jumps over the lazy dog."))
        with engine.open_session() as session:
            answer = engine.step(session, StepRequest(prompt, 40, ignore_eos=True)).token_ids
    files = open_drafter(tmp_path / "d", tiny_files.config)
    example = features(files, tiny_files).example(Rollout("k", "s", StepKind.TEXT, prompt, answer))
    _, logits = draft_everywhere(load_model(files, tiny_files, 512), example, None)
    rows = [position - example.first for position in made if position < len(example.tokens) - 1]
    assert len(rows) > 10
    ours = np.array([made[row + example.first].survival[0] for row in rows])
    theirs = 1 / (1 + np.exp(-logits[rows, 0]))
    assert theirs.std() > 0.2
    assert np.abs(ours - theirs).mean() < 0.01


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_with_the_drafter_writes_what_plain_decoding_writes(
    temperature: float, trained: Trained, tiny_files: ModelFiles
) -> None:
    texts = []
    for drafter in (None, trained.folder):
        with Engine.load(
            tiny_files.folder, precision="int8x16", threads=1, drafter=drafter
        ) as engine:
            handles = [
                engine.submit(
                    engine.open_session(),
                    StepRequest(rollout.prompt, 25, SamplingParams(temperature, seed=seed)),
                )
                for seed, rollout in enumerate(trained.held_out)
            ]
            texts.append([handle.result().token_ids for handle in handles])
    assert texts[0] == texts[1]
