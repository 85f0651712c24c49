"""The judge's numbers against slow oracles and laws."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import InputError
from llmcompress.eval import fidelity
from llmcompress.eval.fidelity import compare, evaluate


def logits(seed: int, shape: tuple[int, ...] = (2, 7, 11), size: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def slow_kl(p_logits: list[float], q_logits: list[float]) -> float:
    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        parts = [math.exp(v - top) for v in values]
        return [part / math.fsum(parts) for part in parts]

    p, q = softmax(p_logits), softmax(q_logits)
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(st.integers(0, 1000), st.floats(0.1, 6.0))
@settings(max_examples=40, deadline=None)
def test_every_figure_equals_the_slow_oracle(seed: int, size: float) -> None:
    p, q = logits(seed, size=size), logits(seed + 1, size=size)
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(seed))
    for row, found in enumerate(compare(p, q, tokens)):
        klds = [slow_kl(p[row, t].tolist(), q[row, t].tolist()) for t in range(7)]
        assert found.kld == pytest.approx(math.fsum(klds) / 7, rel=1e-9)
        assert found.kld >= 0
        assert found.kld_largest == pytest.approx(max(klds))
        assert found.kld_spread == pytest.approx(torch.tensor(klds, dtype=torch.float64).var(correction=0).item())
        nll = torch.nn.functional.cross_entropy(q[row, :-1].double(), tokens[row, 1:])
        assert found.nll_candidate == pytest.approx(float(nll))
        same = [int(p[row, t].argmax() == q[row, t].argmax()) for t in range(7)]
        assert found.top1 == pytest.approx(sum(same) / 7)
        assert found.finite


def test_a_model_against_itself() -> None:
    p = logits(0)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    for found in compare(p, p.clone(), tokens):
        assert (found.kld, found.top1, found.nll_candidate - found.nll_reference) == (0.0, 1.0, 0.0)


def test_shifting_all_logits_of_a_position_changes_nothing() -> None:
    p, q = logits(1), logits(2)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    moved = compare(p + 3.0, q - logits(5, (2, 7, 1)), tokens)
    for one, two in zip(compare(p, q, tokens), moved, strict=True):
        assert one.kld == pytest.approx(two.kld, rel=1e-5)


def test_small_changes_cost_half_their_variance() -> None:
    """KL = Var_p(dz) / 2 + O(dz^3)."""
    p, change = logits(3).double(), logits(4).double() * 5e-4
    chances = torch.softmax(p, -1)
    mean = (chances * change).sum(-1, keepdim=True)
    expected = ((chances * (change - mean) ** 2).sum(-1) / 2).mean(-1)
    found = compare(p, p + change, torch.zeros(2, 7, dtype=torch.int64))
    assert [f.kld for f in found] == pytest.approx(expected.tolist(), rel=1e-2)


def test_half_precision_logits_are_widened_before_anything_else() -> None:
    p, q = logits(6).bfloat16(), logits(7).bfloat16()
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    assert compare(p, q, tokens) == compare(p.double(), q.double(), tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("position", [3, 6])
def test_non_finite_logits_are_said(value: float, sides: tuple[int, ...], position: int) -> None:
    pair = logits(9), logits(8)
    for side in sides:
        pair[side][1, position, 2] = value
    good, bad = compare(*pair, torch.zeros(2, 7, dtype=torch.int64))
    assert (good.finite, bad.finite) == (True, False)


def test_an_impossible_token_is_said_even_where_the_reference_never_picks_it() -> None:
    p, q = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    p[0, 0, 1], q[0, 0, 1] = -1e4, -math.inf
    assert not compare(p, q, torch.zeros(1, 2, dtype=torch.int64))[0].finite


def test_ties_go_to_the_lowest_index_on_both_sides() -> None:
    p, q = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    p[0, :, 1:3] = 1.0  # prefers 1, tied with 2
    q[0, 0, 1:] = 1.0  # prefers 1, tied with 2 and 3
    q[0, 1, 2] = 1.0  # prefers 2 alone
    assert compare(p, q, torch.zeros(1, 2, dtype=torch.int64))[0].top1 == 0.5


@pytest.mark.parametrize("chunk_logits", [1, 11, 35])
def test_the_size_of_the_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk_logits: int) -> None:
    p, q, tokens = logits(1), logits(2), torch.arange(14).reshape(2, 7) % 11
    whole = compare(p, q, tokens)
    monkeypatch.setattr(fidelity, "CHUNK_LOGITS", chunk_logits)
    assert compare(p, q, tokens) == whole


def test_streams_give_what_their_batches_give() -> None:
    p, q = (logits(1), logits(3)), (logits(2), logits(4))
    tokens = torch.zeros(2, 7, dtype=torch.int32)
    found = evaluate(iter(p), iter(q), [tokens, tokens])
    assert list(found) == compare(p[0], q[0], tokens) + compare(p[1], q[1], tokens.long())


def test_unequal_vocabularies_and_lengths_are_refused() -> None:
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(InputError):
        compare(logits(0), logits(1, (2, 7, 12)), tokens)
    with pytest.raises(InputError, match="token ids"):
        compare(logits(0), logits(1), tokens[:, :6])
    with pytest.raises(InputError, match="token ids"):
        compare(logits(0)[0], logits(1)[0], torch.zeros(7, 11, dtype=torch.int64))
    with pytest.raises(InputError, match="different numbers of batches"):
        evaluate([logits(0)], [logits(1), logits(2)], [tokens, tokens])
    with pytest.raises(InputError, match="different numbers of batches"):
        evaluate([logits(0)] * 2, [logits(1)] * 2, [tokens])


@pytest.mark.parametrize("length", [0, 1])
def test_without_a_next_token_there_is_nothing_to_predict(length: int) -> None:
    one = logits(0, (2, length, 11))
    with pytest.raises(InputError, match="no next token"):
        compare(one, one, torch.zeros(2, length, dtype=torch.int64))


@pytest.mark.parametrize("identifier", [-1, 11])
def test_a_token_id_outside_the_vocabulary_is_refused(identifier: int) -> None:
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    tokens[1, 4] = identifier
    with pytest.raises(InputError, match="vocabulary of 11"):
        compare(logits(0), logits(1), tokens)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(InputError, match="no sequences"):
        evaluate([], [], [])


def test_a_fault_inside_a_stream_is_not_taken_for_a_short_one() -> None:
    def faulty() -> Iterator[torch.Tensor]:
        yield logits(0)
        raise ValueError("the stream broke")

    tokens = torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="the stream broke"):
        evaluate(faulty(), [logits(1), logits(2)], [tokens, tokens])
