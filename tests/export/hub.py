"""A stand-in for the Hugging Face hub: what publishing a folder and reading a dataset need of it.

It answers as the hub does to huggingface_hub without Xet: repositories with commits, listings in
pages, text in git's blobs, binary files by the protocol of git LFS with a redirect to their bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_REPOSITORY = re.compile(
    r"(?:/api)?(?:/models|/datasets)?/(?P<name>[\w.-]+/[\w.-]+?)(?P<rest>/.*)?"
)
_PAGE = 40  # entries of a listing; the hub has 1,000


@dataclass
class Answer:
    """Status, body and headers."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(status: int, content: Any, **headers: str) -> Answer:
    return Answer(
        status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
    )


def refusal(status: int, code: str, message: str) -> Answer:
    """An error, as hf_raise_for_status tells them apart."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(status, json.dumps({"error": message}).encode(), headers)


@dataclass
class Repository:
    """The commits of a repository, oldest first: all files of each, by path."""

    wanted: dict[str, Any]  # the request that made it
    commits: dict[str, dict[str, bytes]]

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)


class Hub:
    """Keeps what arrives.

    Attributes:
        repositories: name -> the request that made it.
        requests: method and path of each request, in order.
        tokens: the authorizations that came with them.
        blobs: what was uploaded as a large file, by its sha256.
        misbehave: called with method and path before each answer; a status refuses the request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        self.misbehave: Callable[[str, str], int | None] = lambda method, path: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"  # another host, as a CDN is

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def repositories(self) -> dict[str, dict[str, Any]]:
        return {name: repo.wanted for name, repo in self.repos.items()}

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit of the only repository; what every new one has is left out."""
        [repo] = self.repos.values()
        found = repo.commits[repo.head]
        return {path: data for path, data in found.items() if path != ".gitattributes"}

    def answer(self, method: str, address: str, headers: Any, body: bytes) -> Answer:
        url = urlsplit(address)
        path = url.path
        if status := self.misbehave(method, path):
            return refusal(status, "", "told to misbehave")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return as_json(200, {"errors": [], "warnings": []})
        if path.startswith("/blob/"):
            return self._blob(method, path.removeprefix("/blob/"), headers, body)
        found = _REPOSITORY.fullmatch(path.removesuffix(".git/info/lfs/objects/batch"))
        repo = self.repos.get(found["name"]) if found else None
        if found is None or repo is None:
            return refusal(404, "RepoNotFound", f"no such repository: {path}")
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._place(o) for o in json.loads(body)["objects"]]
            return as_json(200, {"transfer": "basic", "objects": objects})
        verb, _, rest = (found["rest"] or "/revision/main").lstrip("/").partition("/")
        revision, _, inner = rest.partition("/")
        files = repo.files(unquote(revision))
        if files is None:
            return refusal(404, "RevisionNotFound", f"no such revision: {revision}")
        commit = repo.head if revision == "main" else revision
        match verb:
            case "revision":
                return as_json(200, {"id": found["name"], "sha": commit, "private": True})
            case "tree":
                return self._list(files, url.path, parse_qs(url.query))
            case "resolve":
                return self._resolve(files, commit, unquote(inner))
            case "preupload":
                wanted = json.loads(body)["files"]
                return as_json(200, {"files": [self._mode(one, files) for one in wanted]})
            case "commit":
                return self._commit(repo, found["name"], body)
        return refusal(404, "", f"no such place: {path}")

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        about = {"url": f"{self.address}/{kind}{name}", "name": name}
        if name in self.repos:
            return as_json(409, {**about, "error": "You already created this repo"})
        first = {".gitattributes": b"*.bin filter=lfs diff=lfs merge=lfs -text\n"}
        self.repos[name] = Repository(wanted, {_git_hash(b"commit", name.encode()): first})
        return as_json(200, about)

    def _blob(self, method: str, sha256: str, headers: Any, body: bytes) -> Answer:
        if method == "PUT":
            self.blobs[sha256] = body
            return Answer(200)
        assert headers.get("Authorization") is None  # the token does not leave the hub
        data = self.blobs[sha256]
        asked = re.fullmatch(r"bytes=(\d+)-", headers.get("Range") or "")
        if asked is None:
            return Answer(200, data)
        start = int(asked[1])
        about = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return Answer(206, data[start:], {"Content-Range": about})

    def _mode(self, file: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".gguf")) or _is_binary(
            base64.b64decode(file["sample"])
        )
        data = there.get(file["path"])
        oid = None if data is None else _sha256(data) if large else _git_hash(b"blob", data)
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        about = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.blobs:  # it is there already, and needs no upload
            return about
        href = f"{self.address}/blob/{wanted['oid']}"
        return {**about, "actions": {"upload": {"href": href}}}

    def _list(self, files: dict[str, bytes], path: str, query: dict[str, list[str]]) -> Answer:
        assert query["recursive"] == ["true"]
        folders = {str(folder) for file in files for folder in Path(file).parents} - {"."}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "oid": _git_hash(b"tree", b""), "size": 0}
            for name in folders
        ]
        for name, data in files.items():
            entry = {
                "type": "file",
                "path": name,
                "oid": _git_hash(b"blob", data),
                "size": len(data),
            }
            if (sha256 := _sha256(data)) in self.blobs:
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 131}
            entries.append(entry)
        entries.sort(key=lambda entry: str(entry["path"]))
        start = int(query.get("cursor", ["0"])[0])
        after = f"{self.address}{path}?recursive=true&expand=false&cursor={start + _PAGE}"
        link = {"Link": f'<{after}>; rel="next"'} if start + _PAGE < len(entries) else {}
        return as_json(200, entries[start : start + _PAGE], **link)

    def _resolve(self, files: dict[str, bytes], commit: str, path: str) -> Answer:
        about = {"X-Repo-Commit": commit}
        if path not in files:
            answer = refusal(404, "EntryNotFound", f"no such file: {path}")
            return Answer(404, answer.body, answer.headers | about)
        data = files[path]
        sha256 = _sha256(data)
        if sha256 not in self.blobs:
            return Answer(200, data, about | {"ETag": f'"{_git_hash(b"blob", data)}"'})
        about |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        return Answer(302, b"", about | {"Location": f"{self.storage}/blob/{sha256}"})

    def _commit(self, repo: Repository, name: str, body: bytes) -> Answer:
        files = dict(repo.commits[repo.head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit", repo.head) != repo.head:
                        return refusal(412, "", "A commit has happened since.")
                case "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                    assert _sha256(files[value["path"]]) == value["oid"]
                case "deletedFile":
                    del files[value["path"]]
        commit = _git_hash(b"commit", repo.head.encode() + body)
        repo.commits[commit] = files
        url = f"{self.address}/{name}/commit/{commit}"
        return as_json(200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(f"{self.command} {self.path}")
                if self.command == "POST":  # what is read, or put where a POST said, needs none
                    hub.tokens.add(self.headers.get("Authorization"))
                answer = hub.answer(self.command, self.path, self.headers, body)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def _is_binary(sample: bytes) -> bool:
    return b"\0" in sample or any(byte > 127 for byte in sample)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(kind: bytes, data: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind, len(data)) + data).hexdigest()


@contextmanager
def hub_of_this_process(cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, whose settings are read at its import."""
    from huggingface_hub import constants

    from pipeline.io import hub_folder

    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        settings = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,  # the stand-in has the older protocol for large files
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", "hf_of_the_test")
        hub_folder._snapshot.cache_clear()
        yield hub
        hub_folder._snapshot.cache_clear()
