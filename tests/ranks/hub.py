"""A hub on this machine: as much of it as `huggingface_hub` asks to download files.

Each rank has its own address, `endpoint(rank)`, so that it can tell them apart. A rank can ask it
to be gone and to come back by `GET /RANK/gone` and `GET /RANK/back`, and by `GET /RANK/asked` for
the files of weights that the rank has asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves the folders below `root` as repositories ``tiny/NAME``."""

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.port = port
        self.asked: list[tuple[str, str]] = []
        """Rank and file of each download of weights that began, as ``NAME/FILE``."""
        self.gone: set[str] = set()
        """Ranks whose requests are not answered."""
        self.breaks: set[tuple[str, str]] = set()
        """Rank and file of downloads that end half-way."""
        self.listed_too: list[str] = []
        """Names in every listing that are of no file."""
        self.gone_after_config: set[str] = set()
        """Ranks that are answered until they have the files of the configuration."""

    def endpoint(self, rank: int | str) -> str:
        return f"http://127.0.0.1:{self.port}/{rank}"


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(root, server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        rank, *parts = self.path.partition("?")[0].strip("/").split("/")
        if parts in (["gone"], ["back"]):
            (hub.gone.add if parts == ["gone"] else hub.gone.discard)(rank)
            self.answer(b"")
        elif parts == ["asked"]:
            self.answer(json.dumps(sorted(f for r, f in hub.asked if r == rank)).encode())
        elif rank in hub.gone:
            self.close_connection = True
        elif parts[:2] == ["api", "models"]:
            self.listing("/".join(parts[2:4]), parts[4] if len(parts) > 4 else "")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.file(rank, "/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.send_error(404)

    def listing(self, repo: str, kind: str) -> None:
        listed_too = self.server.hub.listed_too
        files = sorted(p for p in self.folder(repo).iterdir() if p.is_file())
        if kind == "tree":
            told: Any = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _tag(p)}
                for p in files
            ]
            told += [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in listed_too]
        else:
            siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
            siblings += [{"rfilename": name, "size": 1} for name in listed_too]
            told = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        self.answer(json.dumps(told).encode(), **{"Content-Type": "application/json"})

    def file(self, rank: str, repo: str, name: str) -> None:
        path = self.folder(repo) / name
        if not path.is_file():
            self.send_error(404)
            return
        hub: Hub = self.server.hub
        data = path.read_bytes()
        if self.command == "GET" and name.endswith(".safetensors"):
            if rank in hub.gone_after_config:
                hub.gone.add(rank)
                self.close_connection = True
                return
            if "Range" not in self.headers:
                hub.asked.append((rank, f"{path.parent.name}/{name}"))
        headers = {"ETag": f'"{_tag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            data, status = data[int(first) : end], 206
        stop = len(data) // 2 if (rank, name) in hub.breaks else None
        self.answer(data, status, stop, **headers)

    def answer(
        self, data: bytes, status: int = 200, stop: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])
        self.close_connection |= stop is not None

    def folder(self, repo: str) -> Path:
        return self.server.hub.root / repo.rpartition("/")[2]


def _tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
