"""A hub on this machine: the few routes a download needs, and one repository for each way it may fail."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

from local_server import knowing_only, serving

FIRST, SECOND, TAGGED = "1" * 40, "2" * 40, "3" * 40
CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n\nlicense: not-this-one\n"
WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": os.urandom(70_000),
    "model-00002-of-00002.safetensors": os.urandom(3_000),
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"\x00\x01pieces",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "LICENSE.txt": b"Apache",
    "USE_POLICY.md": b"be kind",
    "README.md": CARD.encode(),
}
UNWANTED = (
    "pytorch_model.bin",
    "modeling_x.py",
    "tokenizer.py",
    "tokenizer.bin",
    "LICENSE.py",
    "training_args.pt",
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "model.gguf",
    "flax_model.msgpack",
)
EVERY = (*WANTED, *UNWANTED)
FILES = {
    "acme/tiny": EVERY,
    "acme/gated": EVERY,  # listed, but no file may be read
    "acme/flaky": EVERY,  # looked up, but not listed
    "acme/cut": EVERY,  # connections end early
    "acme/pickled": ("pytorch_model.bin", "consolidated.safetensors", "x/model.safetensors"),
}
SECRET = "hf_aSecretOfThisTest"


@dataclass
class Answers:
    """What the stub hub answers with, and what it was asked for."""

    branches: dict[str, str] = field(default_factory=lambda: {"main": FIRST, "dev/next": SECOND, "v1": TAGGED})
    released: Event = field(default_factory=Event)
    requested: list[str] = field(default_factory=list)
    authorizations: set[tuple[bool, str | None]] = field(default_factory=set)


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub that a download needs; every repository but `acme/tiny` fails in its own way."""

    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer
    answers: ClassVar[Answers]
    refusals: ClassVar[dict[str, tuple[int, str]]] = {
        "acme/sealed": (401, "GatedRepo"),
        "acme/token": (401, ""),
        "acme/forbidden": (403, ""),
        "acme/limited": (429, ""),
        "acme/broken": (500, ""),
        "acme/busy": (503, ""),
    }

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].replace("%2F", "/").strip("/").split("/")
        if parts[:2] != ["api", "models"] and parts[2:3] != ["resolve"] and parts[0] != "cdn":
            return self.refuse(404)  # what a client asks about itself is no concern here
        self.answers.requested.append(self.path)
        self.answers.authorizations.add((parts[0] == "cdn", self.headers.get("Authorization")))
        if parts[0] == "cdn":
            return self.say(200, self.body_of("/".join(parts[3:])), "application/octet-stream")
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:])
        return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def api(self, repository: str, rest: list[str]) -> None:
        if repository == "acme/portal":
            return self.say(200, b"<html>log in first</html>", "text/html")
        if repository == "acme/hung":
            self.close_connection = self.answers.released.wait(10)
            return None
        if repository not in FILES:
            return self.refuse(*self.refusals.get(repository, (404, "RepoNotFound")))
        names = FILES[repository]
        if rest and rest[0] == "tree":
            return self.refuse(503) if repository == "acme/flaky" else self.tree(names, rest[1])
        commit = self.commit("/".join(rest[1:]) or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in names]
        return self.document({"id": repository, "sha": commit, "siblings": siblings})

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.answers.branches.values() else self.answers.branches.get(revision)

    def tree(self, names: tuple[str, ...], commit: str) -> None:
        if self.commit(commit) is None:
            return self.refuse(404, "RevisionNotFound")
        sizes = [(name, len(self.body_of(name))) for name in names]
        return self.document([{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes])

    def file(self, repository: str, commit: str, name: str) -> None:
        if repository == "acme/gated":
            return self.refuse(403, "GatedRepo")
        body = self.body_of(name)
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
        if name.endswith(".safetensors"):  # as the hub does for large files: elsewhere, and known by their sha256
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
            return self.say(302, b"", "text/plain", headers | {"Location": f"{self.elsewhere()}/{repository}/{name}"})
        if repository == "acme/cut" and self.command == "GET":
            self.close_connection = True
            return self.say(200, body, "text/plain", headers, cut=1)
        return self.say(200, body, "text/plain", headers)

    def elsewhere(self) -> str:
        return f"http://localhost:{self.server.server_port}/cdn"

    def body_of(self, name: str) -> bytes:
        return WANTED.get(name, b"never to be sent")

    def document(self, value: Any) -> None:
        self.say(200, json.dumps(value).encode(), "application/json")

    def refuse(self, status: int, code: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {"X-Error-Message": "Invalid credentials in Authorization header"}
        self.say(status, b'{"error": "no"}', "application/json", headers)

    def say(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, *, cut: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - cut])


@dataclass
class Stub:
    """A running stub hub and the cache directory of its users."""

    url: str
    home: Path
    answers: Answers

    def resolve(self, *words: str, **environment: str) -> dict[str, Any]:
        """What each word resolves to in a fresh process whose client waits for nothing between retries."""
        clean = knowing_only(self.url, self.home)
        command = [sys.executable, "-c", PROGRAM, *words]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


PROGRAM = """
import json, sys, time
from llmcompress.errors import CompressError
from llmcompress.hub.source import resolve
assert "huggingface_hub" not in sys.modules
time.sleep = lambda seconds: None
found = {}
for word in sys.argv[1:]:
    try:
        source = resolve(word)
        found[word] = {name: getattr(source, name) for name in ("name", "repository", "revision", "license")}
        found[word]["path"] = str(source.path)
    except CompressError as error:
        found[word] = {"kind": type(error).__name__, "what": error.what, "hint": error.hint}
assert not {"transformers", "torch"} & set(sys.modules)
print(json.dumps(found))
"""


@contextmanager
def running_stub(home: Path) -> Iterator[Stub]:
    """A stub hub on a free port of this machine, whose users keep their cache in `home`."""
    answers = Answers()
    handler = type("OneHub", (Hub,), {"answers": answers})
    with serving(handler, answers.released) as url:
        yield Stub(url, home, answers)
