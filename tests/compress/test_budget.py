"""What `--budget` understands, and what it answers to everything else."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.compress.allocate.budget import FORMS, Budget, parse_budget
from llmcompress.errors import InputError


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("kld<=0.05", "kld", 0.05),
        ("KLD <= 0.05", "kld", 0.05),
        ("kld<=5e-2", "kld", 0.05),
        (" kld <=.05 ", "kld", 0.05),
        ("ppl<=+2%", "ppl", 0.02),
        ("ppl<=2%", "ppl", 0.02),
        ("ppl<=+2.5 %", "ppl", 0.025),
        ("PPL <= + 150%", "ppl", 1.5),
    ],
)
def test_limits_of_damage_are_read(text: str, kind: str, amount: float) -> None:
    found = parse_budget(text)
    assert (found.kind, found.amount) == (kind, pytest.approx(amount))
    assert found.measured
    assert found.text == text.strip()


@pytest.mark.parametrize("text", ["3.5bits", "3.5bits/file", "4GiB"])
def test_sizes_are_not_measured(text: str) -> None:
    assert not parse_budget(text).measured


@pytest.mark.parametrize(
    "text",
    ["kld", "kld<=", "kld<0.05", "kld>=0.05", "kld=0.05", "kld<=0", "kld<=-1", "kld<=nan", "kld<=inf", "kld<=1e999",
     "kld<=11", "kld<=1e-9", "kld<=5%", "kld<=+0.05", "kld<=0.05bits", "ppl<=2", "ppl<=+2", "ppl<=+0%", "ppl<=-2%",
     "ppl<=+1001%", "ppl<=+1e99%", "ppl<=", "ppl", "ppl<=+2%%", "kld<=0.05/file", "9" * 400 + "B", "kld<=٥"],
)  # fmt: skip
def test_bad_limits_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_budget(text)
    assert caught.value.hint == FORMS
    for form in ("3.5bits", "3.5bits/file", "4.2GB", "kld<=0.05", "ppl<=+2%"):
        assert form in caught.value.hint


@given(st.floats(1e-6, 10))
def test_every_limit_in_range_is_kept_exactly(amount: float) -> None:
    assert parse_budget(f"kld<={amount!r}") == Budget(f"kld<={amount!r}", "kld", amount)


@given(st.sampled_from(["kld", "ppl", "kld<=", "ppl<=+", ""]), st.text("0123456789.e+-% <=bitsGB/fl", max_size=12))
def test_any_text_is_a_finite_budget_or_an_input_error(start: str, rest: str) -> None:
    with contextlib.suppress(InputError):
        found = parse_budget(start + rest)
        assert math.isfinite(found.amount)
        assert found.amount >= 0
        assert found.amount > 0 or found.kind == "bytes"
