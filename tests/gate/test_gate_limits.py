"""Limits: profiles, a file over them, flags over that; anything unclear is refused with the place named."""

from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.gate.limits import PROFILES, read_limits, share


@pytest.mark.parametrize(
    ("words", "value"), [("3%", 0.03), ("0.5 %", 0.005), ("0.03", 0.03), (0.2, 0.2), ("150%", 1.5)]
)
def test_shares(words: object, value: float) -> None:
    assert share(words) == pytest.approx(value)


@pytest.mark.parametrize("words", ["2", "1", 5, "0", "0%", "-1%", "three", "", "nan", "inf", "nan%", "1e9%"])
def test_what_is_no_share_is_refused(words: object) -> None:
    with pytest.raises(ValueError, match="write 3%"):
        share(words)


def test_flags_beat_the_file_and_the_file_beats_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("profile: aggressive\nmax_kld: 0.1\nmax_drop: 1%\nalpha: 0.01\nexpect:\n  tokens: abc\n")
    limits, tasks = read_limits(path, {"max_kld": 0.07, "alpha": None, "expect": None}, looks=3)
    assert (limits.profile, limits.max_kld, limits.max_drop, limits.max_ppl_increase) == (
        "aggressive",
        0.07,
        0.01,
        0.12,
    )
    assert (limits.alpha, limits.looks, limits.expect, tasks) == (0.01, 3, {"tokens": "abc"}, True)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_order_and_what_no_profile_leaves(profile: str) -> None:
    limits, tasks = read_limits(None, {"profile": profile})
    assert {name: getattr(limits, name) for name in PROFILES[profile]} == PROFILES[profile]
    assert not tasks
    if profile == "none":
        assert (limits.max_kld, limits.max_ppl_increase, limits.max_drop) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_klds: 0.1", "max_klds: no such key"),
        ("max_kld: -1", "max_kld"),
        ("max_kld: 1e-3", "max_kld"),
        ("max_drop: 2", "max_drop: 2 is out of range"),
        ("max_drop: 150%", "max_drop"),
        ("profile: strict", "profile"),
        ("profile: [1]", "profile"),
        ("alpha: 0.9", "alpha"),
        ("looks: 0", "looks"),
        ("expect: {text: abc}", "expect"),
        ("expect: {tokens: 12}", "expect.tokens"),
        ("- 1", "key: value"),
        ("max_kld: 0.1\nmax_kld: 0.2", "duplicate"),
        ("a: &x 1\nb: *x", "aliases"),
    ],
)
def test_bad_files_are_refused_with_the_place(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"gate\.yaml") as refusal:
        read_limits(path, {})
    assert words in refusal.value.what
    assert refusal.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere.yaml", "bytes.yaml"):
        with pytest.raises(InputError, match=name):
            read_limits(tmp_path / name, {})
