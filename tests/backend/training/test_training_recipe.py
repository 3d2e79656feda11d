"""One call makes a drafter out of prompts, and goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark_backend.catalog import ModelFiles
from dspark_backend.drafter.checkpoint import open_drafter
from dspark_backend.drafter.shipped import shipped_drafter
from dspark_backend.errors import ModelFormatError
from dspark_backend.request import StepKind, StepRequest
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.evaluate import Evaluation
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.features_torch import TransformersFeatures
from dspark_backend.training.recipe import TrainConfig, Watchers, spread_taps, train
from dspark_backend.training.recording import Recorder, RecordingEngine
from dspark_backend.training.rollout import Rollout, RolloutConfig, read_rollouts
from dspark_backend.training.trainer import TrainerConfig, TrainProgress


@pytest.fixture
def config(tiny_files: ModelFiles, tmp_path: Path) -> TrainConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Count to {i}"}]} for i in range(60)]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    return TrainConfig(
        model=str(tiny_files.folder),
        prompts=prompts,
        out=tmp_path / "run",
        layers=1,
        block_size=3,
        rank=4,
        draft_vocab=200,
        held_out=0.3,
        answer_tokens=150,
        held_out_tokens=80,
        rollout=RolloutConfig(max_answer_tokens=12, sessions=4),
        trainer=TrainerConfig(steps=4, sequences=2, anchors=4, save_every=2),
        precision="int8",
        threads=1,
    )


def test_a_run_makes_a_drafter_that_opens_for_its_target(
    config: TrainConfig, tiny_files: ModelFiles
) -> None:
    stages: list[str] = []
    steps: list[TrainProgress] = []
    evaluation = train(config, Watchers(on_stage=stages.append, on_step=steps.append))
    assert stages == ["roll out", "train", "calibrate"]
    assert len(steps) == 4
    files = open_drafter(config.out / "drafter", tiny_files.config)
    assert files.config.block_size == 3
    assert files.config.target_layer_ids == spread_taps(4)
    assert files.config.mask_token_id not in tiny_files.config.eos_token_ids
    assert files.d2t is not None
    assert len(files.d2t) == 200
    assert files.calibration.samples > 0
    written = Evaluation.model_validate_json((config.out / "evaluation.json").read_text())
    assert written == evaluation
    assert evaluation.overall.rollouts > 0
    keys = [
        {r.key for r in read_rollouts(config.out / f"{n}.jsonl")} for n in ("rollouts", "held-out")
    ]
    assert not keys[0] & keys[1]


def test_an_interrupted_run_ends_with_the_same_weights(
    config: TrainConfig, tiny_files: ModelFiles, tmp_path: Path
) -> None:
    train(config)
    other = replace(config, out=tmp_path / "again")

    def interrupt(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, Watchers(on_step=interrupt))
    train(other)
    a, b = (open_drafter(c.out / "drafter", tiny_files.config).state() for c in (config, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_from_a_drafter(
    config: TrainConfig, tiny_files: ModelFiles, tmp_path: Path
) -> None:
    train(config)
    first = config.out / "drafter"
    # Neither its shape nor its vocabulary is asked for again, and a rate of 0 moves nothing.
    still = replace(config.trainer, steps=1, peak_rate=0.0)
    same = replace(
        config, start=first, out=tmp_path / "same", trainer=still, layers=2, draft_vocab=100
    )
    train(same)
    a, b = (open_drafter(c.out / "drafter", tiny_files.config) for c in (config, same))
    assert b.config == a.config
    assert a.d2t is not None
    assert b.d2t is not None
    assert torch.equal(a.d2t, b.d2t)
    assert all(torch.equal(tensor, b.get(name)) for name, tensor in a.state().items())

    further = replace(config, start=first, out=tmp_path / "further")
    train(further)
    c = open_drafter(further.out / "drafter", tiny_files.config)
    assert not torch.equal(a.get("fc.weight"), c.get("fc.weight"))
    with pytest.raises(TrainingError, match="origin"):
        train(replace(further, start=further.out / "drafter"))


def test_a_start_may_learn_further_tokens(
    config: TrainConfig, tiny_files: ModelFiles, tmp_path: Path
) -> None:
    train(config)
    first = config.out / "drafter"
    still = replace(config.trainer, steps=1, peak_rate=0.0)
    wider = replace(config, start=first, widen=300, out=tmp_path / "wider", trainer=still)
    train(wider)
    a, b = (open_drafter(c.out / "drafter", tiny_files.config) for c in (config, wider))
    assert a.d2t is not None
    assert b.d2t is not None
    assert len(b.d2t) == b.config.draft_vocab_size == 300
    assert set(a.d2t.tolist()) < set(b.d2t.tolist())
    w2 = "markov_head.markov_w2.weight"
    known = torch.isin(b.d2t, a.d2t)
    assert torch.equal(b.get(w2)[known], a.get(w2))
    assert not b.get(w2)[~known].any()
    others = [name for name in a.state() if name != w2]
    assert all(torch.equal(a.get(name), b.get(name)) for name in others)
    with pytest.raises(TrainingError, match="not cut down to 100"):
        train(replace(wider, widen=100, out=tmp_path / "cut"))


def test_a_start_of_another_target_is_refused_before_anything_is_written(
    config: TrainConfig,
) -> None:
    foreign = shipped_drafter("smollm2-135m")
    assert foreign is not None
    with pytest.raises(ModelFormatError, match="smollm2-135m"):
        train(replace(config, start=foreign))
    assert not config.out.exists()


def test_a_run_needs_prompts_that_it_may_hold_out(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="held_out"):
        train(replace(config, held_out=0.0))


def test_taps_spread_over_the_depth_below_the_last_two_layers() -> None:
    assert spread_taps(30) == (2, 14, 27)
    assert spread_taps(24) == (2, 11, 21)
    assert spread_taps(2) == (0,)


def test_features_by_transformers_are_those_of_the_engine(
    tiny_files: ModelFiles, decoder_features: Callable[..., DecoderFeatures]
) -> None:
    tokens = tuple(
        torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    )
    rollout = Rollout("k", "s", StepKind.TEXT, tokens[:10], tokens[10:])
    d2t = torch.arange(0, 512, 2)
    ours = decoder_features(d2t).example(rollout)
    theirs = TransformersFeatures(tiny_files, (0, 1, 2), d2t, torch.device("cpu")).example(rollout)
    assert theirs.first == ours.first
    for name in ("features", "hidden"):
        a, b = getattr(ours, name).float(), getattr(theirs, name).float()
        assert (a - b).norm() < 0.05 * a.norm(), name
    torch.testing.assert_close(theirs.outside, ours.outside, atol=0.06, rtol=0.1)
    assert (theirs.greedy == ours.greedy).float().mean() > 0.8


def test_recorded_steps_are_trained_on_and_held_out_like_prompts(
    config: TrainConfig, tmp_path: Path
) -> None:
    recorded = tmp_path / "steps.jsonl"
    with RecordingEngine.load(config.model, precision="int8", threads=1) as engine:
        assert isinstance(engine, RecordingEngine)
        engine.recorder = Recorder(recorded, "agent")
        for first in range(20):
            with engine.open_session() as session:
                request = StepRequest((first, 7), max_new_tokens=6, ignore_eos=True)
                engine.step(session, request)
                engine.step(session, replace(request, tokens=(9,)))
                engine.step(session, replace(request, tokens=(9,), max_new_tokens=1))
        engine.recorder.close()
    steps = list(read_rollouts(recorded))
    assert [len(step.answer) for step in steps] == [6] * 40  # one token teaches nothing
    assert steps[1].prompt == (*steps[0].tokens, 9)
    longer = replace(config, recorded=(recorded,), held_out_tokens=40)
    evaluation = train(longer)
    assert 0 < evaluation.by_source["agent"].rollouts < 40
