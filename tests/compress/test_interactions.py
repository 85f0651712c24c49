"""The Gram of measured changes, and the programs as `spend` takes them."""

from pathlib import Path

import numpy
import pytest
import torch
from scoring_help import job_for, scored
from test_allocate import toy_scores, toy_trace

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.spend import Ground, integer_program, spend_by, with_widths
from llmcompress.compress.gram import GramJudge, error_vectors, measure_gram, measure_pairs
from llmcompress.compress.measuring import MeasureJob, Noise, Text
from llmcompress.compress.programs import block_importance, block_order, interactions, quadratic
from llmcompress.compress.quantizers import rtn
from llmcompress.compress.swaps import measure_swaps
from llmcompress.errors import InputError
from llmcompress.types import BitAllocation, LayerScore, LinearSpec, QuantizerOptions, Scores


def test_half_the_gram_is_the_divergence_of_small_changes(llama: Path) -> None:
    """`1/2 x^T G x` against the measured KL, of one change and of two together, as changes get small."""
    job = job_for(llama)
    measuring = MeasureJob(job.skeleton, job.trace, rtn, QuantizerOptions(), torch.bfloat16)
    names = [job.trace.linears[0].name, job.trace.linears[9].name]
    singles = [{name: Noise(0.01, place)} for place, name in enumerate(names)]
    both = {**singles[0], **singles[1]}
    rows = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(5))
    text = Text([], [rows])
    gram = measure_gram(measuring, singles, text=text, memory_bytes=1 << 30)
    klds = measure_swaps(measuring, {}, [*singles, both], text=text, memory_bytes=1 << 30)[1:].mean(1)
    assert gram[0, 0] / 2 == pytest.approx(float(klds[0]), rel=0.05)
    assert gram[1, 1] / 2 == pytest.approx(float(klds[1]), rel=0.05)
    assert gram.sum() / 2 == pytest.approx(float(klds[2]), rel=0.06)
    assert numpy.linalg.eigvalsh(gram).min() > -1e-12


def test_measured_pairs_are_the_rise_beyond_the_singles(llama: Path) -> None:
    job = job_for(llama)
    measuring = MeasureJob(job.skeleton, job.trace, rtn, QuantizerOptions(), torch.bfloat16)
    linears = [job.trace.linears[0], job.trace.linears[3], job.trace.linears[9]]
    variants = [{x.name: LinearSpec(bits=bits, group_size=64)} for x in linears for bits in (2, 3)]
    units = [x.unit for x in linears for _ in range(2)]
    text = Text([], [torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(6))])
    found = measure_pairs(measuring, variants, units, text=text, memory_bytes=1 << 30)
    both = {**variants[1], **variants[2]}
    klds = measure_swaps(measuring, {}, [variants[1], variants[2], both], text=text, memory_bytes=1 << 30).mean(1)
    assert found[1, 1] == pytest.approx(2 * float(klds[1]))
    assert found[1, 2] == found[2, 1] == pytest.approx(float(klds[3] - klds[1] - klds[2]))
    assert found[0, 1] == 0  # two widths of one unit never meet


def test_error_vectors_keep_inner_products_when_unlikely_tokens_share_a_bucket() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 300, generator=generator)
    p = torch.log_softmax(logits, -1)
    changes = [torch.log_softmax(logits + 0.01 * torch.randn(20, 300, generator=generator), -1) for _ in range(2)]
    whole = [error_vectors(p, q, 300) for q in changes]
    assert whole[0].shape == (20, 300)
    for kept in (60, 200):
        short = [error_vectors(p, q, kept) for q in changes]
        assert short[0].shape == (20, kept + 1)
        assert float(short[0].square().sum()) <= float(whole[0].square().sum()) * (1 + 1e-5)
        assert float(short[0].square().sum()) == pytest.approx(float(whole[0].square().sum()), rel=0.1)
    exact = sum(
        float((p.exp() * (changes[0] - p - (p.exp() * (changes[0] - p)).sum(-1, keepdim=True)) ** 2).sum(-1)[t])
        for t in range(20)
    )
    assert float(whole[0].square().sum()) == pytest.approx(exact, rel=1e-4)


def test_sketches_keep_inner_products() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.log_softmax(torch.randn(4, 64, 200, generator=generator), -1)
    q = [torch.log_softmax(p + 0.1 * torch.randn(4, 64, 200, generator=generator), -1) for _ in range(3)]
    judge = GramJudge(3)
    for place in range(2):
        for number in range(3):
            judge.see(number, place, p[2 * place : 2 * place + 2], q[number][2 * place : 2 * place + 2])
    vectors = torch.stack([error_vectors(p.flatten(0, 1), x.flatten(0, 1)).flatten() for x in q]).double()
    exact = (vectors @ vectors.T / 256).numpy()
    assert numpy.abs(judge.gram() - exact).max() < 0.03 * exact.max()


def size(specs: dict[str, LinearSpec]) -> int:
    return 10_000 + sum(s.bits for s in specs.values())


def ordered_scores() -> Scores:
    trace, found = toy_trace(), toy_scores(toy_trace())
    block = {x.name: info.index for info in trace.blocks for x in info.linears}
    values = (0.3, 0.9, 0.1, 0.5)
    layers = tuple(layer.model_copy(update={"importance": values[block[layer.linear]]}) for layer in found.layers)
    return with_widths(found.model_copy(update={"layers": layers, "scorer": "toy"}), (3, 4))


def wide_blocks(found: BitAllocation) -> set[int]:
    return {int(a.linear.split(".")[1]) for a in found.assigned if a.spec.bits == 4}


def test_the_order_program_gives_whole_blocks_the_wide_format_most_important_first() -> None:
    trace, scores = toy_trace(), ordered_scores()
    assert block_importance(trace, scores) == pytest.approx((0.3, 0.9, 0.1, 0.5))
    seen = []
    for text in ("3.3bits", "3.6bits", "3.85bits", "4.1bits", "4.4bits"):
        found = spend_by(block_order(trace, scores), trace, scores, parse_budget(text), ground=Ground(64, size))
        assert found.storage_bits <= found.budget_bits
        blocks = wide_blocks(found)
        assert all(len({a.spec for a in found.assigned if f".{b}." in a.linear}) == 1 for b in range(4))
        seen.append(blocks)
    assert [sorted(b) for b in seen] == [[], [1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]


def test_the_order_program_refuses_what_it_cannot_order() -> None:
    trace = toy_trace()
    with pytest.raises(InputError, match="damages"):
        block_order(trace, toy_scores(trace))
    scores = ordered_scores()
    layers = tuple(
        LayerScore(linear=x.linear, importance=x.importance, candidates=y.candidates)
        for x, y in zip(scores.layers, toy_scores(trace).layers, strict=True)
    )
    many = scores.model_copy(update={"layers": layers})
    with pytest.raises(InputError, match="two widths"):
        spend_by(block_order(trace, many), trace, many, parse_budget("3.5bits"), ground=Ground(64, size))


def test_without_interactions_the_quadratic_program_is_the_integer_program() -> None:
    trace, scores = toy_trace(), toy_scores(toy_trace())
    units = dict.fromkeys(x.unit for x in trace.linears)
    places = {(unit, bits): 6 * n + b for n, unit in enumerate(units) for b, bits in enumerate((2, 3, 4, 5, 6, 8))}
    program = quadratic(places, numpy.eye(len(places)))
    budget = parse_budget("3.5bits")
    plain = spend_by(integer_program, trace, scores, budget, ground=Ground(64, size))
    found = spend_by(program, trace, scores, budget, ground=Ground(64, size))
    assert found.expected_damage == pytest.approx(plain.expected_damage, rel=1e-6)
    assert found.storage_bits <= found.budget_bits


def test_interactions_take_their_size_from_the_damages() -> None:
    source = numpy.random.default_rng(0)
    factor = source.normal(size=(5, 40))
    gram = factor @ factor.T
    damages = [0.1, 0.2, 0.0, 0.4, 0.5]
    found = interactions(gram, damages)
    assert numpy.diag(found) == pytest.approx([2 * d for d in damages], abs=1e-12)
    correlation = gram[0, 1] / (gram[0, 0] * gram[1, 1]) ** 0.5
    assert found[0, 1] == pytest.approx(0.5 * correlation * 2 * (0.1 * 0.2) ** 0.5)
    assert numpy.linalg.eigvalsh(found).min() > -1e-12


def test_damage_scorers_have_no_order(llama: Path) -> None:
    trace = job_for(llama).trace
    layers = scored(llama, "hessian").layers
    scores = Scores(scorer="hessian", unit="proxy loss", model_digest="", calibration_digest="", seed=0, layers=layers)
    with pytest.raises(InputError):
        block_importance(trace, scores)
