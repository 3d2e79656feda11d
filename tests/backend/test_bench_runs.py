"""The benchmarks end to end: our engine and transformers on tiny checkpoints, in processes of
their own, and what the JSON says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from dspark_backend.bench.decode import DecodeReport, DecodeSettings, run_decode
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.explain import explain_table
from dspark_backend.bench.lineup import TOKEN_BY_TOKEN, Terms
from dspark_backend.bench.quality import QualitySettings, run_quality
from dspark_backend.bench.steps import StepsSettings, run_steps
from dspark_backend.bench.steps_report import Spread, StepsReport, StepsRun
from dspark_backend.bench.table import decode_table, quality_table, steps_table
from dspark_backend.catalog import resolve

Checkpoint = Callable[..., Path]

TOOL = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Switch the lamp.",
        "parameters": {
            "type": "object",
            "properties": {"state": {"enum": ["on", "off"]}},
            "required": ["state"],
            "additionalProperties": False,
        },
    },
}
TRACE = {
    "name": "light",
    "system": "You switch lamps.",
    "tools": [TOOL],
    "steps": [
        {
            "messages": [{"role": "user", "content": "It is dark."}],
            "tool_choice": "required",
            "output_schema": None,
            "max_new_tokens": 64,
        },
        {
            "messages": [{"role": "tool", "name": "lamp", "content": "the lamp is on"}],
            "tool_choice": "none",
            "output_schema": {
                "type": "object",
                "properties": {"bright": {"type": "boolean"}},
                "required": ["bright"],
                "additionalProperties": False,
            },
            "max_new_tokens": 64,
        },
        {
            "messages": [{"role": "user", "content": "And now?"}],
            "tool_choice": "none",
            "output_schema": None,
            "max_new_tokens": 8,
        },
    ],
}


def shown(table: object) -> str:
    written = io.StringIO()
    Console(width=100, file=written).print(table)
    return written.getvalue()


@pytest.fixture(scope="module")
def decoded(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> DecodeReport:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text('{"turns": ["Hello"]}\n{"turns": ["def add("]}\n{"turns": ["no"]}\n')
    taken: list[tuple[int, int]] = []
    settings = DecodeSettings(
        model=str(tiny_checkpoint("qwen2")),
        prompts=prompts,
        max_new_tokens=8,
        limit=2,
        terms=Terms(precision="bf16", threads=1, peers=("transformers",)),
    )
    report = run_decode(settings, on_sample=lambda done, total: taken.append((done, total)))
    assert taken == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return report


def test_decode_reports_what_the_contract_names(decoded: DecodeReport) -> None:
    document = json.loads(decoded.model_dump_json())
    assert document["schema_version"] == 1
    assert document["precision"] == "bf16"
    assert document["speculation"] == "off"
    assert document["host"]["cores"] >= 1
    assert len(document["runs"]) == 2
    for run in document["runs"]:
        assert run["new_tokens"] == len(run["token_ids"]) <= 8
        assert run["cycles"] == run["new_tokens"]
        assert run["accepted_length"] == 1.0
        assert run["prompt_tokens"] > 0
        assert run["ttft_s"] > 0.0
    totals = document["totals"]
    assert totals.keys() == {"tok_per_s", "ttft_s", "accepted_length", "peak_rss_bytes"}
    assert totals["peak_rss_bytes"] > 50 << 20
    peer = document["peers"]["transformers"]
    assert peer["ratio_tok_per_s"] == pytest.approx(
        totals["tok_per_s"] / peer["totals"]["tok_per_s"]
    )


def test_all_contenders_answer_the_same_prompts_greedily_alike(decoded: DecodeReport) -> None:
    ours, theirs = decoded.runs, decoded.peers["transformers"].runs
    assert [run.prompt_tokens for run in ours] == [run.prompt_tokens for run in theirs]
    assert [run.token_ids for run in ours] == [run.token_ids for run in theirs]


def test_decode_table_has_a_row_for_each_contender(decoded: DecodeReport) -> None:
    text = shown(decode_table(decoded))
    assert "dspark" in text
    assert "transformers" in text


@pytest.fixture(scope="module")
def replayed(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> StepsReport:
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    trace.write_text(f"{json.dumps(TRACE)}\n{json.dumps(TRACE | {'name': 'again'})}\n")
    model = str(tiny_checkpoint("qwen2", max_position_embeddings=2048))
    return run_steps(StepsSettings(model=model, trace=trace, terms=Terms(threads=1)))


def test_steps_report_what_the_contract_names(replayed: StepsReport) -> None:
    document = json.loads(replayed.model_dump_json())
    assert [run["name"] for run in document["runs"]] == ["light", "again"]
    steps = [step for run in document["runs"] for step in run["steps"]]
    assert [step["kind"] for step in steps[:3]] == ["tool_call", "typed_result", "text"]
    for step in steps:
        assert step["metrics"]["new_tokens"] == len(step["token_ids"])
        assert step["metrics"]["total_s"] <= step["step_s"] * 1.02 + 1e-3
        assert step["metrics"]["tool_s"] == 0.0
    spread = document["totals"]["step_s"]
    assert spread["count"] == 6
    assert spread["sum"] == pytest.approx(sum(step["step_s"] for step in steps))
    assert spread["by_kind"].keys() == {"text", "tool_call", "typed_result"}
    assert sum(kind["sum"] for kind in spread["by_kind"].values()) == pytest.approx(spread["sum"])
    assert document["peers"] == {}
    assert document["speculation"] == "off"


def test_constrained_steps_are_valid_even_from_a_model_of_noise(replayed: StepsReport) -> None:
    call, result, _ = replayed.runs[0].steps
    assert call.valid, call.problem
    assert call.output.tool_calls[0]["name"] == "lamp"
    assert call.output.tool_calls[0]["arguments"]["state"] in ("on", "off")
    assert result.valid, result.problem
    assert isinstance(result.output.object["bright"], bool)


def test_later_steps_compute_only_what_is_new(replayed: StepsReport) -> None:
    for run in replayed.runs:
        assert run.steps[0].cached_share is None
        for step in run.steps[1:]:
            assert step.history_tokens > 0
            assert step.metrics.prefill_cached_tokens >= 0.95 * step.history_tokens
    # the second run opens with the first one's system text and tools
    assert replayed.runs[1].steps[0].metrics.prefill_cached_tokens > 0


def test_steps_table_has_a_row_for_each_kind(replayed: StepsReport) -> None:
    text = shown(steps_table(replayed))
    assert all(kind in text for kind in ("tool_call", "typed_result", "text"))


def test_quality_compares_a_precision_with_bf16(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20, encoding="utf-8")
    model = str(tiny_checkpoint("llama", hidden_size=128))
    read: list[tuple[int, int]] = []
    report = run_quality(
        QualitySettings(model=model, precision="int8", text=text, max_tokens=300, threads=1),
        on_tokens=lambda done, total: read.append((done, total)),
    )
    assert read[-1] == (2 * (report.tokens + 1), 2 * (report.tokens + 1))
    assert report.text == "text.txt"
    assert report.perplexity > 1.0
    change = report.perplexity / report.reference_perplexity - 1
    assert report.relative_change == pytest.approx(change)
    assert abs(report.relative_change) < 0.2
    assert "int8" in shown(quality_table(report))


def test_bf16_against_itself_changes_nothing(tiny_checkpoint: Checkpoint) -> None:
    settings = QualitySettings(str(tiny_checkpoint("llama")), precision="bf16", max_tokens=64)
    report = run_quality(settings)
    assert report.relative_change == 0.0
    assert report.text == "sample"


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    with pytest.raises(BenchError, match="speculation on"):
        Terms(drafter=tmp_path)
    with pytest.raises(BenchError, match="max-new-tokens"):
        DecodeSettings(model="m", prompts=prompts, max_new_tokens=0)
    with pytest.raises(BenchError, match="unknown peer 'vllm'"):
        Terms(peers=("vllm",))
    with pytest.raises(BenchError, match="threads"):
        Terms(threads=0)
    with pytest.raises(BenchError, match="tokens"):
        QualitySettings("m", max_tokens=1)


def test_a_prompt_longer_than_the_model_reaches_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"turns": ["word " * 600]}) + "\n")
    settings = DecodeSettings(
        model=str(tiny_checkpoint("llama")), prompts=prompts, max_new_tokens=4
    )
    with pytest.raises(BenchError, match="the model has room for 512"):
        run_decode(settings)


def test_the_llama_cpp_peer_needs_a_gguf_file(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the llama-cpp peer is optional")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"turns": ["Hello"]}\n')
    settings = DecodeSettings(
        model=str(tiny_checkpoint("llama")),
        prompts=prompts,
        max_new_tokens=4,
        terms=Terms(peers=("llama-cpp",)),
    )
    with pytest.raises(BenchError, match=r"llama-cpp: .* needs a GGUF file"):
        run_decode(settings)


def test_explained_steps_account_for_every_cycle(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{json.dumps(TRACE)}\n")
    model = str(tiny_checkpoint("qwen2", max_position_embeddings=2048))
    terms = Terms(threads=1, speculation=True, policy="fixed-2", peers=("plain",))
    report = run_steps(StepsSettings(model=model, trace=trace, explain=True, terms=terms))
    (run,), (plain,) = report.runs, report.peers["plain"].runs
    assert [step.token_ids for step in run.steps] == [step.token_ids for step in plain.steps]
    for step in run.steps:
        assert len(step.cycles) == step.metrics.cycles
    table = explain_table(report, resolve(model).tokenizer())
    assert table.row_count == max(len(step.cycles) for step in run.steps) > 0
    bare = report.model_copy(update={"runs": ()})
    with pytest.raises(ValueError, match="explain"):
        explain_table(bare, resolve(model).tokenizer())


def test_token_by_token_makes_a_pass_for_every_token(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{json.dumps(TRACE)}\n")
    model = str(tiny_checkpoint("qwen2", max_position_embeddings=2048))
    terms = Terms(threads=1, peers=("plain", TOKEN_BY_TOKEN))
    report = run_steps(StepsSettings(model=model, trace=trace, terms=terms))
    passes = {}
    for name in ("plain", TOKEN_BY_TOKEN):
        (run,) = report.peers[name].runs
        assert all(step.valid for step in run.steps if step.kind != "text")
        passes[name] = [(len(step.token_ids), step.metrics.cycles) for step in run.steps]
    assert all(written <= cycles for written, cycles in passes[TOKEN_BY_TOKEN])
    assert any(written > cycles for written, cycles in passes["plain"])

    def decoding_s(runs: Sequence[StepsRun]) -> float:
        return sum(step.step_s - step.metrics.prefill_s for run in runs for step in run.steps)

    peer = report.peers[TOKEN_BY_TOKEN]
    assert peer.decoding == pytest.approx(decoding_s(peer.runs) / decoding_s(report.runs))
    assert peer.decoding_by_kind.keys() == peer.speedup_by_kind.keys()
    assert "decoding" in shown(steps_table(report))


def test_what_is_unknown_of_a_peer_is_not_guessed() -> None:
    ours = Spread(count=1, sum=2.0, median=2.0, p95=2.0, prefill_s=1.0)
    theirs = Spread(count=1, sum=5.0, median=5.0, p95=5.0, prefill_s=2.0)
    assert theirs.over(ours) == 2.5
    assert theirs.decoding_over(ours) == 3.0
    assert theirs.model_copy(update={"prefill_s": None}).decoding_over(ours) is None
