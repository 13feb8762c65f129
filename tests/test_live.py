"""The page over HTTP: only this machine, only reading, and newer data comes by itself."""

from __future__ import annotations

import gzip
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import live
from harness.record import Store
from harness.refusal import Refused
from harness.summary import headline


def commit(path: Path, trial_id: str, accuracy: float = 0.5, **more: Any) -> None:
    """One trial of fedavg of three rounds."""
    rounds = [
        {"trial_id": trial_id, "round": at, "role": "global", "accuracy": accuracy, "up_bytes": 1, "down_bytes": 1}
        for at in range(3)
    ]
    row = {"trial_id": trial_id, "status": "done", "method": "fedavg", "dataset": "digits", "seed": 0, "config": "{}"}
    Store(path).commit(row | {"rules_version": 1} | headline(rounds) | more, rounds, [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    commit(tmp_path / "sweep", "first")
    return tmp_path / "sweep"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits: the folder may be read again at once."""
    monkeypatch.setattr(live, "REST", 0.0)


class Client:
    """Asks one server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, host: str = "") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{self.port}"})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body

    def data(self, revision: str = "") -> dict[str, Any] | None:
        status, body = self.get(f"/data.json?revision={revision}")
        return json.loads(body) if status == 200 else None


@pytest.fixture
def client(folder: Path, patient: None) -> Iterator[Client]:
    with live.server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Client(server.server_address[1])
        server.shutdown()
        thread.join()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_newer_data_comes_and_nothing_is_said_twice(client: Client, folder: Path) -> None:
    first = client.data()
    assert first is not None
    assert first["trials"]["id"] == ["first"]
    assert client.data(first["revision"]) is None, "204: nothing new"
    commit(folder, "second", seed=1)
    second = client.data(first["revision"])
    assert second is not None
    assert second["trials"]["id"] == ["first", "second"]
    commit(folder, "first", status="failed", reason="crashed: tried again")
    third = client.data(second["revision"])
    assert third is not None
    assert third["trials"]["status"] == ["failed", "done"]


def test_nothing_is_written_while_it_is_shown(client: Client, folder: Path) -> None:
    before = snapshot(folder)
    assert client.get("/")[0] == 200
    client.data()
    assert snapshot(folder) == before


def test_only_the_page_and_only_for_this_machine(client: Client) -> None:
    """A page elsewhere whose name is made to lead to 127.0.0.1 sends its own name as the host."""
    status, text = client.get("/")
    assert status == 200
    assert b"connect-src &#39;self&#39;" in text
    assert client.get("/trials/first.parquet")[0] == 404
    assert client.get("/../../etc/passwd")[0] == 404
    assert client.get("/", host="evil.example:80")[0] == 403
    assert client.get("/data.json", host="evil.example")[0] == 403
    assert client.get("/", host="localhost:1")[0] == 200


def test_a_file_that_is_just_being_replaced_leaves_the_page_as_it_was(client: Client, folder: Path) -> None:
    first = client.data()
    assert first is not None
    (folder / "trials" / "broken.parquet").write_bytes(b"PAR1")
    assert client.data(first["revision"]) is None
    (folder / "trials" / "broken.parquet").unlink()
    commit(folder, "second", seed=1)
    assert client.data(first["revision"]) is not None


def test_a_sweep_that_has_only_begun_has_a_page(tmp_path: Path, patient: None) -> None:
    Store(tmp_path / "sweep")
    reader = live.Reader(tmp_path / "sweep")
    assert json.loads(gzip.decompress(reader.latest()[0]))["trials"]["id"] == []
    commit(tmp_path / "sweep", "first")
    assert json.loads(gzip.decompress(reader.latest()[0]))["trials"]["id"] == ["first"]


def test_a_folder_is_left_alone_after_it_was_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a large folder takes time that the sweep wants for itself."""
    monkeypatch.setattr(live, "REST", 1e6)
    reader = live.Reader(folder)
    before = reader.latest()
    commit(folder, "second", seed=1)
    assert reader.latest() == before


def test_what_can_not_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no results folder"):
        live.server(tmp_path / "nowhere", 0)
    with pytest.raises(Refused, match="unknown baseline 'kdia'"):
        live.server(folder, 0, baseline="kdia")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Refused, match=r"can't be had .* --port"):
            live.server(folder, taken.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--port", "80"], "--port is where --serve shows the page"),
        (["--serve", "--metric", "accuracy_best"], "leave --metric and --out out"),
        (["--serve", "--out", "here"], "leave --metric and --out out"),
        (["--serve", "--port", "99999"], "port 99999"),
    ],
)
def test_misuse_is_one_line(folder: Path, words: list[str], why: str) -> None:
    command = [sys.executable, "-m", "harness.cli", "board", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_shows_it_and_ends_cleanly(folder: Path) -> None:
    """Ctrl-C is how it ends: code 0, nothing on stderr, and the folder as it was."""
    before = snapshot(folder)
    command = [sys.executable, "-m", "harness.cli", "board", str(folder), "--serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    port = int(said.split("http://127.0.0.1:")[1].split("/")[0])
    assert Client(port).get("/")[0] == 200
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    assert snapshot(folder) == before
