"""A stand-in of the Hugging Face hub: the parts of its HTTP interface that downloads and uploads of models use.

with hub() as server:
    server.add("org/base", directory)
    subprocess.run(..., env=os.environ | server.environment(cache))
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]


class Hub:
    """Repositories in memory."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.commits: dict[str, Files] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.requests: list[str] = []

    def add(self, repository: str, files: Path | Files, revision: str = "main") -> str:
        """Add a revision of a repository. Returns: its commit."""
        if isinstance(files, Path):
            files = {str(f.relative_to(files)): f.read_bytes() for f in files.rglob("*") if f.is_file()}
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[repository, revision] = commit
        return commit

    def commit(self, repository: str, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get((repository, revision))

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to take this for the hub."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_TOKEN": "hf_test"}


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._read())

    def do_HEAD(self) -> None:
        self._answer(self._read())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(self._write(body))

    def _parts(self) -> list[str]:
        path = unquote(urlparse(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def _read(self) -> tuple[int, bytes, dict[str, str]]:
        hub, parts = self.server.hub, self._parts()
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:]
            commit = hub.commit(repository, rest[1] if len(rest) > 1 else "main")
            if commit is None:
                return _missing("RevisionNotFound" if hub.commit(repository, "main") else "RepoNotFound")
            files = hub.commits[commit]
            if rest[:1] == ["tree"]:
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return _json(rows)
            return _json({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if len(parts) > 4 and parts[2] == "resolve":
            repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            commit = hub.commit(repository, revision)
            if commit is None:
                return _missing("RevisionNotFound" if hub.commit(repository, "main") else "RepoNotFound")
            content = hub.commits[commit].get(name)
            if content is None:
                return _missing("EntryNotFound", {"X-Repo-Commit": commit})
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return _missing("EntryNotFound")

    def _write(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        hub, parts = self.server.hub, self._parts()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if asked.get("organization") == "forbidden":
                return 403, b'{"error": "You have no right to create it"}', {"X-Error-Message": "You have no right"}
            if hub.commit(repository, "main") is None:
                hub.add(repository, {})
            return _json({"url": f"{hub.address}/{repository}"})
        if parts == ["api", "validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        repository, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = json.loads(body)["files"]
            return _json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if action == "commit":
            files = dict(hub.commits[hub.branches[repository, "main"]])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commit = hub.add(repository, files)
            address = f"{hub.address}/{repository}/commit/{commit}"
            return _json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})
        return _json([])

    def _answer(self, answer: tuple[int, bytes, dict[str, str]]) -> None:
        status, content, headers = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _missing(code: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
    return 404, b'{"error": "not found"}', {"X-Error-Code": code, **(headers or {})}
