"""
A Hub for tests, on loopback, with the standard library only: the endpoints that huggingface_hub uses to create, push to
and read model repositories, by the git LFS protocol. Large files are redirected to signed addresses on a second origin,
which refuses any Authorization header.

Faults (see `hub_faults`) can be put into its answers. It logs every request, so that tests can count bytes and look for
the token.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_faults import (
    INSTEAD_OF_REPLIES,
    SEND_BYTES,
    Fault,
    FileReply,
    break_connection,
    changed,
    honest,
)

WRITE_TOKEN = "hf_xWriteTokenOfTheTests"
READ_TOKEN = "hf_xReadTokenOfTheTests"
LFS_THRESHOLD_BYTES = 20_000


@dataclass(frozen=True)
class Blob:
    """Content on the server's disk. `oid` is its SHA-256, `git_oid` that of git."""

    path: Path
    size: int
    oid: str
    git_oid: str
    is_lfs: bool


@dataclass
class Repository:
    """Commits are maps from path to content; refs point to them."""

    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: int = 0

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass(frozen=True)
class Request:
    """A request as it came, names of headers in lower case, and how many bytes of body went out."""

    origin: str
    method: str
    target: str
    headers: dict[str, str]
    status: int
    sent_bytes: int


class HubServer:
    """Both origins, in threads of this process, with their files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, Blob] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.signatures: set[str] = set()
        self.lock = threading.RLock()
        self.before_request: Callable[[str, str, str], None] | None = None
        self.supports_ranges = True
        self.is_stopping = threading.Event()
        self._counter = 0
        (folder / "blobs").mkdir(parents=True)
        self._hub = _listen(self, "hub")
        self._storage = _listen(self, "storage")
        self.endpoint = f"http://127.0.0.1:{self._hub.server_address[1]}"
        # Another host name, so that clients see another origin.
        self.storage = f"http://localhost:{self._storage.server_address[1]}"

    def close(self) -> None:
        self.is_stopping.set()
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    # What tests do to repositories without a client.

    def add_repository(self, name: str, files: dict[str, bytes | Path], **flags: bool) -> str:
        """Makes a repository with one commit, or adds a commit to one; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(name, Repository(**flags))
            head = repository.refs.get("main")
            content = dict(repository.commits.get(head, {})) if head else {}
            content.update({path: self.store(data) for path, data in files.items()})
            return self.commit(repository, "main", content)

    def commit(self, repository: Repository, ref: str, content: dict[str, Blob]) -> str:
        self._counter += 1
        oid = hashlib.sha1(f"commit {self._counter}".encode()).hexdigest()
        repository.parents[oid] = repository.refs.get(ref)
        repository.commits[oid] = content
        repository.refs[ref] = oid
        return oid

    def store(self, data: bytes | Path) -> Blob:
        """Keeps content; a file given by its path stays where it is (it may be large and sparse)."""
        if isinstance(data, Path):
            oid = hashlib.sha256(str(data).encode()).hexdigest()
            blob = Blob(data, data.stat().st_size, oid, oid[:40], is_lfs=True)
        else:
            oid = hashlib.sha256(data).hexdigest()
            path = self.folder / "blobs" / oid
            path.write_bytes(data)
            git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            blob = Blob(path, len(data), oid, git_oid, is_lfs=len(data) > LFS_THRESHOLD_BYTES)
        self.blobs[blob.oid] = blob
        return blob

    def forget(self, data: bytes) -> None:
        """Lets clients upload this content again. Commits that hold it keep it."""
        self.blobs.pop(hashlib.sha256(data).hexdigest(), None)

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision) or ""][path].path.read_bytes()

    def files(self, name: str, revision: str = "main") -> list[str]:
        repository = self.repositories[name]
        return sorted(repository.commits[repository.resolve(revision) or ""])

    # What tests ask about the requests.

    def reset(self) -> None:
        with self.lock:
            self.requests.clear()
            self.faults.clear()
            self.before_request = None
            self.supports_ranges = True

    def sent_bytes(self) -> int:
        with self.lock:
            return sum(request.sent_bytes for request in self.requests)

    def take_fault(self, origin: str, method: str, target: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.meets(origin, method, target)), None)

    def sign(self, oid: str) -> str:
        with self.lock:
            self._counter += 1
            signature = hashlib.sha256(f"{oid} {self._counter}".encode()).hexdigest()[:24]
            self.signatures.add(signature)
        return f"{self.storage}/blobs/{oid}?signature={signature}"


@contextmanager
def running_hub(folder: Path) -> Iterator[HubServer]:
    server = HubServer(folder)
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients of these tests break connections, and are killed; nobody wants to read about it."""


def _listen(hub: HubServer, origin: str) -> ThreadingHTTPServer:
    handler = type("Handler", (HubHandler if origin == "hub" else StorageHandler,), {"hub": hub, "origin": origin})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """What both origins share: bodies, faults, ranges and the log."""

    hub: HubServer
    origin: str
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # Buffered, with Nagle off: otherwise each reply waits 40 ms.
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `hub.requests`."""

    def handle_method(self) -> None:
        self.status, self.sent_bytes = 0, 0
        self.body = self._read_body()
        if self.hub.before_request is not None:
            self.hub.before_request(self.origin, self.command, self.path)
        self.fault = self.hub.take_fault(self.origin, self.command, self.path)
        try:
            if self.fault is not None and self.fault.kind in INSTEAD_OF_REPLIES:
                INSTEAD_OF_REPLIES[self.fault.kind](self.fault, self)
            else:
                self.route()
            self.wfile.flush()
        finally:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.origin, self.command, self.path, headers, self.status, self.sent_bytes)
            with self.hub.lock:
                self.hub.requests.append(request)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_method

    def route(self) -> None:
        raise NotImplementedError

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Sends bytes as they are and anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.sent_bytes += len(data)

    def reply_with_file(self, blob: Blob, headers: dict[str, str]) -> None:
        """Sends a file or the range asked for, with the fault of this request."""
        start, end, status = 0, blob.size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.supports_ranges:
            start, end, status = int(asked[1]), min(int(asked[2] or blob.size) + 1, blob.size), 206
            if start >= blob.size:
                self.reply(416, b"", {"Content-Range": f"bytes */{blob.size}"})
                return
        reply = changed(self.fault, honest(status, start, end, blob.size))
        self.status = reply.status
        self.send_response(reply.status)
        self.send_header("Content-Length", str(reply.claimed))
        if self.hub.supports_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if reply.status == 206:
            first, last = reply.start + reply.moved, reply.end + reply.moved - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{reply.total}")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(blob, reply)

    def _send(self, blob: Blob, reply: FileReply) -> None:
        left = reply.sent
        with blob.path.open("rb") as file:
            file.seek(reply.start)
            while left > 0 and (piece := file.read(min(SEND_BYTES, left))):
                left -= len(piece)
                if reply.flips and left == 0:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                self.wfile.write(piece)
                self.sent_bytes += len(piece)
                if reply.pause_s:
                    self.wfile.flush()
                    time.sleep(reply.pause_s)
        if reply.stall_s:
            self.wfile.flush()
            self.hub.is_stopping.wait(reply.stall_s)
        self.wfile.write(reply.extra)
        if reply.breaks:
            break_connection(self)


class StorageHandler(Handler):
    """The storage behind the Hub: signed addresses, no Authorization."""

    def route(self) -> None:
        address = urlsplit(self.path)
        oid = address.path.rsplit("/", 1)[1]
        signature = parse_qs(address.query).get("signature", [""])[0]
        if "Authorization" in self.headers:
            self.reply(400, b"Only one auth mechanism allowed")
        elif signature not in self.hub.signatures:
            self.reply(403, b"Request has expired")
        elif self.command == "PUT":
            self._store(oid)
        elif oid not in self.hub.blobs:
            self.reply(404, b"no such object")
        else:
            blob = self.hub.blobs[oid]
            self.reply_with_file(blob, {"ETag": f'"{blob.oid}"'})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, b"content does not match its SHA-256")
            return
        with self.hub.lock:
            blob = self.hub.store(self.body)
            self.hub.blobs[oid] = Blob(blob.path, blob.size, oid, blob.git_oid, is_lfs=True)
        self.reply(200)


class HubHandler(Handler):
    """The Hub itself."""

    def route(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/agent-harnesses", lambda: self.reply(200, {"standardEnvVars": [], "harnesses": {}})),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda: self.reply(200, {"errors": [], "warnings": []})),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("POST", r"/([^/]+/[^/]+)/lfs-verify", lambda name: self.reply(200, {})),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/api/models/([^/]+/[^/]+)/tag/(.+)", self._tag),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", self._paths_info),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", self._resolve),
        ]
        for methods, pattern, action in routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(methods, self.command):
                with self.hub.lock:
                    pass  # Waits for a change under way; the actions themselves run side by side.
                action(*match.groups())
                return
        self.reply(404, {"error": f"no such endpoint: {self.command} {path}"})

    # Access

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _repository(self, name: str, revision: str | None = None) -> tuple[Repository, str] | None:
        """The repository and commit, if the token may read them; otherwise replies with the Hub's error."""
        token = self._token()
        repository = self.hub.repositories.get(name)
        if token not in (None, READ_TOKEN, WRITE_TOKEN):
            self._refuse(401, "", "Invalid credentials")
        elif repository is None or (repository.is_private and token is None):
            self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif repository.is_gated and token is None:
            self._refuse(401, "GatedRepo", "Access to this model is restricted")
        else:
            commit = repository.resolve(revision or "main")
            if commit is not None or revision is None:
                return repository, commit or "0" * 40
            self._refuse(404, "RevisionNotFound", "Revision not found")
        return None

    def _may_write(self) -> bool:
        if self._token() == WRITE_TOKEN:
            return True
        self._refuse(403 if self._token() == READ_TOKEN else 401, "", "You don't have the rights")
        return False

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(status, {"error": message}, headers)

    # Writing

    def _create(self) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        with self.hub.lock:
            if name in self.hub.repositories:
                self.reply(409, {"error": "You already created this model repo", **answer})
                return
            is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repository = self.hub.repositories[name] = Repository(is_private=is_private)
            self.hub.commit(repository, "main", {})
        self.reply(200, answer)

    def _preupload(self, name: str, revision: str) -> None:
        found = self._repository(name, revision)
        if found is None or not self._may_write():
            return
        repository, commit = found
        answers = []
        for file in json.loads(self.body)["files"]:
            stored = repository.commits.get(commit, {}).get(file["path"])
            is_lfs = file["size"] > LFS_THRESHOLD_BYTES or file["path"].endswith(".safetensors")
            oid = (stored.oid if is_lfs else stored.git_oid) if stored else None
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    **({"oid": oid} if oid else {}),
                }
            )
        self.reply(200, {"files": answers, "commitOid": commit})

    def _lfs_batch(self, name: str) -> None:
        if not self._may_write():
            return
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                verify = f"{self.hub.endpoint}/{name}/lfs-verify"
                answer["actions"] = {
                    "upload": {"href": self.hub.sign(wanted["oid"]), "header": {}},
                    "verify": {"href": verify, "header": {}},
                }
            answers.append(answer)
        self.reply(200, {"transfer": "basic", "objects": answers})

    def _commit(self, name: str, revision: str) -> None:
        found = self._repository(name, revision)
        if found is None or not self._may_write():
            return
        repository, head = found
        create_pr = "create_pr=1" in self.path
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head):
            self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        with self.hub.lock:
            content = dict(repository.commits.get(head, {}))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        self.reply(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                        return
                    content[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    content.pop(value["path"], None)
            ref = revision
            answer: dict[str, Any] = {"success": True}
            if create_pr:
                repository.pull_requests += 1
                ref = f"refs/pr/{repository.pull_requests}"
                repository.refs[ref] = head
                answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{repository.pull_requests}"
            oid = self.hub.commit(repository, ref, content)
            repository.messages.append(header["summary"])
        answer |= {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}
        self.reply(200, answer)

    def _tag(self, name: str, revision: str) -> None:
        found = self._repository(name, revision)
        if found is None or not self._may_write():
            return
        repository, commit = found
        tag = json.loads(self.body)["tag"]
        if tag in repository.refs:
            self.reply(409, {"error": "Tag already exists"})
            return
        repository.refs[tag] = commit
        self.reply(200, {})

    def _branch(self, name: str, branch: str) -> None:
        found = self._repository(name)
        if found is None or not self._may_write():
            return
        repository, commit = found
        if branch in repository.refs:
            self.reply(409, {"error": "Reference already exists"})
            return
        repository.refs[branch] = commit
        self.reply(200, {})

    # Reading

    def _info(self, name: str, revision: str | None = None) -> None:
        found = self._repository(name, revision)
        if found is None:
            return
        repository, commit = found
        content = repository.commits.get(commit, {})
        answer: dict[str, Any] = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": repository.is_private,
            "siblings": [{"rfilename": path} for path in sorted(content)],
            "tags": [],
        }
        card = content.get("README.md")
        if card is not None:
            license_line = re.search(r"^license: *(\S+)$", card.path.read_text(), flags=re.MULTILINE)
            answer["cardData"] = {"license": license_line[1]} if license_line else {}
        self.reply(200, answer)

    def _tree(self, name: str, revision: str) -> None:
        found = self._repository(name, revision)
        if found is not None:
            repository, commit = found
            self.reply(200, [_entry(path, blob) for path, blob in sorted(repository.commits[commit].items())])

    def _paths_info(self, name: str, revision: str) -> None:
        found = self._repository(name, revision)
        if found is not None:
            repository, commit = found
            content = repository.commits[commit]
            paths = parse_qs(self.body.decode()).get("paths", [])
            self.reply(200, [_entry(path, content[path]) for path in paths if path in content])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name, revision)
        if found is None:
            return
        repository, commit = found
        blob = repository.commits.get(commit, {}).get(path)
        if blob is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if blob.is_lfs:
            headers |= {
                "X-Linked-Size": str(blob.size),
                "X-Linked-Etag": f'"{blob.oid}"',
                "Location": self.hub.sign(blob.oid),
            }
            self.reply(302, b"", headers)
        else:
            self.reply_with_file(blob, headers | {"ETag": f'"{blob.git_oid}"'})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 134}
    return entry
