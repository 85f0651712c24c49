"""The two-width order of blocks: nested, within the budget, and filled up to the next block."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate.integer import InfeasibleError
from llmcompress.compress.allocate.order import first_blocks, two_widths
from llmcompress.errors import InputError

BLOCKS = st.lists(
    st.tuples(st.floats(-1, 1), st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=12
)  # importance, narrow bits, bits more


@given(BLOCKS, st.integers(0, 1500), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_the_longest_beginning_of_the_order_that_fits(
    blocks: list[tuple[float, int, int]], budget: int, more: int
) -> None:
    importance = [block[0] for block in blocks]
    low, high = [block[1] for block in blocks], [block[1] + block[2] for block in blocks]
    if sum(low) > budget:
        with pytest.raises(InfeasibleError) as caught:
            first_blocks(importance, low, high, budget)
        assert (caught.value.smallest, caught.value.largest) == (sum(low), sum(high))
        return
    wide = first_blocks(importance, low, high, budget)
    spent = sum(high[i] if i in wide else low[i] for i in range(len(blocks)))
    assert spent <= budget
    rest = [i for i in range(len(blocks)) if i not in wide]
    assert all(importance[i] >= importance[j] for i in wide for j in rest)
    if rest:
        following = min(rest, key=lambda i: (-importance[i], i))
        assert spent + high[following] - low[following] > budget
    assert first_blocks(importance, low, high, budget + more)[: len(wide)] == wide


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40, unique=True), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_equal_blocks_come_within_one_block_of_the_average(importance: list[float], share: float) -> None:
    count, weights, (narrow, wide) = len(importance), 1000, (2, 4)
    average = narrow + share * (wide - narrow)
    budget = int(average * weights * count)
    chosen = two_widths(importance, range(count), [(narrow * weights, wide * weights)] * count, budget)
    realised = sum(wide if one else narrow for one in chosen) / count
    assert realised <= average
    assert realised > average - (wide - narrow) / count - 1 / (weights * count)


def test_both_ends_and_the_example_of_forty_blocks() -> None:
    importance = [float(i % 7) for i in range(40)]
    costs = [(200, 400)] * 40
    assert two_widths(importance, range(40), costs, 40 * 200) == (0,) * 40
    assert two_widths(importance, range(40), costs, 40 * 400) == (1,) * 40
    assert sum(two_widths(importance, range(40), costs, 40 * 350)) == 30


def test_units_follow_their_block() -> None:
    chosen = two_widths([0.1, 0.9], [0, 1, 1, 0], [(1, 2), (1, 2), (10, 30), (5, 9)], 17 + 21 + 4)
    assert chosen == (0, 1, 1, 0)  # 4 bits are left, and block 0 asks for 5
    assert two_widths([0.1, 0.9], [0, 1, 1, 0], [(1, 2), (1, 2), (10, 30), (5, 9)], 17 + 21 + 5) == (1, 1, 1, 1)


def test_what_does_not_match_is_refused() -> None:
    with pytest.raises(InputError):
        two_widths([1.0], [1], [(1, 2)], 9)
    with pytest.raises(InputError):
        two_widths([1.0], [0, 0], [(1, 2)], 9)
    with pytest.raises(InputError):
        two_widths([1.0], [0], [(2, 1)], 9)
    with pytest.raises(InputError):
        first_blocks([1.0, 2.0], [1], [2], 9)
