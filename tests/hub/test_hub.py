"""MODEL words become local directories: a stub hub on this machine says what is asked of it, and how it may fail."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hub_stub import CARD, FIRST, SECOND, SECRET, TAGGED, WANTED, Stub, running_stub

from llmcompress.compress import journal
from llmcompress.errors import InputError
from llmcompress.hub import push
from llmcompress.hub import source as hub
from llmcompress.hub.refusals import explain
from llmcompress.hub.source import Source, aliases, known_words, resolve


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """A stub hub, and an empty cache."""
    with running_stub(tmp_path / "home") as running:
        yield running


def contents(folder: str) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_branch_is_pinned_to_its_commit_and_only_wanted_files_are_fetched(stub: Stub) -> None:
    found = stub.resolve("acme/tiny", "acme/tiny@dev/next", f"acme/tiny@{TAGGED}", HF_TOKEN=SECRET)
    for word, commit in (("acme/tiny", FIRST), ("acme/tiny@dev/next", SECOND), (f"acme/tiny@{TAGGED}", TAGGED)):
        source = found[word]
        assert source.get("what") is None
        assert (source["name"], source["repository"]) == ("acme/tiny", "acme/tiny")
        assert (source["revision"], source["license"]) == (commit, "apache-2.0")
        assert contents(source["path"]) == WANTED
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path in stub.answers.requested if "/resolve/" in path}
    assert {name.replace("%2F", "/") for name in fetched} == set(WANTED)
    assert stub.answers.authorizations == {(False, f"Bearer {SECRET}"), (True, None)}


def test_offline_finds_what_was_fetched_and_asks_nothing(stub: Stub) -> None:
    online = stub.resolve("acme/tiny")["acme/tiny"]
    stub.answers.branches["main"] = SECOND  # the branch moves on
    stub.answers.requested.clear()
    words = ("acme/tiny", f"acme/tiny@{FIRST}", "acme/tiny@v1", "acme/other")
    offline = stub.resolve(*words, HF_HUB_OFFLINE="1")
    assert offline[words[0]] == offline[words[1]] == online
    for word in words[2:]:
        assert offline[word]["kind"] == "MachineError"
        assert offline[word]["what"].startswith(f"{word}: not in the hub cache")
        assert "unset HF_HUB_OFFLINE" in offline[word]["hint"]
    assert stub.answers.requested == []

    assert stub.resolve("acme/tiny")["acme/tiny"]["revision"] == SECOND
    assert stub.resolve("acme/tiny", HF_HUB_OFFLINE="1")["acme/tiny"]["revision"] == SECOND

    (Path(online["path"]) / "tokenizer.json").unlink()
    partial = stub.resolve(f"acme/tiny@{FIRST}", HF_HUB_OFFLINE="1")[f"acme/tiny@{FIRST}"]
    assert partial["kind"] == "MachineError"
    assert "only partly in the hub cache" in partial["what"]


REFUSALS = {
    "acme/gated": ("InputError", "acme/gated: access is gated", "licence at https://huggingface.co/acme/gated and set"),
    "acme/sealed": ("InputError", "acme/sealed: access is gated", "HF_TOKEN"),
    "acme/none": ("InputError", "no such model on the hub (or it is private): acme/none", "HF_TOKEN"),
    "huggyllama/lama-7b": ("InputError", "no such model on the hub", "did you mean huggyllama/llama-7b"),
    "acme/tiny@v9": ("InputError", "acme/tiny: no such revision: v9", "a branch, a tag or a commit"),
    "acme/tiny@" + "9" * 40: ("InputError", "acme/tiny: no such revision: 999", "a branch, a tag or a commit"),
    "acme/a--b": ("InputError", "not a repository name: acme/a--b", "org/name[@revision]"),
    "acme/pickled": ("InputError", "acme/pickled: no safetensors weights among its 3 files", "acme/pickled@refs/pr/"),
    "acme/token": ("InputError", "acme/token: the hub refuses access (status 401)", "HF_TOKEN"),
    "acme/forbidden": ("InputError", "acme/forbidden: the hub refuses access (status 403)", "HF_TOKEN"),
    "acme/limited": ("MachineError", "acme/limited: too many requests", "wait a few minutes"),
    "acme/broken": ("MachineError", "cannot reach the hub at 127.0.0.1", "HF_HUB_OFFLINE=1"),
    "acme/busy": ("MachineError", "acme/busy: it answers with status 503", "check the network"),
    "acme/flaky": ("MachineError", "acme/flaky: it answers with status 503", "check the network"),
    "acme/cut": ("MachineError", "for acme/cut: peer closed connection", "check the network"),
    "acme/portal": ("MachineError", "cannot fetch acme/portal", "run the same command again"),
}


def test_every_refusal_says_what_to_do(stub: Stub) -> None:
    found = stub.resolve(*REFUSALS, HF_TOKEN=SECRET)
    for word, (kind, what, hint) in REFUSALS.items():
        assert (word, found[word].get("kind")) == (word, kind)
        assert what in found[word]["what"]
        assert hint in found[word]["hint"]
        assert "\n" not in found[word]["what"] + found[word]["hint"]
    asked = [path for path in stub.answers.requested if "acme/pickled" in path]
    assert len(asked) == 1  # looked up, and nothing fetched


def test_a_hub_out_of_reach_is_an_error_even_when_an_older_snapshot_is_cached(stub: Stub) -> None:
    stub.resolve("acme/tiny")
    for endpoint in ("http://someone:password@127.0.0.1:9", "127.0.0.1:9"):  # nobody listens; no scheme
        words = ("acme/tiny", f"acme/tiny@{FIRST}")
        branch, commit = stub.resolve(*words, HF_ENDPOINT=endpoint).values()
        assert branch["kind"] == "MachineError"
        assert branch["what"].startswith("cannot reach the hub at ")
        assert branch["hint"] == "check the network; or set HF_HUB_OFFLINE=1 to use what is cached"
        assert "password" not in branch["what"]
        assert commit["revision"] == FIRST  # a cached commit cannot be out of date


def test_a_silent_hub_and_a_cache_that_cannot_be_written_are_failures_of_the_machine(stub: Stub) -> None:
    found = stub.resolve("acme/hung", HF_HUB_DOWNLOAD_TIMEOUT="1")["acme/hung"]
    assert found["kind"] == "MachineError"
    assert found["what"].startswith("cannot reach the hub at 127.0.0.1")
    assert "timed out" in found["what"]
    stub.home.parent.joinpath("file").write_text("in the way")
    found = stub.resolve("acme/tiny", HF_HOME=str(stub.home.parent / "file"))["acme/tiny"]
    assert found["kind"] == "MachineError"
    assert found["what"] == "cannot store acme/tiny in the hub cache: Not a directory"
    assert "HF_HOME" in found["hint"]


def test_a_malformed_token_is_not_repeated(stub: Stub) -> None:
    for odd in "\x0bé":
        found = stub.resolve("acme/tiny", HF_TOKEN=f"{SECRET}{odd}{SECRET}")["acme/tiny"]
        assert (found["kind"], found["what"]) == ("InputError", "HF_TOKEN holds a character that no token has")


def test_an_alias_stands_for_its_repository(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stub.resolve("llama-7b", "Llama-2-7B@v9", HF_HUB_OFFLINE="1")
    assert found["llama-7b"]["what"].startswith("huggyllama/llama-7b: not in the hub cache")
    assert found["Llama-2-7B@v9"]["what"].startswith("meta-llama/Llama-2-7b-hf@v9: not in the hub cache")
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None) -> Source:
        asked.append((repository, revision))
        return Source(Path(), repository, repository)

    monkeypatch.setattr(hub, "_download", download)
    assert [resolve(alias).repository for alias, _ in aliases()] == [repository for _, repository in aliases()]
    assert asked == [(repository, None) for _, repository in aliases()]


def test_the_known_words_are_the_demo_and_unique_short_names() -> None:
    words = known_words()
    assert words == ("demo", *(alias for alias, _ in aliases()))
    assert len(set(words)) == len(words) >= 31
    assert all(word == word.lower() and "/" not in word and "@" not in word for word in words)
    assert all(hub.REPOSITORY.fullmatch(repository) for _, repository in aliases())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few models in it."""
    for name in ("models/tiny", "models/large", "my-model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("word", ["models/tiny", "./models/tiny", "models/../models/tiny/", "{here}/models/tiny"])
def test_a_directory_is_taken_as_it_is(here: Path, word: str) -> None:
    assert resolve(word.format(here=here)) == Source(here / "models" / "tiny", "tiny")


def test_a_directory_is_called_what_the_user_calls_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "latest").symlink_to(here / "my-model")
    assert resolve("latest").name == "latest"
    monkeypatch.setenv("HOME", str(here))
    assert resolve("~/my-model") == Source(here / "my-model", "my-model")
    monkeypatch.chdir(here / "my-model")
    assert resolve(".") == Source(here / "my-model", "my-model")
    assert resolve("..").name == here.name
    (here / "my-model" / "gpt2").mkdir()
    assert resolve("gpt2").repository is None


@pytest.mark.parametrize(
    ("word", "what", "hint"),
    [
        ("lama-7b", "unknown model: lama-7b", "did you mean llama-7b"),
        ("Qwen3_8B", "unknown model: Qwen3_8B", "qwen3-8b"),
        ("dmo", "unknown model: dmo", "demo"),
        ("my-modle", "unknown model: my-modle", "my-model"),
        ("zzzzzz", "unknown model: zzzzzz", "`llmcompress list models`"),
        ("", "unknown model: ", "`llmcompress list models`"),
        ("https://huggingface.co/a/b", "unknown model: https://huggingface.co/a/b", "org/name[@revision]"),
        ("acme/tiny@../../../x", "unknown model: acme/tiny@../../../x", "org/name[@revision]"),
        ("acme/tiny@/etc/x", "unknown model: acme/tiny@/etc/x", "org/name[@revision]"),
        ("acme/tiny@", "unknown model: acme/tiny@", "org/name[@revision]"),
        ("a/b/c", "unknown model: a/b/c", "org/name[@revision]"),
        ("./modles/tiny", "no such model directory: ./modles/tiny", "did you mean models/tiny?"),
        ("./modles/huge", "no such model directory: ./modles/huge", "did you mean models?"),
        ("./models/tiny1", "no such model directory: ./models/tiny1", "did you mean models/tiny?"),
        ("/nowhere/at/all", "no such model directory: /nowhere/at/all", "check the path"),
        ("./" + "x" * 5000, "no such model directory", "check the path"),
        ("./a\0b", "no such model directory", "check the path"),
        ("models/config.json", "models/config.json: a file, not a model directory", "config.json"),
    ],
)
def test_near_misses_are_answered_with_the_nearest_names(here: Path, word: str, what: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(word)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_missing_repository_with_a_slip_in_a_local_path_names_the_path(stub: Stub, here: Path) -> None:
    found = stub.resolve("modles/tiny")["modles/tiny"]
    assert found["kind"] == "InputError"
    assert "did you mean models/tiny?" in found["hint"]


def test_the_demo_is_the_packaged_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / package)
    with pytest.raises(InputError, match="demo model is not installed"):
        resolve("demo")
    folder = tmp_path / "llmcompress" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="demo model is not installed"):
        resolve("demo")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "README.md").write_text(CARD)
    assert resolve("demo") == Source(folder, "demo", license="apache-2.0")


def test_a_user_without_a_home_is_told_what_to_set() -> None:
    with pytest.raises(RuntimeError) as found:
        Path("~nobody-of-this-name/x").expanduser()
    assert explain("org/name", None, found.value).hint == "let HF_HOME name a directory"


def test_what_our_outputs_say_of_themselves_is_fetched_and_known_as_ours() -> None:
    assert set(journal.RECORDS) <= set(hub.MODEL_FILES)
    assert set(journal.RECORDS) - set(push.RECORDS) == {"rewriting.json"}  # which lists no files: it is not pushed


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("license: mit\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_alone(tmp_path: Path, card: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert resolve(str(tmp_path)).license == expected
