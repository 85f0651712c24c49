"""A hub on this machine that can be written to: repositories in memory, the routes of a push, faults where one asks.

Commits are snapshots of names to blobs; a large file must have been uploaded, with the bytes its sha256 says, before a
commit may name it, as at the real one.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock
from typing import Any, ClassVar

import yaml
from local_server import knowing_only, serving

TOKEN = "hf_aTokenThatMayWrite"
LARGE = re.compile(r".*\.(safetensors|gguf)|tokenizer\.json")
ROUTE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>[^/]+)(?:/(?P<rest>.*))?)?")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")


@dataclass
class Repo:
    """One repository: its commits, oldest first, as `(id, summary, files)`."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the last commit."""
        return self.commits[-1][2]

    def commit(self, summary: str, files: Mapping[str, bytes]) -> str:
        """Add one; its id."""
        name = hashlib.sha1(f"{len(self.commits)} {summary} {sorted(files)}".encode()).hexdigest()
        self.commits.append((name, summary, dict(files)))
        return name


@dataclass
class Fault:
    """What happens to requests of a method whose path holds some text: a status, `die` half-way, or `hang`."""

    method: str
    path: str
    what: int | str
    message: str = ""
    left: int = 1 << 30


@dataclass
class Forge:
    """What the hub holds and saw."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    parents: dict[str, list[str | None]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    reached: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)
    lock: Any = field(default_factory=Lock)


class Handler(BaseHTTPRequestHandler):
    """The routes of a push and of a download."""

    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer
    forge: ClassVar[Forge]

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        """A client that is gone is no error here."""
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.path = self.path.split("?")[0].replace("%2F", "/")
        if self.path == "/forget":
            self.forge.faults.clear()
            return self.document({})
        self.forge.requests.append(f"{self.command} {self.path}")
        if (fault := self.fault()) is not None:
            return self.fail(fault)
        body = self.body()
        if self.command == "PUT":
            return self.upload(self.path.rpartition("/")[2], body)
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid credentials in Authorization header")
        if self.path == "/api/whoami-v2":
            return self.document({"type": "user", "name": "acme", "orgs": [{"name": "team"}]})
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := BATCH.fullmatch(self.path):
            return self.batch(json.loads(body))
        if found := RESOLVE.fullmatch(self.path):
            return self.file(**found.groupdict())
        if found := ROUTE.fullmatch(self.path):
            return self.api(found["repo"], found["verb"] or "", body)
        return self.refuse(404, "no such route")

    def fault(self) -> Fault | None:
        for fault in self.forge.faults:
            if fault.left and self.command == fault.method and fault.path in self.path:
                fault.left -= 1
                return fault
        return None

    def fail(self, fault: Fault) -> None:
        if fault.what == "hang":
            self.forge.reached.set()
            self.forge.released.wait(30)
        if isinstance(fault.what, str):  # nothing of the body is kept, and nothing is answered
            self.close_connection = True
            return None
        self.body()
        return self.refuse(fault.what, fault.message)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = []
        while size := int(self.rfile.readline(), 16):
            found.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(found)

    def validate(self, card: str) -> None:
        front = card.split("---\n")[1]
        known = isinstance(yaml.safe_load(front), dict)
        return self.document(
            {"errors": [] if known else [{"message": "no mapping"}], "warnings": []}, 200 if known else 400
        )

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.forge.repos:
            return self.refuse(409, "You already created this model repo")
        repo = self.forge.repos[name] = Repo(asked["visibility"] == "private")
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.document({"url": f"{self.here()}/{name}"})

    def api(self, name: str, verb: str, body: bytes) -> None:
        repo = self.forge.repos.get(name)
        if repo is None:
            return self.refuse(404, "Repository not found", code="RepoNotFound")
        if verb == "preupload":
            return self.document({"files": [self.mode(repo, f["path"]) for f in json.loads(body)["files"]]})
        if verb == "commit":
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        files = {n: {"type": "file", "path": n, "size": len(b), "oid": git_id(b)} for n, b in repo.files.items()}
        if verb == "tree":
            return self.document(list(files.values()))
        siblings = [{"rfilename": n} for n in files]
        return self.document({"id": name, "sha": repo.commits[-1][0], "private": repo.private, "siblings": siblings})

    def mode(self, repo: Repo, name: str) -> dict[str, Any]:
        large, there = bool(LARGE.fullmatch(name)), repo.files.get(name)
        known = {} if there is None else {"oid": hashlib.sha256(there).hexdigest() if large else git_id(there)}
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.forge.large:
                entry["actions"] = {"upload": {"href": f"{self.here()}/large/{each['oid']}"}}
            objects.append(entry)
        return self.document({"transfer": "basic", "objects": objects})

    def upload(self, name: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != name:
            return self.refuse(400, "these are not the bytes of that name")
        with self.forge.lock:
            self.forge.uploads.append(name)
            self.forge.large[name] = body
        return self.document({})

    def commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        head, files = lines[0]["value"], dict(repo.files)
        if head.get("parentCommit") not in (None, repo.commits[-1][0]):
            return self.refuse(412, "A commit has happened since")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.forge.large:
                files[value["path"]] = self.forge.large[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return self.refuse(400, f"cannot {key} {value['path']}")
        self.forge.parents.setdefault(name, []).append(head.get("parentCommit"))
        made = repo.commit(head["summary"], files)
        return self.document({"commitUrl": f"{self.here()}/{name}/commit/{made}", "commitOid": made, "success": True})

    def file(self, repo: str, rev: str, name: str) -> None:
        found = self.forge.repos[repo]
        files = next((files for made, _, files in found.commits if made == rev), found.files)
        if name not in files:
            return self.refuse(404, "no such file", code="EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": found.commits[-1][0]}
        return self.say(200, data, headers)

    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def document(self, value: Any, status: int = 200) -> None:
        self.say(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message} | (
            {"X-Error-Code": code} if code else {}
        )
        self.say(status, json.dumps({"error": message}).encode(), headers)

    def say(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def git_id(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Result:
    """How one command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Client:
    """A user of the hub: commands are run in a fresh process, whose client waits for nothing between retries."""

    url: str
    home: Path
    forge: Forge

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a process that knows this hub alone."""
        return (
            knowing_only(self.url, self.home)
            | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
            | changes
        )

    def run(self, *commands: list[Any], folder: Path, **changes: str) -> list[Result]:
        """Each command in turn, all in one process; after a word `python` is Python, after `forget` are no faults."""
        words = [[str(word) for word in command] for command in commands]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], input=json.dumps(words), cwd=folder, env=self.environment(**changes),
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return [Result(**each) for each in json.loads(done.stdout.splitlines()[-1])]


PROGRAM = """
import contextlib, io, json, os, sys, time, urllib.request
from llmcompress.cli import main
time.sleep = lambda seconds: None
found = []
for words in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["llmcompress", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[0] == "forget":
                urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/forget").read()
            else:
                exec(words[1]) if words[0] == "python" else main()
        except SystemExit as end:
            code = end.code or 0
    found.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
print(json.dumps(found))
"""


@contextmanager
def running_forge(home: Path) -> Iterator[Client]:
    """An empty hub on a free port of this machine, and a user whose cache is in `home`."""
    forge = Forge()
    handler = type("OneForge", (Handler,), {"forge": forge})
    with serving(handler, forge.released) as url:
        yield Client(url, home, forge)
