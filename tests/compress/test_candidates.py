"""Pins and lists by name against an obvious oracle, and what spending makes of them, the head included."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.spend import (
    Ground,
    integer_program,
    narrow,
    narrower_widths,
    priced,
    spend,
    spend_by,
    with_widths,
)
from llmcompress.compress.candidates import broken, candidates_for, narrowed, resolve, sparing, unformatted
from llmcompress.errors import InputError
from llmcompress.recipes import PlanPart, load_recipe
from llmcompress.types import (
    BitAllocation,
    BlockTrace,
    Candidate,
    LayerScore,
    LinearInfo,
    LinearSpec,
    ModelTrace,
    Scores,
)

BITS = (2, 3, 4, 5, 6, 8)
OUTSIDE = 10_000  # bytes of the file that no linear takes


def linear(name: str, rows: int, unit: str, *, columns: int = 128) -> LinearInfo:
    return LinearInfo(name=name, tensor=f"{name}.weight", rows=rows, columns=columns, unit=unit, shared_input=0)


def toy(*, head: bool = True, blocks: int = 3) -> ModelTrace:
    """Blocks of {q, k}, {o} and {down}, whose 48 inputs fit no group size in block 0."""
    found = []
    for index in range(blocks):
        name = f"m.{index}"
        members = (
            linear(f"{name}.attn.q", 128, f"{name}#0"),
            linear(f"{name}.attn.k", 64, f"{name}#0"),
            linear(f"{name}.attn.o", 128, f"{name}#1"),
            linear(f"{name}.mlp.down", 128, f"{name}#2", columns=256 if index else 48),
        )
        found.append(BlockTrace(index=index, name=name, linears=members, norms=()))
    weights = sum(x.weights for b in found for x in b.linears)
    return ModelTrace(
        model_type="toy",
        blocks=tuple(found),
        head=linear("lm_head", 512, "lm_head") if head else None,
        parameters=weights + 512 * 128 + 5000,
        other_bytes=OUTSIDE,
        untraced_share=0,
    )


def part(**changes: object) -> PlanPart:
    return PlanPart.model_validate({"group_size": 64, **changes})


def widths(found: Mapping[str, tuple[LinearSpec, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(spec.bits for spec in specs) for name, specs in found.items()}


def test_without_rules_every_block_linear_has_the_recipe_widths() -> None:
    found = resolve(toy(), part(), False)
    assert found == candidates_for(toy(), BITS, 64)
    assert "m.0.mlp.down" not in found
    assert set(found) == {x.name for x in toy().linears} - {"m.0.mlp.down"}
    assert set(widths(found).values()) == {BITS}


def test_the_head_is_there_when_pinned_or_when_the_budget_counts_it() -> None:
    assert "lm_head" not in resolve(toy(), part(candidates={"lm_head": (4,)}), False)
    assert widths(resolve(toy(), part(), True))["lm_head"] == (4, 6, 8)
    assert widths(resolve(toy(), part(head_bits=(5,)), True))["lm_head"] == (5,)
    assert widths(resolve(toy(), part(candidates={"lm_*": (3, 4)}), True))["lm_head"] == (3, 4)
    assert "lm_head" not in resolve(toy(), part(head_bits=()), True)
    for whole_file in (False, True):
        assert widths(resolve(toy(), part(pin={"lm_head": 8}), whole_file))["lm_head"] == (8,)
        assert "lm_head" not in resolve(toy(head=False), part(), whole_file)


def named(name: str, full: str) -> bool:
    """The oracle's idea of a name; its patterns are `*.LAST` and `m.N.*`."""
    if name.startswith("*"):
        return full.endswith(name[1:])
    if name.endswith("*"):
        return full.startswith(name[:-1])
    return full == name or full.split(".")[-1] == name


NAMES = ("q", "k", "o", "down", "lm_head", "m.1.attn.k", "m.2.mlp.down", "*.q", "*.down", "m.1.*", "m.0.*")


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(2, 8), max_size=3),
    st.dictionaries(st.sampled_from(NAMES), st.sets(st.integers(2, 8), min_size=1), max_size=3),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_resolving_equals_asking_every_rule_about_every_member(
    pin: dict[str, int], lists: dict[str, set[int]], whole_file: bool
) -> None:
    trace = toy()
    plan = part(pin=pin, candidates={name: tuple(found) for name, found in lists.items()})
    expected: dict[str, tuple[int, ...]] = {}
    wrong = False
    for x in trace.every:
        fused = [other.name for other in trace.every if other.unit == x.unit]
        pins = {width for name, width in pin.items() if any(named(name, full) for full in fused)}
        allowed = [found for name, found in lists.items() if any(named(name, full) for full in fused)]
        wrong |= len(pins) > 1 or (bool(allowed) and not set.intersection(*allowed))
        usual = {4, 6, 8} if x.name == "lm_head" else set(BITS)
        chosen = pins or (set.intersection(*allowed) if allowed else usual)
        if (x.columns % 32 == 0) and (x.name != "lm_head" or pins or whole_file):
            expected[x.name] = tuple(sorted(chosen))
    if wrong:
        with pytest.raises(InputError):
            resolve(trace, plan, whole_file)
    else:
        assert widths(resolve(trace, plan, whole_file)) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pin": {"dwn": 8}}, "plan.pin.dwn: no linear of this model has that name"),
        ({"candidates": {"m.7.*": (4,)}}, r"plan.candidates.m.7.\*: no linear"),
        ({"pin": {"q": 4, "k": 5}}, "q=4, k=5 disagree"),
        ({"pin": {"*.o": 4, "m.1.attn.o": 5}}, "disagree about m.1.attn.o"),
        ({"candidates": {"q": (2, 3), "k": (4,)}}, "no width in common"),
        ({"pin": {"q": 9}}, r"plan.pin.q: \[9\]"),
        ({"candidates": {"q": (1, 4)}}, r"plan.candidates.q: \[1\]"),
        ({"candidates": {"q": ()}}, "plan.candidates.q: empty"),
        ({"head_bits": (16,)}, r"plan.head_bits: \[16\]"),
        ({"pin": {"m.0.mlp.down": 4}}, "48 inputs are not divisible"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        resolve(toy(), part(**changes), True)
    assert caught.value.hint


def test_a_tied_head_cannot_be_pinned_and_the_hint_says_why() -> None:
    with pytest.raises(InputError, match="lm_head: no linear") as caught:
        resolve(toy(head=False), part(pin={"lm_head": 8}), False)
    assert "no weight of its own" in caught.value.hint
    with pytest.raises(InputError) as caught:
        resolve(toy(), part(pin={"dwn": 8}), False)
    assert caught.value.hint == "did you mean down?"


def test_set_writes_pins_and_lists_of_full_names() -> None:
    recipe = load_recipe(
        "balanced",
        ("plan.pin.lm_head=8", "plan.pin.model.layers.0.mlp.down_proj=4", "plan.candidates.*.q_proj=[2, 3]"),
    )
    assert recipe.plan.pin == {"lm_head": 8, "model.layers.0.mlp.down_proj": 4}
    assert recipe.plan.candidates == {"*.q_proj": (2, 3)}
    assert load_recipe("balanced", ("plan.pin={o_proj: 8}",)).plan.pin == {"o_proj": 8}
    assert load_recipe("balanced").digest() != recipe.digest()


@pytest.mark.parametrize(
    "change",
    ["plan.pin.lm_head=9", "plan.pin.lm_head=[8]", "plan.candidates.x=[]", "plan.candidates.x=4", "plan.pin=4"],
)
def test_set_refuses_what_is_no_width(change: str) -> None:
    with pytest.raises(InputError, match="plan"):
        load_recipe("balanced", (change,))


def test_narrowing_leaves_a_pinned_linear_its_width() -> None:
    found = widths(narrowed(resolve(toy(), part(pin={"o": 8}), True), (3, 4)))
    assert (found["m.1.attn.o"], found["m.1.attn.q"], found["lm_head"]) == ((8,), (3, 4), (4,))


def scores_of(candidates: Mapping[str, tuple[LinearSpec, ...]], seed: int = 0) -> Scores:
    source = random.Random(seed)
    layers = []
    for name, specs in candidates.items():
        weight = 10 ** source.uniform(-3, 0)
        found = tuple(Candidate(spec=spec, damage=weight * 4.0**-spec.bits) for spec in specs)
        layers.append(LayerScore(linear=name, candidates=found))
    return Scores(
        scorer="toy", unit="nats/token", model_digest="m", calibration_digest="c", seed=0, layers=tuple(layers)
    )


def without_head(scores: Scores) -> Scores:
    return scores.model_copy(update={"layers": tuple(x for x in scores.layers if x.linear != "lm_head")})


def file_bytes(specs: Mapping[str, LinearSpec]) -> int:
    sizes = {x.name: (x.rows, x.columns) for x in toy().every}
    return OUTSIDE + sum(spec.storage_bits(*sizes[name]) for name, spec in specs.items()) // 8


def spent(text: str, plan: PlanPart, *, scored: bool = True, seed: int = 0) -> BitAllocation:
    trace, budget = toy(), parse_budget(text)
    allowed = resolve(trace, plan, budget.kind != "linears")
    scores = scores_of(allowed, seed)
    scores = scores if scored else without_head(scores)
    return spend(trace, scores, budget, group_size=64, file_bytes=file_bytes, candidates=allowed)


def bits_of(found: BitAllocation) -> dict[str, int]:
    return {a.linear: a.spec.bits for a in found.assigned}


@given(st.integers(85_000, 280_000), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_byte_budgets_hold_with_the_head_as_a_candidate(size: int, seed: int, scored: bool) -> None:
    try:
        found = spent(f"{size}B", part(), scored=scored, seed=seed)
    except InputError as error:
        again = spent(error.what.rsplit(" ", 1)[-1], part(), scored=scored, seed=seed)
        assert set(bits_of(again).values()) == {2, 4}
        assert again.file_bytes > size
        return
    assert found.file_bytes <= size
    assert found.file_bytes == file_bytes({a.linear: a.spec for a in found.assigned})
    assert found.file_bytes > size * 0.99 or found.under_budget_reason
    assert bits_of(found)["lm_head"] in (4, 6, 8)
    assert [f.where for f in found.fallbacks] == ([] if scored else ["lm_head"])


def test_an_unscored_head_gets_8_bits_or_as_many_as_there_is_room_for() -> None:
    head = {8: 0, 6: 0, 4: 0}
    for size in range(95_000, 150_000, 1000):
        try:
            found = spent(f"{size}B", part(), scored=False)
        except InputError:
            continue
        bits = bits_of(found)["lm_head"]
        head[bits] += 1
        assert found.fallbacks[-1].reason == f"not scored by toy: {bits} bits"
        wider = [width for width in (6, 8) if width > bits]
        least = {name: 2 for name in bits_of(found) if name != "lm_head"}
        for width in wider:  # one more would not have fitted, even with 2 bits for everything else
            specs = {n: LinearSpec(bits=b, group_size=64) for n, b in (least | {"lm_head": width}).items()}
            assert file_bytes(specs) > size
    assert all(head.values())


def test_a_head_that_fits_no_group_is_kept_and_said_where_the_budget_counts_it() -> None:
    trace = toy().model_copy(update={"head": linear("lm_head", 512, "lm_head", columns=72)})
    for text, heads in (("100kB", ["lm_head"]), ("4bits", [])):
        budget = parse_budget(text)
        allowed = resolve(trace, part(), budget.kind != "linears")
        more = {"group_size": 64, "file_bytes": file_bytes, "candidates": allowed}
        kept = spend(trace, scores_of(allowed), budget, **more).kept
        assert [k.linear for k in kept] == ["m.0.mlp.down", *heads]
        assert all("are not divisible" in k.reason for k in kept)


def test_every_linear_without_a_format_is_said_the_true_reason() -> None:
    trace = toy()
    allowed = resolve(trace, part(), False)
    first, *_ = [x for x in trace.linears if x.name in allowed]
    mates = [x.name for x in trace.linears if x.unit == first.unit and x.name != first.name]
    refused = next(name for name in allowed if name not in (first.name, *mates))
    fitted = {name: specs for name, specs in allowed.items() if name != refused}
    said = unformatted(trace, allowed, fitted, "vllm") | broken(trace, [first.tensor])
    assert mates
    assert said == {
        "m.0.mlp.down": narrow(next(x for x in trace.linears if x.name == "m.0.mlp.down")),
        refused: "vllm takes no format of it",
        first.name: "NaN or infinity in its weights",
        **dict.fromkeys(mates, f"shares its format with {first.name}, which has NaN or infinity"),
    }
    left = sparing(fitted, said)
    assert set(left) == set(allowed) - {refused, first.name, *mates}
    ground = Ground(64, file_bytes, left, said)
    kept = spend_by(integer_program, trace, scores_of(allowed), parse_budget("4bits"), ground=ground).kept
    assert {k.linear: k.reason for k in kept} == said
    alone = spend_by(integer_program, trace, scores_of(left), parse_budget("4bits"), ground=Ground(64, file_bytes)).kept
    assert {k.linear for k in alone} == set(said)
    assert {k.reason for k in alone} == {"there is no score for it", said["m.0.mlp.down"]}


def test_a_budget_over_the_linears_counts_the_head_only_when_pinned() -> None:
    trace = toy()
    blocks = sum(x.weights for x in trace.linears if x.name != "m.0.mlp.down")
    plain, pinned = spent("4bits", part()), spent("4bits", part(pin={"lm_head": 8}), scored=False)
    assert "lm_head" not in bits_of(plain)
    assert plain.storage_bits / plain.bits_per_weight == pytest.approx(blocks)
    assert bits_of(pinned)["lm_head"] == 8
    assert pinned.storage_bits / pinned.bits_per_weight == pytest.approx(blocks + 512 * 128)
    assert pinned.bits_per_weight <= 4
    assert not pinned.fallbacks  # what was asked for was done


def test_pins_outlive_narrower_widths_and_scores_that_lack_them() -> None:
    plan = part(pin={"q": 8, "lm_head": 5}, bits=(2, 3, 4))
    trace, allowed = toy(), resolve(toy(), plan, True)
    scores = scores_of(allowed)
    best = spend(trace, scores, parse_budget("180kB"), group_size=64, file_bytes=file_bytes, candidates=allowed)
    for fewer in narrower_widths(best, plan.bits, trace):
        narrow = with_widths(scores, fewer)
        found = spend(trace, narrow, parse_budget("180kB"), group_size=64, file_bytes=file_bytes, candidates=allowed)
        bits = bits_of(found)
        assert {bits[f"m.{i}.attn.{x}"] for i in range(3) for x in "qk"} == {8}
        assert bits["lm_head"] == 5
        assert {b for n, b in bits.items() if n.endswith(("o", "down"))} <= set(fewer)
        assert priced(found, scores, best).expected_damage >= best.lower_bound * (1 - 1e-9)
    unpinned = scores_of(resolve(trace, part(bits=(2, 3, 4)), True))  # made before anything was pinned
    late = spend(trace, unpinned, parse_budget("180kB"), group_size=64, file_bytes=file_bytes, candidates=allowed)
    assert bits_of(late)["m.0.attn.k"] == 8
    assert not late.fallbacks
    assert priced(late, unpinned, late).expected_damage == pytest.approx(late.expected_damage)
    assert late.expected_damage > 0
