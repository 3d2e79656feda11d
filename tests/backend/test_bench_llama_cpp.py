"""The llama.cpp peer on the real small model: the same tokens, its own cache, the same schema."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dspark_backend.bench.contender import ContenderSpec, Turn
from dspark_backend.bench.lineup import Subject
from dspark_backend.bench.verdict import judge
from dspark_backend.catalog import ModelFiles
from dspark_backend.grammar.spec import TurnSpec

pytest.importorskip("llama_cpp", reason="the llama-cpp peer is optional")

from dspark_backend.bench.peers.llama_cpp import LlamaCppPeer

pytestmark = pytest.mark.real_model

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "bright": {"type": "boolean"}},
    "required": ["colour", "bright"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def subject(smollm2_files: ModelFiles) -> Subject:
    return Subject.of(smollm2_files.name)


@pytest.fixture(scope="module")
def peer(subject: Subject) -> Iterator[LlamaCppPeer]:
    spec = ContenderSpec(
        model=subject.model,
        folder=subject.files.folder,
        gguf=subject.files.gguf,
        dialect=subject.dialect.name,
        end_token_ids=tuple(subject.tokenizer.eos_token_ids),
        precision=None,
        threads=1,
        max_context=512,
    )
    peer = LlamaCppPeer(spec)
    yield peer
    peer.close()


def asked(subject: Subject, text: str) -> tuple[int, ...]:
    return tuple(subject.dialect.render_start([{"role": "user", "content": text}]))


def test_a_constrained_turn_satisfies_the_schema(peer: LlamaCppPeer, subject: Subject) -> None:
    spec = TurnSpec(output_schema=SCHEMA, allow_text=False)
    peer.start()
    sample = peer.turn(Turn(asked(subject, "Describe the lamp."), 48, spec))
    verdict = judge(sample.text, spec, subject.dialect.name)
    assert verdict.problem is None
    assert sample.token_ids[-1] in subject.tokenizer.eos_token_ids


def test_a_later_turn_reads_only_what_is_new(peer: LlamaCppPeer, subject: Subject) -> None:
    peer.start()
    first = peer.turn(Turn(asked(subject, "What is the capital of Norway?"), 16))
    history = len(asked(subject, "What is the capital of Norway?")) + len(first.token_ids)
    closed = first.token_ids[-1] in subject.tokenizer.eos_token_ids
    again = [{"role": "user", "content": "And of Sweden?"}]
    new = tuple(subject.dialect.render_next(again, closed=closed))
    second = peer.turn(Turn(new, 16)).metrics
    # the last token written was never fed back, so it is computed with what is new
    assert second.prefill_cached_tokens >= history - 1
    assert second.prefill_new_tokens <= len(new) + 1


def test_the_same_prompt_gives_the_same_tokens(peer: LlamaCppPeer, subject: Subject) -> None:
    turn = Turn(asked(subject, "Name three rivers."), 12)
    peer.start()
    first = peer.turn(turn)
    peer.start()
    assert peer.turn(turn).token_ids == first.token_ids
