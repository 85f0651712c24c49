"""Out through the Hub and in again: one commit or none, only what verifies, and every refusal with advice."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL, TEXT, program
from forge_stub import LARGE, Client, Fault, Repo, running_forge

from tests.forked import Forker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, forker: Forker, llama: Path) -> Path:
    """A folder with a text, `out` quantized and evaluated, and `plain`, its export as bfloat16."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT * 60)
    (folder / "other.txt").write_text(TEXT.lower() * 20)
    for words in (
        ["quantize", llama, "--budget", "3.5bits", "-o", "out", "--calibration", "text.txt", *SMALL, "-q"],
        ["eval", "out", "--ref", llama, "--data", "other.txt", "--samples", "4", "--sequence-length", "32", "-q"],
        ["export", "out", "--format", "bf16", "-o", "plain", "-q"],
    ):
        done = forker.run(words, folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A user of an empty hub."""
    with running_forge(tmp_path / "home") as running:
        yield running


LOADS = """
import torch, llmcompress
tokens = torch.arange(12)[None]
with torch.no_grad():
    near, far = (llmcompress.load(x)(tokens).logits for x in (__import__("pathlib").Path("out"), "acme/packed"))
    again = llmcompress.load("again")(tokens).logits
assert torch.equal(near, far) and again.isfinite().all()
"""


def test_what_is_pushed_is_quantized_from_there_verified_and_loaded(client: Client, made: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (made / "out").iterdir()}
    found = client.run(
        ["push", "out", "acme/packed", "--json"],
        ["push", "plain", "acme/plain", "--public", "-q"],
        ["verify", "acme/packed", "--json"],
        ["quantize", "acme/plain", "--budget", "4bits", "-o", tmp_path / "again", "--calibration", "text.txt", *SMALL],
        ["python", LOADS.replace('"again"', repr(str(tmp_path / "again")))],
        ["push", "out", "acme/packed", "--json"],
        folder=made,
    )
    assert [each.code for each in found] == [0] * 6, found
    packed, plain = (client.forge.repos[name] for name in ("acme/packed", "acme/plain"))
    assert (packed.private, plain.private) == (True, False)
    assert packed.commits[0][1] == plain.commits[0][1] == "initial commit"
    assert len(packed.commits) == len(plain.commits) == 2
    assert len(client.forge.uploads) == len(set(client.forge.uploads))
    first, last = json.loads(found[0].out), json.loads(found[5].out)
    assert (first["commit"], first["changed"], first["evaluated"]) == (packed.commits[-1][0], True, True)
    assert (last["commit"], last["changed"], last["removed"]) == (first["commit"], False, [])
    assert before == {path.name: path.read_bytes() for path in (made / "out").iterdir()}
    changed = {name for name, data in before.items() if packed.files[name] != data}
    assert changed == {"README.md", "llmcompress.json"}
    assert set(packed.files) - set(before) == {".gitattributes", "report.html", "report.json"}
    assert "hashes" in found[2].out
    record = json.loads((tmp_path / "again" / "llmcompress.json").read_bytes())
    assert record["origin"]["repository"] == "acme/plain"
    assert record["origin"]["revision"] == plain.commits[-1][0]


def test_a_killed_push_leaves_no_commit_and_the_next_one_sends_the_rest(client: Client, made: Path) -> None:
    last = sorted((made / "out").glob("*.safetensors"))[-1]
    large = sum(bool(LARGE.fullmatch(path.name)) for path in (made / "out").iterdir())
    forge = client.forge
    forge.faults.append(Fault("PUT", sha256(last), "hang"))
    command = program("push", "out", "acme/killed", "-q")
    with subprocess.Popen(command, cwd=made, env=client.environment()) as process:
        assert forge.reached.wait(120)
        end = time.monotonic() + 60
        while len(forge.uploads) < large - 1 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [summary for _, summary, _ in forge.repos["acme/killed"].commits] == ["initial commit"]
    assert not [request for request in forge.requests if "/commit/" in request]
    forge.released.set()
    sent = list(forge.uploads)
    forge.faults[0].what = "die"
    words = ["push", "out", "acme/killed"]
    cut, _, done, again = client.run(words, ["forget"], words, words, folder=made)
    assert (cut.code, "run the same command again to go on" in cut.err) == (3, True), cut.err
    assert (done.code, "pushed  " in done.out) == (0, True), done.err
    assert (again.code, "unchanged  " in again.out) == (0, True), again.err
    assert len(forge.repos["acme/killed"].commits) == 2
    assert forge.uploads == [*sent, sha256(last)]


def sha256(path: Path) -> str:
    """Of a file."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_what_is_on_record_and_verifies_goes_and_nothing_private_goes_public(
    client: Client, made: Path, tmp_path: Path
) -> None:
    for name in ("damaged", "changed", "out", "out-eval"):
        shutil.copytree(made / name.replace("damaged", "out").replace("changed", "plain"), tmp_path / name)
    (tmp_path / "out" / ".env").write_text("secret")
    for name, file in (("damaged", "README.md"), ("changed", "config.json")):
        with (tmp_path / name / file).open("ab") as stream:
            stream.write(b" ")
    (tmp_path / "bare").mkdir()
    (tmp_path / "plain-eval").mkdir()
    report = json.loads((tmp_path / "out-eval" / "report.json").read_text())
    report["model"]["model_digest"] = "of others"
    (tmp_path / "plain-eval" / "report.json").write_text(json.dumps(report))
    quantized = ["quantize", made / "plain", "--budget", "4bits", "--calibration", made / "text.txt", *SMALL]
    commands = {
        "damaged": ["push", "damaged", "acme/damaged"],
        "changed": ["push", "changed", "acme/damaged"],
        "bare": ["push", "bare", "acme/damaged"],
        "nothing": ["push", "nothing", "acme/damaged"],
        "private": ["push", "out", "acme/x", "-v"],
        "public": ["push", "out", "acme/public", "--public"],
        "export": [
            "export",
            "out",
            "--format",
            "bf16",
            "--dtype",
            "float32",
            "-o",
            "plain",
            "--push",
            "acme/x",
            "--json",
        ],
        "others": ["push", "plain", "acme/x", "--report", "plain-eval"],
        "equal": ["push", "plain", "acme/x", "--report", "out-eval"],
        "verify": ["verify", "acme/x"],
        "original": ["quantize", "acme/x", "--budget", "4bits", "--push", "acme/X"],
        "alone": ["export", "out", "--format", "bf16", "--public"],
        "failed": [*quantized, "-o", "late", "--push", "acme/late"],
        "forget": ["forget"],
        "later": ["push", "late", "acme/late"],
    }
    client.forge.faults.append(Fault("POST", "acme/late/commit", 503))
    found = dict(zip(commands, client.run(*commands.values(), folder=tmp_path), strict=True))
    ends = {"damaged": 2, "changed": 2, "bare": 2, "nothing": 2, "others": 2, "original": 2, "alone": 2, "failed": 3}
    assert {name: each.code for name, each in found.items()} == {name: ends.get(name, 0) for name in commands}, found
    assert "README.md is not the file that was written" in found["damaged"].err
    assert "config.json is not the file that was written" in found["changed"].err
    assert "no record of ours" in found["bare"].err
    assert "1 file(s) that are not on record stay here: .env" in found["private"].err
    assert "the evaluation of other weights" in found["others"].err
    assert "plain-eval: the evaluation of other weights than those in plain; not put on the card" in found["export"].err
    assert "acme/X is the original" in found["original"].err
    assert "late is complete: llmcompress push late acme/late" in found["failed"].err
    assert "the card has no figures yet" in found["later"].out
    repos = client.forge.repos
    assert set(repos) == {"acme/x", "acme/public", "acme/late"}
    assert [len(repos[name].commits) for name in ("acme/x", "acme/public", "acme/late")] == [4, 2, 2]
    commits = [made for made, _, _ in repos["acme/x"].commits]
    assert client.forge.parents["acme/x"] == [None, *commits[1:3]]  # the first made the repository itself
    first, second, third = (files for _, _, files in repos["acme/x"].commits[1:])
    assert ".env" not in first
    assert {"report.html", "report.json", "scores.json", "llmcompress.json"} <= set(first)
    assert {"report.html", "report.json"} & set(repos["acme/public"].files) == set()
    assert "report.html" not in repos["acme/public"].files["README.md"].decode()
    assert "KL divergence, nats per token" in repos["acme/public"].files["README.md"].decode()
    assert set(json.loads(found["export"].out)["push"]["removed"]) == set(first) - set(second)
    assert {"llmcompress.json", "scores.json"} <= set(first) - set(second)
    assert "Not measured yet" in second["README.md"].decode()
    assert "these weights equal, bit for bit" in third["README.md"].decode()
    assert "report.html" in repos["acme/late"].files


# repository -> the fault on the way, the exit code, what is said, and the advice
REFUSED: dict[str, tuple[Fault | None, int, str, str]] = {
    "name": (None, 2, "not a repository name", "org/name"),
    "stranger/x": (None, 2, "stranger is neither you nor an organization of yours", "under acme or team"),
    "acme/rights": (Fault("POST", "acme/rights/preupload", 403, "No rights"), 2, "not allowed to write there", "token"),
    "acme/foreign": (None, 2, "has weights that llmcompress did not write: w.safetensors", "another name"),
    "acme/open": (None, 2, "exists and is public", "pass --public"),
    "acme/denied": (
        Fault("GET", "acme/denied", 401, "Invalid credentials in Authorization header"),
        2,
        "401",
        "HF_TOKEN",
    ),
    "acme/full": (
        Fault("POST", "acme/full.git", 403, "Private repository storage limit reached"),
        3,
        "no room",
        "billing",
    ),
    "acme/broken": (Fault("GET", "acme/broken", 500), 3, "cannot reach the hub", "check the network"),
    "acme/busy": (Fault("POST", "acme/busy/commit", 503), 3, "it answers with status 503", "what was uploaded stays"),
    "acme/many": (Fault("POST", "acme/many/preupload", 429), 3, "too many requests", "wait"),
    "acme/raced": (Fault("POST", "acme/raced/commit", 412), 3, "somebody else changed it", "look at it"),
    "acme/odd": (Fault("POST", "acme/odd/commit", 400, "no"), 3, "the hub refuses this (status 400)", "again"),
}


def test_every_refusal_ends_with_2_or_3_and_advice(client: Client, made: Path) -> None:
    forge = client.forge
    forge.repos["acme/foreign"] = Repo(True)
    forge.repos["acme/foreign"].commit("mine", {"w.safetensors": b"mine"})
    forge.repos["acme/open"] = Repo(False)
    forge.repos["acme/open"].commit("empty", {})
    forge.faults += [fault for fault, *_ in REFUSED.values() if fault is not None]
    found = client.run(*(["push", "out", name] for name in REFUSED), folder=made)
    for each, (name, (_, code, said, advice)) in zip(found, REFUSED.items(), strict=True):
        assert (name, each.code) == (name, code), each.err
        assert said in each.err, name
        assert advice in each.err.partition("hint:")[2], name
        assert "Traceback" not in each.err
        assert all(len(repo.commits) <= 1 for repo in forge.repos.values()), name
    assert client.run(["push", "out", "acme/x"], folder=made, HF_TOKEN="", HOME=str(made))[0].code == 2
    offline = client.run(["push", "out", "acme/x"], folder=made, HF_HUB_OFFLINE="1")[0]
    assert (offline.code, "unset HF_HUB_OFFLINE" in offline.err) == (3, True)
