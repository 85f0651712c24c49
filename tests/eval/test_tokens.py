"""Figures of single tokens against slow oracles."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.eval import tokens as tally_module
from llmcompress.eval.fidelity import by_token
from llmcompress.eval.tokens import EDGES, Tally, by_position, histogram

TOKENS, VOCABULARY = 9, 17


class Letters:
    """Token 0 is `a`, 1 is `b`, and so on."""

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        return "".join(chr(97 + i) for i in ids)


def pair(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    p = torch.randn(rows, TOKENS, VOCABULARY, generator=source) * 2
    q = p + torch.randn(rows, TOKENS, VOCABULARY, generator=source)
    return p, q, torch.randint(VOCABULARY, (rows, TOKENS), generator=source)


def chances(logits: list[float], temperature: float = 1.0) -> list[float]:
    parts = [math.exp((v - max(logits)) / temperature) for v in logits]
    return [part / math.fsum(parts) for part in parts]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_likeliest_tokens_and_temperatures_equal_the_slow_oracle(seed: int) -> None:
    p, q, tokens = pair(seed, rows=1)
    (found,) = by_token(p, q, tokens, tops=(3, 8), temperatures=(0.25, 2.0))
    for t in range(TOKENS):
        left, right = p[0, t].tolist(), q[0, t].tolist()
        for row, temperature in enumerate((0.25, 2.0)):
            expected = kl(chances(left, temperature), chances(right, temperature))
            assert float(found.tempered[row, t]) == pytest.approx(expected, rel=1e-9)
        for row, k in enumerate((3, 8)):
            best, others = (sorted(range(VOCABULARY), key=lambda i: -side[i])[:k] for side in (left, right))
            assert float(found.overlap[row, t]) == pytest.approx(len(set(best) & set(others)) / k)
            expected = kl(chances([left[i] for i in best]), chances([right[i] for i in best]))
            assert float(found.restricted[row, t]) == pytest.approx(expected, rel=1e-9)


def test_small_changes_at_a_temperature_cost_what_the_expansion_says() -> None:
    """KL at a temperature = Var_p(dz) / (2 t^2) + O(dz^3), the variance under the tempered distribution."""
    source = torch.Generator().manual_seed(0)
    p = torch.randn(1, 40, 30, generator=source).double() * 3
    change = torch.randn(1, 40, 30, generator=source).double() * 1e-3
    temperatures = (0.3, 0.7, 1.0, 2.0)
    (found,) = by_token(p, p + change, torch.zeros(1, 40, dtype=torch.int64), temperatures=temperatures)
    for row, temperature in enumerate(temperatures):
        weights = torch.softmax(p[0] / temperature, -1)
        mean = (weights * change[0]).sum(-1, keepdim=True)
        variance = (weights * (change[0] - mean) ** 2).sum(-1)
        expected = float((variance / (2 * temperature**2)).mean())
        assert float(found.tempered[row].mean()) == pytest.approx(expected, rel=1e-2)


def test_facts_equal_what_a_loop_over_tokens_finds() -> None:
    p, q, tokens = pair(1)
    tally = Tally((1.0,))
    tally.add(p[:2], q[:2], tokens[:2])
    tally.add(p[2:], q[2:], tokens[2:])
    facts = tally.facts(Letters())
    klds = {(s, t): kl(chances(p[s, t].tolist()), chances(q[s, t].tolist())) for s in range(3) for t in range(TOKENS)}
    assert [(entry.sequence, entry.position) for entry in facts.worst] == sorted(klds, key=lambda at: -klds[at])[:10]
    assert [q.value for q in facts.kld_quantiles] == pytest.approx(
        [numpy.quantile(list(klds.values()), q.share) for q in facts.kld_quantiles]
    )
    assert [b.kld for b in facts.kld_by_position] == pytest.approx(
        [sum(klds[s, t] for s in range(3)) / 3 for t in range(TOKENS)]
    )
    assert {b.tokens for b in facts.kld_by_position} == {3}
    assert [top.k for top in facts.top] == [10]  # of 10, 50 and 100, what is less than the vocabulary
    by_hand = [sum(klds[s, t] for t in range(TOKENS)) / TOKENS for s in range(3)]
    assert tally.tempered()[0].kld.mean == pytest.approx(sum(by_hand) / 3)
    kinds = {"right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_wrong": 0, "changed": 0}
    for s in range(3):
        for t in range(TOKENS - 1):
            was, became, truth = int(p[s, t].argmax()), int(q[s, t].argmax()), int(tokens[s, t + 1])
            kinds["changed"] += was != became
            kinds["right_to_wrong"] += was == truth != became
            kinds["wrong_to_right"] += was != truth == became
            kinds["wrong_to_wrong"] += was != became and truth not in (was, became)
    assert facts.flips.tokens == 3 * (TOKENS - 1)
    assert {name: getattr(facts.flips, name) * facts.flips.tokens for name in kinds} == pytest.approx(kinds)
    gained = facts.flips.accuracy_candidate - facts.flips.accuracy_reference
    assert gained == pytest.approx(facts.flips.wrong_to_right - facts.flips.right_to_wrong)


def test_the_worst_tokens_are_shown_in_their_context() -> None:
    p, q, tokens = pair(2)
    p[1, 4] = q[1, 4] = 0.0
    p[1, 4, 3], q[1, 4, 5] = 9.0, 9.0  # one says d, the other f
    tally = Tally()
    tally.add(p, q, tokens)
    worst = tally.facts(Letters()).worst[0]
    assert (worst.sequence, worst.position) == (1, 4)
    assert worst.before == Letters().decode(tokens[1, :5].tolist(), False)
    assert worst.following == chr(97 + int(tokens[1, 5]))
    assert (worst.reference[0].text, worst.candidate[0].text) == ("d", "f")
    expected = math.exp(9) / (math.exp(9) + VOCABULARY - 1)
    assert worst.reference[0].probability == pytest.approx(expected)


def test_a_model_against_itself_shows_nothing() -> None:
    p, _, tokens = pair(3)
    tally = Tally((0.5,))
    tally.add(p, p.clone(), tokens)
    facts = tally.facts(Letters())
    assert {q.value for q in facts.kld_quantiles} | {b.kld for b in facts.kld_by_position} == {0.0}
    assert (facts.kld_histogram.below, sum(facts.kld_histogram.counts)) == (3 * TOKENS, 0)
    assert (facts.flips.changed, facts.top[0].overlap, facts.top[0].kld.mean) == (0.0, 1.0, 0.0)
    assert tally.tempered()[0].kld.mean == 0.0


def test_what_is_not_finite_comes_first_and_is_counted() -> None:
    p, q, tokens = pair(4)
    q[2, 6, 1] = math.nan
    tally = Tally()
    tally.add(p, q, tokens)
    facts = tally.facts(Letters())
    assert (facts.worst[0].sequence, facts.worst[0].position, facts.worst[0].kld) == (2, 6, None)
    assert facts.kld_histogram.not_finite == 1
    assert {q.value for q in facts.kld_quantiles} == {None}
    assert facts.kld_by_position[6].kld is None
    assert facts.kld_by_position[5].kld is not None


@given(st.lists(st.floats(-1e-12, 1e4), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_every_token_is_in_one_bin_of_the_histogram(values: list[float]) -> None:
    found = histogram(numpy.array([*values, math.inf]))
    assert found.not_finite == 1
    assert found.below == sum(v < EDGES[0] for v in values)
    assert found.above == sum(v >= EDGES[-1] for v in values)
    expected = [sum(a <= v < b for v in values) for a, b in itertools.pairwise(EDGES)]
    assert list(found.counts) == expected


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 100])
def test_bins_of_positions_cover_each_position_once(longest: int) -> None:
    klds = [numpy.arange(longest, dtype=float), numpy.arange(longest // 2, dtype=float)]
    found = by_position(klds)
    assert len(found) <= tally_module.POSITION_BINS
    assert [p for b in found for p in range(b.first, b.last + 1)] == list(range(longest))
    assert sum(b.tokens for b in found) == longest + longest // 2
    assert sum((b.kld or 0.0) * b.tokens for b in found) == pytest.approx(sum(k.sum() for k in klds))
