"""The hub route, against a small hub on this machine; and what happens where there is none."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from dspark_backend.catalog import HubSource, KnownModel, Progress, pull, remove, resolve
from dspark_backend.catalog.fetch import fetch
from dspark_backend.errors import DownloadError, ModelNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 500


@dataclass
class FakeHub:
    """Repositories by id, each a mapping of file names to bytes; counts the requests it gets."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int = 200

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request, as the hub's API has them."""
        self.requests.append(path)
        if self.status != 200:
            return self.status, {}, b""
        for name, files in self.repositories.items():
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [{"type": "file", "path": f, "size": len(files[f]), "oid": f} for f in files]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            if path.startswith(f"/api/models/{name}"):
                listing = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
            filename = path.split("/resolve/")[-1].split("/", 1)[-1]
            if path.startswith(f"/{name}/resolve/") and filename in files:
                etag = hashlib.sha256(files[filename]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                return 200, headers, files[filename]
            if path.startswith(f"/{name}/"):
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = fake.answer(self.path)
            first = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            self.send_response(206 if first else status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[first:])

        do_HEAD = do_GET  # noqa: N815, the name that the base class calls

        def log_message(self, *args: object) -> None:
            """The test's output stays clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    _point_client_at(monkeypatch, server.server_port, tmp_path)
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def _point_client_at(monkeypatch: pytest.MonkeyPatch, port: int, folder: Path) -> None:
    """What HF_ENDPOINT and its like would do, had the client not read them at its import."""
    endpoint = f"http://127.0.0.1:{port}"
    constants = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "hub-cache"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("DSPARK_AGENT_HOME", str(folder / "home"))


@pytest.fixture
def model() -> KnownModel:
    return KnownModel(
        name="fixture",
        description="",
        licence="",
        filename="fixture.gguf",
        size_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub=HubSource("owner/model", "file.gguf"),
        packages=(),
    )


def test_a_known_model_comes_from_the_hub(hub: FakeHub, model: KnownModel) -> None:
    hub.repositories["owner/model"] = {"file.gguf": CONTENT}
    reports: list[Progress] = []
    path = fetch(model, reports.append)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["fixture.gguf"]
    assert reports[-1].done_bytes == len(CONTENT)


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_is_named(hub: FakeHub, model: KnownModel, status: int) -> None:
    hub.status = status
    with pytest.raises(DownloadError, match=f"hub: .*{status}"):
        fetch(model)


def test_wrong_bytes_from_the_hub_are_refused(hub: FakeHub, model: KnownModel) -> None:
    hub.repositories["owner/model"] = {"file.gguf": CONTENT[:-1] + b"!"}
    with pytest.raises(DownloadError, match="hub: what it sent has sha256"):
        fetch(model)


def test_a_closed_port_is_no_hub(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _point_client_at(monkeypatch, unused.getsockname()[1], tmp_path)
        with pytest.raises(DownloadError, match="hub: not reachable"):
            fetch(model)


def test_a_hub_that_never_answers_is_given_up_soon(
    model: KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dspark_backend.catalog.hub._PROBE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _point_client_at(monkeypatch, silent.getsockname()[1], tmp_path)
        with pytest.raises(DownloadError, match="no answer"):
            fetch(model)


def test_offline_mode_asks_nobody(
    hub: FakeHub, model: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        fetch(model)
    with pytest.raises(DownloadError, match=r"owner/model from the hub: .*HF_HUB_OFFLINE"):
        resolve("owner/model")
    assert not hub.requests


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_repository_loads_by_its_id_and_then_without_the_hub(
    hub: FakeHub, tiny_checkpoint: Callable[..., Path], shards: int
) -> None:
    files = _files(tiny_checkpoint("qwen3", shards=shards))
    hub.repositories["owner/tiny"] = {**files, "pytorch_model.bin": b"pickle"}
    reports: list[Progress] = []
    loaded = resolve("owner/tiny", progress=reports.append)
    assert loaded.config.family == "qwen3"
    assert len(loaded.tensors().names()) == len(resolve("owner/tiny").tensors().names())
    assert loaded.tokenizer().decode(loaded.tokenizer().encode("hi")) == "hi"
    assert reports
    asked = len(hub.requests)
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    resolve("owner/tiny")
    assert len(hub.requests) == asked


def test_a_repository_cached_in_part_is_completed(
    hub: FakeHub, tiny_checkpoint: Callable[..., Path]
) -> None:
    hub.repositories["owner/tiny"] = _files(tiny_checkpoint("llama"))
    (pull("owner/tiny") / "model.safetensors").unlink()
    assert resolve("owner/tiny").tensors().names()


def test_a_repository_without_safetensors_says_what_to_give(hub: FakeHub) -> None:
    hub.repositories["owner/gguf"] = {"config.json": b"{}", "m.q8.gguf": b"GGUF"}
    with pytest.raises(ModelNotFoundError, match="owner/gguf/<file>"):
        resolve("owner/gguf")


def test_a_gguf_file_of_a_repository(hub: FakeHub, tiny_gguf: Callable[..., Path]) -> None:
    hub.repositories["owner/tiny"] = {"m.q8.gguf": tiny_gguf("llama").read_bytes(), "x": b""}
    loaded = resolve("owner/tiny/m.q8.gguf")
    assert loaded.name == "owner/tiny/m.q8.gguf"
    assert loaded.gguf is not None
    with pytest.raises(ModelNotFoundError, match=r"no file other\.gguf"):
        pull("owner/tiny/other.gguf")
    assert remove("owner/tiny/m.q8.gguf") > loaded.config.vocab_size
    assert not loaded.folder.exists()
    with pytest.raises(ModelNotFoundError):
        remove("owner/tiny/m.q8.gguf")


def test_an_unknown_repository_is_not_found(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="owner/none"):
        resolve("owner/none")
