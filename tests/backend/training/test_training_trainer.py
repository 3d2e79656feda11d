"""A drafter learns what its target says, the same way however often the run is interrupted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dspark_backend.drafter.model import DraftModel
from dspark_backend.training.errors import TrainingError
from dspark_backend.training.features import DecoderFeatures, FeatureMemory
from dspark_backend.training.order import rollouts_of_step
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.schedule import learning_rate
from dspark_backend.training.trainer import Trainer, TrainerConfig, TrainProgress
from dspark_backend.training.vocabulary import draft_ids, draft_vocabulary

MakeTrainer = Callable[..., Trainer]
CONFIG = TrainerConfig(steps=6, sequences=2, anchors=8, peak_rate=1e-2, bf16=False, save_every=2)


@pytest.fixture
def make_trainer(
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> MakeTrainer:
    def make(
        config: TrainerConfig = CONFIG, folder: Path | None = None, head: str = "rnn"
    ) -> Trainer:
        d2t = draft_vocabulary(rollouts, 512, 300)
        model = draft_model(head, d2t)
        source = FeatureMemory(decoder_features(d2t), 2**30)
        ids = draft_ids(d2t, 512)
        return Trainer(model, rollouts, source, model.lm_head, ids, config, folder)

    return make


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_falls_and_drafts_agree_more(bf16: bool, make_trainer: MakeTrainer) -> None:
    config = TrainerConfig(steps=40, sequences=4, anchors=10, peak_rate=5e-3, bf16=bf16)
    seen: list[TrainProgress] = []
    make_trainer(config).run(seen.append)
    first, last = seen[0].figures, seen[-1].figures
    assert [p.step for p in seen] == list(range(1, 41))
    assert last.variation < 0.93 * first.variation
    assert sum(last.agreement) > 2 * sum(first.agreement)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    whole = make_trainer()
    whole.run()

    def interrupt(progress: TrainProgress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder=tmp_path / "state").run(interrupt)
    resumed = make_trainer(folder=tmp_path / "state")
    assert resumed.step == 4
    resumed.run()
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert make_trainer(folder=tmp_path / "state").step == 6


def test_a_state_of_other_settings_is_refused_by_name(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(folder=tmp_path / "state").save()
    with pytest.raises(TrainingError, match="anchors 8 -> 9"):
        make_trainer(
            TrainerConfig(steps=6, sequences=2, anchors=9, peak_rate=1e-2, bf16=False),
            tmp_path / "state",
        )


def test_a_damaged_state_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(folder=tmp_path / "state").save()
    (tmp_path / "state" / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(TrainingError, match="damaged"):
        make_trainer(folder=tmp_path / "state")


def test_rollouts_without_two_answer_tokens_cannot_be_trained_on(
    draft_model: Callable[..., DraftModel],
    decoder_features: Callable[..., DecoderFeatures],
    rollouts: list[Rollout],
) -> None:
    model = draft_model()
    short = [Rollout("k", "s", rollouts[0].kind, (1,), (2,))]
    with pytest.raises(TrainingError, match="two answer tokens"):
        Trainer(model, short, decoder_features(), model.lm_head, draft_ids(None, 512), CONFIG)


def test_every_epoch_shows_every_rollout_in_another_order() -> None:
    epochs = [
        [i for step in range(3 * e, 3 * e + 3) for i in rollouts_of_step(step, 12, 4, 7)]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(rollouts_of_step(5, 3, 4, 0)) == 3


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.04) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
    assert rates[52] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 0.001


def test_the_draft_vocabulary_holds_ends_then_answers_then_prompts_then_low_ids(
    rollouts: list[Rollout],
) -> None:
    said = {token for rollout in rollouts for token in rollout.answer}
    d2t = draft_vocabulary(rollouts, 512, len(said) + 1, always=[0])
    assert set(d2t.tolist()) == said | {0}
    prompts = {token for rollout in rollouts for token in rollout.prompt}
    more = draft_vocabulary(rollouts, 512, len(said | prompts | {0}) + 2, always=[0])
    assert set(more.tolist()) == said | prompts | {0, 1, 2}
    assert more.tolist() == sorted(more.tolist())
    ids = draft_ids(d2t, 512)
    assert [int(ids[token]) for token in d2t.tolist()] == list(range(len(d2t)))
    assert int((ids == -1).sum()) == 512 - len(d2t)
    with pytest.raises(TrainingError, match="0"):
        draft_vocabulary(rollouts, 512, 0)
