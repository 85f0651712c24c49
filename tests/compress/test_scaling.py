"""SmoothQuant, AWQ and equalization: what their factors are, against formulas and slow searches."""

from collections.abc import Callable

import pytest
import torch
from reparam_help import block_subject, distance, logits_of, tiny
from torch import Tensor, nn

from llmcompress.compress.reparam import awq, equalize, smooth
from llmcompress.compress.rewriting.edits import divide_gain, matrix
from llmcompress.compress.rewriting.sites import inputs_of
from llmcompress.compress.rewriting.work import Subject, working
from llmcompress.options import ReparamOptions

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
EVERY = ReparamOptions(skip_first=False, tokens=10**6)


def weight(block: nn.Module, name: str) -> Tensor:
    return matrix(block.get_submodule(name))


def inject(subject: Subject, factor: Tensor) -> None:
    """Give the norms of a Llama block outliers without changing what it computes."""
    with working(subject) as work:
        for norm, readers in READERS.items():
            parts = [subject.module.get_submodule(name) for name in (norm, *readers)]
            work.require(norm, parts, lambda parts=parts: divide_gain(parts[0], parts[1:], 1 / factor))  # type: ignore


def outliers() -> Tensor:
    factor = torch.ones(24, dtype=torch.float64)
    factor[[3, 17]] = torch.tensor([60.0, 90.0], dtype=torch.float64)
    return factor


def read_by(subject: Subject, name: str) -> Tensor:
    """What a linear reads in all calls, `(tokens, columns)`."""
    return torch.cat([inputs_of(subject.module, call)[name] for call in subject.calls])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smoothing_is_its_formula(alpha: float) -> None:
    subject = block_subject(tiny("llama"))
    block = subject.module
    before = {name: weight(block, name).clone() for names in READERS.values() for name in names}
    reads = {norm: read_by(subject, names[0]) for norm, names in READERS.items()}
    smooth.rewrite(subject, EVERY.model_copy(update={"smooth": EVERY.smooth.model_copy(update={"alpha": alpha})}))
    for norm, names in READERS.items():
        for channel in range(24):
            largest = max(float(before[name][:, channel].abs().max()) for name in names)
            s = float(reads[norm][:, channel].abs().max()) ** alpha / largest ** (1 - alpha)
            for name in names:
                assert torch.allclose(weight(block, name)[:, channel], before[name][:, channel] * s)
        assert torch.allclose(
            read_by(subject, names[0]) * weight(block, names[0])[0], reads[norm] * before[names[0]][0]
        )


def test_smoothing_undoes_folded_outliers_whatever_alpha() -> None:
    for alpha in (0.3, 0.5):
        options = EVERY.model_copy(update={"smooth": EVERY.smooth.model_copy(update={"alpha": alpha})})
        plain, loud = tiny("llama"), tiny("llama")
        inject(block_subject(loud), outliers())
        assert not torch.allclose(*(weight(block_subject(m).module, "mlp.up_proj") for m in (plain, loud)))
        for model in (plain, loud):
            smooth.rewrite(block_subject(model), options)
        for (name, a), b in zip(plain.state_dict().items(), loud.state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6), name


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_equalized_ranges_meet_in_the_middle(by: str) -> None:
    subject = block_subject(tiny("qwen3"))
    block = subject.module
    options = ReparamOptions.model_validate({"equalize": {"by": by}, "skip_first": False})

    def ranges() -> dict[str, tuple[Tensor, Tensor]]:
        """Of both sides of each link, per row of its source; two query heads share a value head."""
        o = weight(block, "self_attn.o_proj").abs().amax(0).view(2, 2, 6).amax(1).flatten()
        down = weight(block, "mlp.down_proj").abs().amax(0)
        if by == "weights":
            v = weight(block, "self_attn.v_proj").abs().amax(1)
            return {"v": (v, o), "up": (weight(block, "mlp.up_proj").abs().amax(1), down)}
        v = read_by(subject, "self_attn.o_proj").abs().amax(0).view(2, 2, 6).amax(1).flatten()
        return {"v": (v, o), "up": (read_by(subject, "mlp.down_proj").abs().amax(0), down)}

    before = ranges()
    equalize.rewrite(subject, options)
    for name, (left, right) in ranges().items():
        assert torch.allclose(left, right)
        assert torch.allclose(left, (before[name][0] * before[name][1]).sqrt())
    once = {name: value.clone() for name, value in block.state_dict().items()}
    equalize.rewrite(subject, options)
    assert all(torch.allclose(value, once[name], rtol=1e-9) for name, value in block.state_dict().items())


def coarse(_: str, given: Tensor) -> Tensor:
    """Three bits, one scale per row."""
    scale = given.abs().amax(1, keepdim=True) / 3
    return torch.round(given / scale) * scale


def output_error(subject: Subject, rounding: Callable[[str, Tensor], Tensor], names: tuple[str, ...]) -> float:
    """Squared change of the block's output when the named linears are rounded, restored afterwards."""
    block = subject.module
    kept = {name: weight(block, name).clone() for name in names}
    before = [call.run(block) for call in subject.calls]
    for name in names:
        weight(block, name).copy_(rounding(name, kept[name]))
    after = [call.run(block) for call in subject.calls]
    for name in names:
        weight(block, name).copy_(kept[name])
    return sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True))


def test_awq_helps_what_reads_outliers() -> None:
    model = tiny("llama")
    subject = block_subject(model, rounding=coarse)
    gain = subject.module.get_submodule("post_attention_layernorm").weight
    gain.data[[3, 17]] *= 30  # type: ignore[operator, union-attr]  # outliers that matter: nothing undoes them
    names = READERS["post_attention_layernorm"]
    before, reference = output_error(subject, coarse, names), logits_of(model)
    result = awq.rewrite(subject, ReparamOptions.model_validate({"awq": {"links": False}}))
    assert result.sites == tuple(READERS)
    assert distance(logits_of(model), reference) < 1e-12
    assert output_error(subject, coarse, names) < 0.5 * before


def test_awq_searches_with_the_rounding_it_is_given() -> None:
    asked: list[str] = []

    def exact_rounding(name: str, given: Tensor) -> Tensor:
        asked.append(name)
        return given.clone()

    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    awq.rewrite(block_subject(model, rounding=exact_rounding), ReparamOptions())
    assert set(asked) == {
        *READERS["input_layernorm"],
        *READERS["post_attention_layernorm"],
        "self_attn.o_proj",
        "mlp.down_proj",
    }
    assert all(distance(value, before[name]) < 60 for name, value in model.state_dict().items())
    assert asked.count("mlp.down_proj") == ReparamOptions().awq.ratios + 1


def test_the_ratio_is_searched_and_first_wins() -> None:
    candidates = [torch.tensor([float(value)]) for value in (1, 2, 3, 4)]
    found, loss = awq.search_ratio(candidates, lambda factor: float((factor - 2.5).abs().sum()))
    assert (float(found), loss) == (2.0, 0.5)
    factor = awq.factor_of(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    assert factor.tolist() == pytest.approx([0.5, 1.0, 2.0])
    duo = awq.factor_of(torch.tensor([1.0, 4.0, 16.0]), 0.5, torch.tensor([1.0, 1.0, 0.25]))
    assert duo.tolist() == pytest.approx([8**-0.5, 2 / 8**0.5, 8**0.5], rel=1e-3)


def test_limits_are_a_slow_search_and_never_worse() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 12, generator=generator) ** 3
    inputs = torch.randn(50, 12, generator=generator) @ torch.randn(12, 12, generator=generator)

    def rounding(each: Tensor) -> Tensor:
        groups = each.reshape(len(each), -1, 4)
        scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 3
        return (torch.round(groups / scale) * scale).flatten(1)

    limits = awq.find_limits(given, inputs, rounding, 4)
    helped = 0
    for row in range(3):
        for group in range(3):
            part = slice(4 * group, 4 * group + 4)
            x, w = inputs[:, part], given[row : row + 1, part]
            peak = float(w.abs().max())
            tried = [peak * (1 - 0.05 * step) for step in range(10)]
            losses = [float((x @ (rounding(w.clamp(-limit, limit)) - w).T).square().sum()) for limit in tried]
            assert float(limits[row, group]) == pytest.approx(tried[losses.index(min(losses))])
            helped += min(losses) < losses[0]
    assert helped >= 3


def test_queries_and_keys_are_not_clipped() -> None:
    for family, free in (("llama", {"self_attn.q_proj", "self_attn.k_proj"}), ("gpt2", {"attn.c_attn"})):
        subject = block_subject(tiny(family))
        options = ReparamOptions.model_validate({"awq": {"clip": True, "bits": 3, "group_size": 8, "ratios": 2}})
        limits = awq.rewrite(subject, options).limits
        for name, limit in limits.items():
            each = weight(subject.module, name)
            size = each.shape[1] // limit.shape[1]
            untouched = torch.isclose(limit, each.reshape(len(each), -1, size).abs().amax(-1)).all(1)
            rows = 48 if name == "attn.c_attn" else len(each)
            assert bool(untouched[:rows].all()) == (name in free), name
            assert name in free - {"attn.c_attn"} or not bool(untouched.all())
