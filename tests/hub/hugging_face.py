"""A server that speaks as much of the Hugging Face Hub as a hub of deltas asks for, in memory.

Every commit keeps all files of its repository; uploads go inline ("regular"), as those of small
files do on the Hub. What it is asked for that it does not know is an error 501.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Repository", "serving"]

DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)  # commits, the newest last

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches.setdefault(branch, []).append(name)
        return name

    def find(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None


class Handler(BaseHTTPRequestHandler):
    repositories: dict[str, Repository]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def answer(self, method: str) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self.send(200, {"errors": [], "warnings": []})
        elif parts == ["api", "models"]:
            self.models(query)
        elif parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            found = self.repositories.get(name)
            if found is None:
                self.missing("RepoNotFound")
            else:
                self.api(method, found, name, rest, body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve(method, self.repositories["/".join(parts[:2])], parts[3], parts[4])
        else:
            self.send(501, {"error": self.path})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{name}"
        if name in self.repositories:
            self.send(409, {"error": "You already created this model repo", "url": url})
            return
        self.repositories[name] = Repository()
        self.repositories[name].commit("main", {".gitattributes": b""})
        self.send(200, {"url": url})

    def models(self, query: dict[str, list[str]]) -> None:
        (author,), (tag,) = query["author"], query["filter"]
        found = []
        for name, repository in self.repositories.items():
            card = repository.commits[repository.branches["main"][-1]].get("README.md", b"")
            if name.startswith(f"{author}/") and f"\n- {tag}\n".encode() in card:
                found.append({"id": name, "modelId": name, "tags": [tag]})
        self.send(200, found)

    def api(self, method: str, found: Repository, name: str, rest: list[str], body: bytes) -> None:
        match method, rest:
            case "GET", ["refs"]:
                heads = [
                    {"name": one, "ref": f"refs/heads/{one}", "targetCommit": commits[-1]}
                    for one, commits in found.branches.items()
                ]
                self.send(200, {"branches": heads, "converts": [], "tags": []})
            case "POST", ["branch", branch]:
                if branch in found.branches:
                    self.send(409, {"error": "Reference already exists"})
                else:
                    found.branches[branch] = [found.branches["main"][-1]]
                    self.send(200, {})
            case "DELETE", ["branch", branch]:
                del found.branches[branch]
                self.send(200, {})
            case "POST", ["preupload", _]:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                self.send(200, {"files": files})
            case _, [kind, revision]:
                commit = found.find(revision)
                if commit is None:
                    self.missing("RevisionNotFound")
                else:
                    self.at(kind, found, name, revision, commit, body)
            case _:
                self.send(501, {"error": self.path})

    def at(
        self, kind: str, found: Repository, name: str, revision: str, commit: str, body: bytes
    ) -> None:
        files = found.commits[commit]
        if kind == "revision":
            self.send(200, {"id": name, "sha": commit, "siblings": []})
        elif kind == "tree":
            oid = "0" * 40
            listed = [
                {"type": "file", "path": one, "size": len(held), "oid": oid}
                for one, held in files.items()
            ]
            self.send(200, listed)
        elif kind == "commits":
            said = [
                {"id": one, "title": "", "message": "", "date": DATE, "authors": []}
                for one in reversed(found.branches[revision])
            ]
            self.send(200, said)
        elif kind == "commit":
            made = dict(files)
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    made[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del made[value["path"]]
            new = found.commit(revision, made)
            url = f"http://{self.headers['Host']}/{name}/commit/{new}"
            self.send(200, {"commitUrl": url, "commitOid": new, "hookOutput": ""})
        else:
            self.send(501, {"error": self.path})

    def resolve(self, method: str, found: Repository, revision: str, file: str) -> None:
        commit = found.find(revision)
        if commit is None or file not in found.commits[commit]:
            self.missing("EntryNotFound")
            return
        content = found.commits[commit][file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(content)

    def missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving() -> Iterator[tuple[str, dict[str, Repository]]]:
    """Address and repositories of a server on a free port of this machine."""
    repositories: dict[str, Repository] = {}
    handler = type("Served", (Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
