"""A model hub in memory, behind the part of the Hugging Face hub's HTTP interface that an upload uses.

Files come as the client sends them without xet: weights by git-lfs' batch interface, the others inside the commit.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class FakeHub:
    """What it holds, and how it is to fail.

    Attributes:
        repositories: by owner/name.
        objects: git-lfs' files, by SHA-256.
        received: uploads of such files, in their order.
        owners: who may be written to with the token.
        dies_after: uploads after which every request ends in a closed connection; None: never.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    owners: tuple[str, ...] = ("me",)
    dies_after: int | None = None


def oid_of(content: bytes) -> str:
    """git's name of a file that it holds itself."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Answer(Exception):
    """An error that the hub answers with."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            body = self.body()
            if hub.dies_after is not None and len(hub.received) >= hub.dies_after:
                self.close_connection = True
                self.connection.close()
                return
            status, headers = 200, {}
            try:
                answer = self.answer(self.path.split("?")[0], body)
            except Answer as error:
                status, answer = error.status, {"error": error.message}
                headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = handle_any

        def answer(self, path: str, body: bytes) -> Any:
            if match := re.fullmatch(r"/objects/(\w+)", path):  # where the batch interface sends uploads
                assert hashlib.sha256(body).hexdigest() == match[1]
                hub.objects[match[1]] = body
                hub.received.append(match[1])
                return {}
            if path == "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/main/(.+)", path):  # open to all
                files = hub.repositories[match[1]].branches["main"] if match[1] in hub.repositories else {}
                if match[2] not in files:
                    raise Answer(404, "Not found")
                return files[match[2]]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Answer(401, "Invalid username or password.")
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?/?"
                                 r"((?:info|revision|tree|preupload|commit|branch)(?:/.*)?)?", path)
            assert match is not None, path
            name, (action, _, rest) = match[1], (match[2] or "").partition("/")
            if name not in hub.repositories:
                raise Answer(404, "Repository not found", "RepoNotFound")
            repository = hub.repositories[name]
            if self.command != "GET" and name.split("/")[0] not in hub.owners:
                raise Answer(403, "you are not in this organization")
            given = json.loads(body) if body and action != "commit" else {}
            if action == "branch":
                if rest in repository.branches:
                    raise Answer(409, "Reference already exists")
                repository.branches[rest] = dict(repository.branches["main"])
                return {}
            if action in ("", "revision", "tree"):
                files = repository.branches[rest.split("/")[0] or "main"]
                if action == "tree":
                    return [{"type": "file", "path": path, "size": len(content), "oid": oid_of(content)}
                            for path, content in files.items()]
                return {"id": name, "modelId": name, "private": repository.private, "sha": "1" * 40, "tags": [],
                        "siblings": [{"rfilename": path} for path in files]}
            if action == "preupload":
                return {"files": [self.mode(one["path"], repository.branches[rest]) for one in given["files"]]}
            if action == "info":  # of git-lfs
                return {"transfer": "basic", "objects": [
                    one | ({} if one["oid"] in hub.objects else {
                        "actions": {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}})
                    for one in given["objects"]]}
            assert action == "commit", path
            return self.commit(name, repository, repository.branches[rest], body)

        def mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
            large, content = path.endswith(".safetensors"), files.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else oid_of(content)
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        def create(self, given: dict[str, Any]) -> Any:
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name.split("/")[0] not in hub.owners:
                raise Answer(403, "You don't have the rights to create a model under this namespace")
            if name in hub.repositories:
                raise Answer(409, "You already created this model repo")
            hub.repositories[name] = Repository(given.get("private", given.get("visibility") == "private"))
            return {"url": f"{hub.endpoint}/{name}", "name": name}

        def commit(self, name: str, repository: Repository, files: dict[str, bytes], body: bytes) -> Any:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    repository.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                else:
                    assert line["key"] == "deletedFile", line
                    del files[value["path"]]
            return {"commitUrl": f"{hub.endpoint}/{name}/commit/{'2' * 40}", "commitOid": "2" * 40, "success": True}

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers at its ``endpoint``."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
