"""Sites found by trace against what the configuration says; norms and float64 against plain formulas."""

import pytest
import torch
from reparam_help import FAMILIES, GROUPED, SIZES, block_subject, configs, distance, logits_of, randomized, tiny, tokens
from torch import Tensor, nn
from transformers import MixtralConfig

from llmcompress.compress.rewriting.edits import BiasedNorm, bias_of, divide_gain, fold_gain, matrix, read_gain
from llmcompress.compress.rewriting.exact import exact, in_float64
from llmcompress.compress.rewriting.samples import input_samples, migration_scale
from llmcompress.compress.rewriting.sites import common_parent, head_size, links, mixing_rows, norm_sites
from llmcompress.compress.rewriting.work import Call, working
from llmcompress.errors import InputError

HEADS, SIZE = SIZES["num_attention_heads"], 6


class GemmaLike(nn.Module):
    """A norm whose gain is one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 3e-4) * (1 + self.weight)


class Squared(GemmaLike):
    """No norm at all, though it looks like one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.square()


def norm_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(10, eps=2e-5),
        "layer without bias": nn.LayerNorm(10, eps=2e-5, bias=False),
        "rms": nn.RMSNorm(10, eps=1e-6),
        "gemma": GemmaLike(),
        "biased": BiasedNorm(nn.RMSNorm(10, eps=1e-6), torch.zeros(10)),
    }
    norm = made[kind].double().requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize(
    ("kind", "offset", "centred", "epsilon", "bias"),
    [
        ("layer", 0, True, 2e-5, True),
        ("layer without bias", 0, True, 2e-5, False),
        ("rms", 0, False, 1e-6, False),
        ("gemma", 1, False, 3e-4, False),
        ("biased", 0, False, 1e-6, True),
    ],
)
def test_a_norm_is_what_its_gain_says(kind: str, offset: float, centred: bool, epsilon: float, bias: bool) -> None:
    norm = norm_of(kind)
    weights = [value.clone() for value in norm.parameters()]
    gain = read_gain(norm)
    assert all(torch.equal(a, b) for a, b in zip(weights, norm.parameters(), strict=True))
    assert (gain.offset, gain.centred, gain.bias is not None) == (offset, centred, bias)
    assert gain.epsilon == pytest.approx(epsilon, rel=1e-6)
    x = torch.randn(5, 10, dtype=torch.float64)
    inner = x - x.mean(-1, keepdim=True) if centred else x
    plain = inner / (inner.square().mean(-1, keepdim=True) + epsilon).sqrt()
    assert torch.allclose(norm(x), plain * gain.gamma + gain.beta, atol=1e-9)
    reader = nn.Linear(10, 4, bias=False).double().requires_grad_(False)
    want = reader(norm(x))
    divide_gain(norm, [reader], torch.rand(10, dtype=torch.float64) + 0.5)
    assert torch.allclose(reader(norm(x)), want, atol=1e-10)
    fold_gain(read_gain(norm), [reader])
    assert torch.allclose(reader(norm(x)), want, atol=1e-10)
    assert torch.allclose(norm(x), plain, atol=1e-9)


def test_what_is_no_norm_is_refused() -> None:
    for module, reason in [(Squared(), "is not normed"), (nn.RMSNorm(4, elementwise_affine=False), "no gain")]:
        with pytest.raises(InputError, match=reason):
            read_gain(module.double())


def expected_v_rows(family: str) -> Tensor:
    """Which row of the linear that makes values each input of the output projection follows, from the config."""
    grouped = "num_key_value_heads" in configs()[family].to_dict() and family not in ("gpt2", "opt", "neox")
    kv = GROUPED["num_key_value_heads"] if grouped else HEADS
    head = torch.arange(HEADS) // (HEADS // kv)
    within = torch.arange(SIZE)
    start = {"gpt2": 2 * HEADS * SIZE, "phi3": (HEADS + kv) * SIZE}.get(family, 0)
    if family == "neox":
        return (head[:, None] * 3 * SIZE + 2 * SIZE + within).flatten()
    return (start + head[:, None] * SIZE + within).flatten()


@pytest.mark.parametrize("family", FAMILIES)
def test_links_and_heads_are_those_of_the_config(family: str) -> None:
    subject = block_subject(tiny(family))
    with working(subject) as work:
        found = links(subject.module, work.probe)
        sizes = [head_size(subject.module, work.probe, link) for link in found]
        mixing = {
            name: mixing_rows(subject.module, work.probe, name, found)
            for site in norm_sites(subject.module, work.probe)
            for name in site.readers
        }
    assert torch.equal(found[0].row_of, expected_v_rows(family))
    assert sizes[0] == SIZE
    assert all(size == 1 for size in sizes[1:])
    for link in found[1:]:
        rows = len(matrix(subject.module.get_submodule(link.source)))
        assert torch.equal(link.row_of, torch.arange(40) + rows - 40)
    # queries and keys, whatever linear they are in, and nothing else
    kv = GROUPED["num_key_value_heads"] if len(found[0].rows) == 12 else HEADS
    assert sum(int(rows.sum()) for rows in mixing.values()) == (HEADS + kv) * SIZE
    assert not any("up" in name or "gate" in name or "fc" in name for name, rows in mixing.items() if rows.any())


def test_a_dead_channel_follows_nothing_and_is_left() -> None:
    model = tiny("opt")
    block = block_subject(model).module
    bias = bias_of(block.get_submodule("fc1"))
    assert bias is not None
    bias[3] = -1e3  # ReLU never lets it through
    subject = block_subject(model)
    with working(subject) as work:
        link = links(subject.module, work.probe)[1]
    assert link.row_of.tolist() == [*range(3), -1, *range(4, 40)]
    assert link.reduce(torch.ones(40), 40).tolist() == [1.0] * 3 + [0.0] + [1.0] * 36
    assert link.gather(torch.arange(40.0) + 5, 1.0)[:5].tolist() == [5, 6, 7, 1, 9]


def test_common_parent() -> None:
    assert common_parent(["mlp.gate", "mlp.up"]) == "mlp"
    assert common_parent(["a.b.q", "a.b.k", "a.c.v"]) == "a"
    assert common_parent(["fc1"]) == ""


def test_first_tokens_are_left_out() -> None:
    for family, name in (("llama", "mlp.down_proj"), ("opt", "fc1")):  # OPT flattens batch and tokens
        subject = block_subject(tiny(family))
        read: list[Tensor] = []
        module = subject.module.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0].reshape(3, 12, -1)))
        seen = input_samples(subject.module, subject.calls, [name], tokens=10**6, skip_first=True)[name]
        handle.remove()
        assert torch.equal(seen, torch.cat([one[:, 1:].flatten(0, 1) for one in read]))
        few = input_samples(subject.module, subject.calls, [name], tokens=20, skip_first=False)[name]
        assert 10 <= len(few) <= 20
        assert torch.equal(few[0], read[0][0, 0])
    call = subject.calls[0]
    one = Call((call.args[0][:, :1],), {**call.kwargs, "attention_mask": None})
    with pytest.raises(InputError, match="no calibration tokens"):
        input_samples(subject.module, [one], [name], tokens=9, skip_first=True)


def test_migration_keeps_silent_channels() -> None:
    factor = migration_scale(torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 2.0, 0.0]), 0.5)
    assert factor.tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize("config", [configs()["llama"], MixtralConfig(**SIZES, num_key_value_heads=2)])
def test_float64_is_the_same_model_only_finer(config: object) -> None:
    model = randomized(config).float()
    plain = model(input_ids=tokens(9), use_cache=False).logits
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with in_float64(model):
        fine = logits_of(model)
    assert fine.dtype == torch.float64
    assert 1e-9 < distance(plain.double(), fine) < 1e-5
    assert all(
        torch.equal(kept[name], value) and kept[name].dtype == value.dtype for name, value in model.state_dict().items()
    )
    with exact():
        x = torch.randn(7, dtype=torch.float64)
        assert torch.equal(x.to(torch.float32), x)
        assert torch.equal(x.float(), x)
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
    assert x.float().dtype == torch.float32
