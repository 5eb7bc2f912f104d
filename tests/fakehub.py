"""A Hub on this machine: as much of its protocol as huggingface_hub and datasets use to read, and to push what is kept
in git; and what was asked."""

import base64
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Header:
    """A safetensors file of which nothing but its header exists: who asks for a weight gets an error."""

    content: bytes
    size: int
    sha256: str


def header(shapes: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> Header:
    """The header of a safetensors file with weights of these shapes, `width` bytes a number."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + width * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    content = len(text).to_bytes(8, "little") + text
    return Header(content, len(content) + end, hashlib.sha256(content).hexdigest())


Files = dict[str, bytes | Header]


def files(folder: Path) -> Files:
    """The files of a folder, to be served."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Asked:
    """One request. `start`, `end`: the bytes that were asked for; -1 is the last one."""

    method: str
    path: str
    start: int = 0
    end: int = -1
    token: str | None = None
    body: bytes = b""


@dataclass
class FakeHub:
    """Repositories by kind and name (`models/a/b`), each a list of commits; `main` is the newest.

    `in_git`: names of weights that are kept in git, as no weights should be. `lies`: what is sent in place of files.
    """

    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    in_git: set[str] = field(default_factory=set)
    lies: dict[str, bytes] = field(default_factory=dict)

    def large(self, name: str) -> bool:
        """Whether a file is kept beside git, by its SHA-256."""
        return name.endswith((".safetensors", ".parquet")) and name not in self.in_git

    def newest(self, repository: str) -> Files:
        """The files of `main`."""
        return list(self.commits[repository].values())[-1]

    def push(self, repository: str, content: Files, commit: str | None = None) -> str:
        """Make a commit; returns its name."""
        text = f"{repository} {len(self.commits.get(repository, {}))}"
        commit = commit or hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = content
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """What makes the real clients ask this Hub, with a cache of their own."""
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return own | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}

    def fetched(self, suffix: str) -> list[Asked]:
        """The requests for the content of files with this suffix."""
        return [a for a in self.asked if a.method == "GET" and "/resolve/" in a.path and a.path.endswith(suffix)]

    def whole(self, suffix: str) -> int:
        """How many times a file with this suffix was asked for without a range."""
        return sum(asked.end == -1 for asked in self.fetched(suffix))


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer on a free port of the loopback interface."""

    class Handler(_Handler):
        shown = hub

    server = ThreadingHTTPServer(("127.0.0.1", hub.port), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    shown: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(self.rfile.read(length))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        words = path.split("/")
        asked = Asked(self.command, path, token=self.headers.get("Authorization"), body=body)
        self.shown.asked.append(asked)
        if path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
            self.shown.commits.setdefault(f"{wanted.get('type', 'model')}s/{name}", {})
            self._json({"url": f"http://127.0.0.1:{self.shown.port}/{name}"})
            return
        if len(words) == 6 and words[4] in ("preupload", "commit"):
            self._pushed("/".join(words[1:4]), words[4], body)
            return
        if words[0] == "api" and len(words) >= 4 and words[1] in ("models", "datasets"):
            self._api("/".join(words[1:4]), words[4:], body)
        elif "resolve" in words:
            at = words.index("resolve")
            name = "/".join(words[:at])
            kind = name if name.startswith("datasets/") else f"models/{name}"
            self._file(kind, words[at + 1], "/".join(words[at + 2 :]), asked)
        else:
            self._send(404, b"{}")

    def _pushed(self, repository: str, verb: str, body: bytes) -> None:
        """What comes before a push (every file is wanted in git), and the push."""
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            return
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")}
        commit = self.shown.push(repository, sent)
        address = f"http://127.0.0.1:{self.shown.port}/{repository.partition('/')[2]}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})

    def _commit(self, repository: str, revision: str) -> str | None:
        """The commit that a revision means; answers 404 where there is none."""
        commits = self.shown.commits.get(repository)
        if commits is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return None
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _api(self, repository: str, rest: list[str], body: bytes) -> None:
        verb, revision = (rest + ["revision", "main"])[:2] if not rest else (rest[0], rest[1] if rest[1:] else "main")
        commit = self._commit(repository, revision)
        if commit is None:
            return
        content = self.shown.commits[repository][commit]
        name = repository.partition("/")[2]
        if verb == "revision":
            siblings = [_sibling(n, c, self.shown.large(n)) for n, c in content.items()]
            info = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
            self._json(info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})
        elif verb == "tree":
            below = "/".join(rest[2:])
            self._json(_tree(content, below, "recursive=true" in self.path.lower(), self.shown.large))
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            entries = _tree(content, "", True, self.shown.large)
            self._json([entry for entry in entries if entry["path"] in wanted])
        else:
            self._send(404, b"{}")

    def _file(self, repository: str, revision: str, name: str, asked: Asked) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        content = self.shown.commits[repository][commit].get(name)
        if content is None:
            self._send(404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        size, sha = _size(content), _etag(content, self.shown.large(name))
        more = {"X-Repo-Commit": commit, "ETag": f'"{sha}"', "Accept-Ranges": "bytes"}
        more |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{sha}"'} if self.shown.large(name) else {}
        if self.command == "HEAD":
            self._send(200, b"", more, length=size)
            return
        span = self.headers.get("Range")
        if span is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            asked.start, asked.end = int(first), int(last) if last else -1
        begin, end = asked.start, size - 1 if asked.end == -1 else min(asked.end, size - 1)
        if isinstance(content, Header):
            if span is None or asked.end == -1 or end - begin > 200_000:
                self._send(500, b"these weights do not exist")
                return
            data = content.content[begin : end + 1]
            data += bytes(end + 1 - begin - len(data))
        else:
            data = self.shown.lies.get(name, content)[begin : end + 1]
        if span is not None:
            more["Content-Range"] = f"bytes {begin}-{end}/{size}"
        self._send(206 if span is not None else 200, data, more)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, data: bytes, more: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(code)
        for key, value in (more or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _size(content: bytes | Header) -> int:
    return content.size if isinstance(content, Header) else len(content)


def _etag(content: bytes | Header, large: bool) -> str:
    """As the Hub has it: SHA-256 of large files, git's blob id of small ones."""
    if isinstance(content, Header):
        return content.sha256
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes | Header, large: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": _size(content), "blobId": "0" * 40}
    lfs = {"sha256": _etag(content, large), "size": _size(content), "pointerSize": 130}
    return entry | ({"lfs": lfs} if large else {})


def _tree(content: Files, below: str, recursive: bool, large: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The listing of a folder of a commit."""
    found: dict[str, dict[str, Any]] = {}
    start = f"{below}/" if below else ""
    for name, data in content.items():
        if not name.startswith(start):
            continue
        parts = name[len(start) :].split("/")
        for i in range(1, len(parts)):
            folder = start + "/".join(parts[:i])
            if recursive or i == 1:
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entry = {"type": "file", "path": name, "oid": _etag(data, large(name))[:40], "size": _size(data)}
            lfs = {"oid": _etag(data, large(name)), "size": _size(data), "pointerSize": 130}
            found[name] = entry | ({"lfs": lfs} if large(name) else {})
    return list(found.values())
