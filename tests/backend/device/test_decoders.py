"""What holds of every decoder, on the CPU and on a device (under Triton's interpreter where there
is no GPU): a row's bits are its own, and what is asked for is what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from dspark_backend.catalog.files import ModelFiles, open_checkpoint
from dspark_backend.kv.sequence import KV
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device_load import load_device_decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision
from dspark_backend.target.protocol import Pass, Target

TinyCheckpoint = Callable[..., Path]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MOST = 256


def on_cpu(precision: Precision, files: ModelFiles) -> Target:
    return load_decoder(files, precision, MOST)


def on_device(dtype: torch.dtype, files: ModelFiles) -> Target:
    return load_device_decoder(files, dtype, MOST, DEVICE)


Load = Callable[[ModelFiles], Target]
CPU: dict[str, Load] = {f"cpu-{p.value}": partial(on_cpu, p) for p in Precision}
ON_DEVICE: dict[str, Load] = {
    "device-float32": partial(on_device, torch.float32),
    "device-bfloat16": partial(on_device, torch.bfloat16),
}
DECODERS = CPU | ON_DEVICE
CASES = [(name, family) for name in CPU for family in ("llama", "qwen2", "qwen3")]
CASES += [(name, "qwen3") for name in ON_DEVICE]


def sequences(model: Target, count: int, room: int = 130) -> list[KV]:
    storage = model.storage(None, count * 512 * model.kv_shape.bytes_per_token)
    made = [storage.new() for _ in range(count)]
    for kv in made:
        kv.reserve(room)
    return made


def run(model: Target, kv: KV, tokens: Sequence[int], taps: Sequence[int] = ()) -> Pass:
    result = model.forward(Batch([Rows(kv, tokens, len(tokens))]), taps)
    kv.length += len(tokens)
    return result


def token_ids(count: int, seed: int = 0) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 384, (count,), generator=rng).tolist()


@pytest.mark.parametrize(("name", "family"), CASES)
def test_bits_do_not_depend_on_how_rows_are_cut(
    tiny_checkpoint: TinyCheckpoint, name: str, family: str
) -> None:
    model = DECODERS[name](open_checkpoint("tiny", tiny_checkpoint(family)))
    tokens = token_ids(75)  # past the end of a device's page
    cuts = [[40, *[1] * 35], [3, 1, 7, 16, 2, 46]]
    if name in CPU:  # one row after the other is slow under the interpreter
        cuts += [[1] * 75, [16] * 4 + [11]]
    whole_kv, *kvs = sequences(model, 1 + len(cuts))
    whole = run(model, whole_kv, tokens, taps=(0,))
    for kv, cut in zip(kvs, cuts, strict=True):
        at, logits, features = 0, [], []
        for rows in cut:
            part = run(model, kv, tokens[at : at + rows], taps=(0,))
            logits.append(part.logits)
            features.append(part.features)
            at += rows
        assert torch.equal(torch.cat(logits), whole.logits)
        assert torch.equal(torch.cat(features), whole.features)


@pytest.mark.parametrize("name", DECODERS)
def test_bits_do_not_depend_on_the_neighbours(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    model = DECODERS[name](open_checkpoint("tiny", tiny_checkpoint("qwen3")))
    lengths = [5, 1, 17, 2]
    texts = [token_ids(40 + n, seed=n) for n in lengths]
    kvs = sequences(model, 8)
    alone = []
    for text, kv in zip(texts, kvs[:4], strict=True):
        run(model, kv, text[:40])
        alone.append(run(model, kv, text[40:]).logits[-1])
    rows = []
    for text, kv in zip(texts, kvs[4:], strict=True):
        run(model, kv, text[:40])
        rows.append(Rows(kv, text[40:], 1))
    together = model.forward(Batch(rows)).logits
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("name", ["cpu-int8x16", "device-float32"])
def test_only_wanted_rows_get_logits(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    model = DECODERS[name](open_checkpoint("tiny", tiny_checkpoint("llama")))
    tokens = token_ids(12)
    first, second, third = sequences(model, 3)
    full = run(model, first, tokens).logits
    rows = [Rows(second, tokens, 0), Rows(third, tokens, 3)]
    assert torch.equal(model.forward(Batch(rows)).logits, full[-3:])


@pytest.mark.parametrize("name", [*CPU, "device-float32"])
@pytest.mark.parametrize(("wanted", "last"), [(0, False), (1, False), (7, False), (7, True)])
def test_rows_without_logits_are_read_all_the_same(
    tiny_checkpoint: TinyCheckpoint, name: str, wanted: int, last: bool
) -> None:
    model = DECODERS[name](open_checkpoint("tiny", tiny_checkpoint("llama")))
    tokens, others = token_ids(40), token_ids(9, seed=1)
    whole, cut, other, neighbour = sequences(model, 4)
    taps = (0, model.config.num_layers - 1) if last else (0,)
    expected = run(model, whole, tokens, taps)
    followed = run(model, whole, token_ids(5, seed=2)).logits
    run(model, other, others)
    result = model.forward(Batch([Rows(cut, tokens, wanted), Rows(neighbour, others, 0)]), taps)
    cut.length += len(tokens)
    neighbour.length += len(others)
    assert torch.equal(result.logits, expected.logits[len(tokens) - wanted :])
    assert torch.equal(result.features[: len(tokens)], expected.features)
    assert torch.equal(run(model, cut, token_ids(5, seed=2)).logits, followed)
    assert torch.equal(
        run(model, neighbour, others[:1]).logits, run(model, other, others[:1]).logits
    )


@pytest.mark.parametrize("name", ["cpu-int8", "device-float32"])
def test_a_pass_that_does_not_fit_is_refused(tiny_checkpoint: TinyCheckpoint, name: str) -> None:
    model = DECODERS[name](open_checkpoint("tiny", tiny_checkpoint("llama")))
    narrow, wide = sequences(model, 1, 10)[0], sequences(model, 1, 300)[0]
    with pytest.raises(ValueError, match="do not fit"):
        model.forward(Batch([Rows(narrow, token_ids(257), 1)]))
    with pytest.raises(ValueError, match="at most 256"):
        model.forward(Batch([Rows(wide, token_ids(300), 1)]))
