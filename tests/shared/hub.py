"""A hub on this machine: an HTTP server that speaks what the hub's own client asks for a model's files.

Files are kept in memory, by repository; every upload is a commit. Requests that it does not know are errors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

Files = dict[str, bytes]


class Handler(BaseHTTPRequestHandler):
    """Repositories of models: made, committed to, listed, read."""

    repositories: dict[str, Files]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer token":
            return self.answer({"error": "not logged in"}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path):
            return self.commit(found[1], body) if found[2] == "commit" else self.regular(json.loads(body))
        self.answer({"error": f"unknown: {self.path}"}, 404)

    def regular(self, wanted: Any) -> None:
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted["files"]]
        self.answer({"files": files})

    def commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                assert value["encoding"] == "base64"
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
        url = f"http://{self.headers['Host']}/{name}/commit/{self.revision(name)}"
        self.answer({"success": True, "commitOid": self.revision(name), "commitUrl": url})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(?:revision|tree)/[^/]+)?", path):
            if found[1] not in self.repositories:
                return self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = self.repositories[found[1]]
            if "/tree/" in path:
                tree = [{"type": "file", "path": p, "size": len(d), "oid": oid(d)} for p, d in files.items()]
                return self.answer(tree)
            siblings = [{"rfilename": p} for p in files]
            return self.answer({"id": found[1], "sha": self.revision(found[1]), "siblings": siblings})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.repositories.get(found[1], {}).get(found[2])
            if data is None:
                return self.answer({"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.send(data, headers={"ETag": f'"{oid(data)}"', "X-Repo-Commit": self.revision(found[1])})
        self.answer({"error": f"unknown: {self.path}"}, 404)

    def revision(self, name: str) -> str:
        return oid(repr(sorted((path, oid(data)) for path, data in self.repositories[name].items())).encode())

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def local_hub(cache: Path) -> Iterator[dict[str, Files]]:
    """While open, the hub's client talks to this machine; the repositories by their names."""
    repositories: dict[str, Files] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"repositories": repositories}))
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:  # what the client reads from the environment when it is imported
            patch.setattr(constants, "ENDPOINT", url)
            patch.setattr(hf_api.api, "endpoint", url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            yield repositories
    finally:
        server.shutdown()
        server.server_close()
