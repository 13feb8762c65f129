"""A results folder's page over HTTP while a sweep runs: on this machine only, and nothing is written."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from harness import page, series
from harness.record import Row, Store
from harness.refusal import Refused
from harness.series import Seen

POLL_S = 2.0  # between a page's questions
REST = 4.0  # times as long as it took to read the folder, it is then left alone
MANY = 8  # new trials from which on a table is read as a whole
HOME, PORT = "127.0.0.1", 8765


class Reader:
    """What the page knows of a folder, as bytes of JSON, read again when the folder has changed; thread-safe."""

    def __init__(self, results: Path | str, baseline: str | None = None) -> None:
        self.results, self.baseline = Path(results), baseline
        self.lock = threading.Lock()
        self.state: tuple[Any, ...] | None = None
        self.content: dict[str, Any] = {}
        self.packed, self.revision = b"", ""
        self.next = 0.0  # when the folder may be looked at again, monotonic seconds
        self.seen: dict[str, list[Seen]] = {}
        self.rows: dict[str, Row] = {}  # by trial: the row that `seen` belongs to
        self.deals: dict[str, dict[str, Any]] = {}

    def latest(self) -> tuple[bytes, str]:
        """The document (gzip) and its revision. Raises Refused for a folder that can't be read the first time."""
        with self.lock:
            started = time.monotonic()
            if started >= self.next and (state := self._state()) != self.state:
                with suppress(*(Refused,) if self.packed else ()):  # a file that was just being replaced: next time
                    self._read()
                    self.state = state
                self.next = time.monotonic() + REST * (time.monotonic() - started)
            return self.packed, self.revision

    def _state(self) -> tuple[Any, ...]:
        """Names and times of the files that end a trial."""
        files = (self.results / "trials").glob("*.parquet")
        return tuple(sorted((file.name, file.stat().st_mtime_ns) for file in files if file.name[0] != "."))

    def _read(self) -> None:
        store = Store(self.results, writable=False)
        trials = store.rows("trials")
        new = [row for row in trials if self.rows.get(row["trial_id"]) != row]
        if len(new) > MANY:
            self.seen = series.seen(store.arrays("rounds", series.COLUMNS))
        for row in new if len(new) <= MANY else ():
            own = series.seen(store.arrays("rounds", series.COLUMNS, row["trial_id"]))
            self.seen |= {row["trial_id"]: []} | own
        self.rows = {row["trial_id"]: row for row in trials}
        name = self.results.resolve().name
        events, deals = store.rows("events"), self._deals(trials)
        known = (name, trials, self.seen, events, deals)
        try:
            self.content = page.document(*known, self.baseline, thorough=False)
        except Refused:  # the baseline has no trial yet; one that was never meant is refused at the start
            if trials and not self.packed:
                raise
            self.content = page.document(*known, thorough=False)
        text = json.dumps({**self.content, "written": ""}, separators=(",", ":"), allow_nan=False).encode()
        self.revision = hashlib.sha256(text).hexdigest()[:16]
        self.content["revision"] = self.revision
        text = json.dumps(self.content, separators=(",", ":"), allow_nan=False).encode()
        self.packed = gzip.compress(text, 1)

    def _deals(self, trials: Sequence[Row]) -> list[dict[str, Any]]:
        from harness.gallery import deals

        found = deals(trials, self.deals)
        self.deals = {deal["hash"]: deal for deal in found}
        return found


def server(results: Path | str, port: int, baseline: str | None = None) -> ThreadingHTTPServer:
    """A server that is bound, and answers once its `serve_forever` is called.

    Raises Refused if the port is taken, and for a folder that is none or a baseline that its trials do not have.
    """
    reader = Reader(results, baseline)
    reader.latest()
    try:
        made = Quiet((HOME, port), type("Bound", (Handler,), {"reader": reader}))
    except (OSError, OverflowError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise Refused(f"port {port} of {HOME} can't be had ({why}): choose another with --port; 0: any") from None
    return made


def serve(results: Path | str, port: int, say: Callable[[str], None], baseline: str | None = None) -> None:
    """Shows a folder until Ctrl-C, which is its proper end. say: is told where. Raises as `server` does."""
    with server(results, port, baseline) as made, suppress(KeyboardInterrupt):
        say(f"{results} at http://{HOME}:{made.server_address[1]}/ until Ctrl-C")
        made.serve_forever(poll_interval=0.2)


class Quiet(ThreadingHTTPServer):
    """A browser that goes away in the middle of an answer is no error."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says what went wrong, unless the other side just left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; GET /data.json?revision=R what it knows, or 204 if that is revision R."""

    reader: ClassVar[Reader]
    server_version, sys_version = "fedstill", ""

    def do_GET(self) -> None:
        """Answers. A name is checked first: one from elsewhere that is made to lead here must not read the folder."""
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOME, "localhost"):
            return self._send(403)
        asked = urlsplit(self.path)
        if asked.path not in ("/", "/data.json"):
            return self._send(404)
        try:
            packed, revision = self.reader.latest()
        except Refused as refusal:
            return self._send(503, f"{refusal}\n".encode(), "text/plain; charset=utf-8")
        if asked.path == "/data.json":
            same = parse_qs(asked.query).get("revision") == [revision]
            return self._send(204) if same else self._send(200, packed, "application/json", "gzip")
        text = page.html(self.reader.content, poll_s=POLL_S).encode()
        return self._send(200, gzip.compress(text, 1), "text/html; charset=utf-8", "gzip")

    def _send(self, status: int, body: bytes = b"", kind: str = "text/plain", encoding: str = "identity") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Encoding", encoding)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet: the terminal shows the address and nothing else."""
