"""Text sampled from a model: what the model says, neither more nor less."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmcompress.errors import InputError
from llmcompress.model import text
from llmcompress.model.text import sample_tokens

TOKENS = 24


class Words:
    """As much of a tokenizer as sampling needs."""

    def __init__(self, begin: int | None, special: tuple[int, ...] = (), words: int = TOKENS) -> None:
        self.bos_token_id, self.all_special_ids, self.words = begin, list(special), words

    def __len__(self) -> int:
        return self.words


def tiny(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random model whose next token depends strongly on all that went before."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=TOKENS, max_position_embeddings=64, initializer_range=0.7, **(sizes | changes))
    return LlamaForCausalLM(config).eval()


def always(token: int) -> LlamaForCausalLM:
    """A model that predicts one token whatever it reads: nothing but the embedding reaches the head."""
    model = tiny()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 50.0
    return model


def sampled(model: Any, words: Words, samples: int = 6, length: int = 10, seed: int = 0) -> Tensor:
    return sample_tokens(model, words, samples=samples, sequence_length=length, seed=seed)


@pytest.mark.parametrize("token", [0, 7, TOKENS - 1])
def test_a_model_that_always_says_one_token_says_it(token: int) -> None:
    tokens = sampled(always(token), Words(begin=3))
    assert tokens.dtype == torch.int64
    assert tokens.shape == (6, 10)
    assert (tokens[:, 0] == 3).all()
    assert (tokens[:, 1:] == token).all()


def test_a_seed_decides_and_global_random_numbers_do_not() -> None:
    model, words = tiny(), Words(begin=None)
    torch.manual_seed(5)
    first = sampled(model, words)
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(sampled(model, words), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sampled(model, words, seed=1), first)


def test_dropout_is_off() -> None:
    model = tiny(attention_dropout=0.5)
    first = sampled(model, Words(begin=0), samples=20)
    assert torch.equal(sampled(model.train(), Words(begin=0), samples=20), first)


def test_rows_sampled_side_by_side_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = tiny(), Words(begin=None)
    together = sampled(model, words, samples=7)
    monkeypatch.setattr(text, "SAMPLING_ROWS", 2)
    assert torch.equal(sampled(model, words, samples=7), together)


def test_tokens_follow_the_models_distribution() -> None:
    """The model, reading whole rows without a cache, finds them as surprising as its entropy says: mean within 4 sigma.

    A stale cache, a shifted position, a wrong temperature or a preference for likely tokens all move that mean.
    """
    model = tiny()
    tokens = sampled(model, Words(begin=0), samples=600, length=12)
    with torch.no_grad():
        said = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, :-1].double(), -1)
    surprise = -said.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(said.exp() * said).sum(-1)
    assert 0.3 < float(entropy.mean()) < 2.5  # far from certain and far from uniform, or nothing is tested
    excess = (surprise - entropy).mean(0)  # a martingale difference: mean 0 at every position
    sigma = (surprise - entropy).std(0) / len(tokens) ** 0.5
    assert (excess.abs() < 4 * sigma).all()
    counts = torch.bincount(tokens[:, 1], minlength=TOKENS) / len(tokens)
    assert float((counts - said[0, 0].exp()).abs().sum()) / 2 < 0.1


def test_without_a_begin_token_rows_start_from_every_ordinary_token() -> None:
    special = (0, 1, 9)
    first = sampled(always(2), Words(None, special, words=TOKENS - 4), samples=800, length=8)[:, 0]
    assert set(first.tolist()) == set(range(TOKENS - 4)) - set(special)
    assert int(torch.bincount(first).max()) < 3 * 800 / 17
    with pytest.raises(InputError, match="no ordinary tokens"):
        sampled(always(2), Words(None, tuple(range(TOKENS))))


class Cacheless(torch.nn.Module):
    """A model that keeps nothing between calls: it must be given the whole row each time."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False).logits, past_key_values=None)


def test_a_model_without_a_cache_gives_the_same_text() -> None:
    model = tiny()
    assert torch.equal(sampled(Cacheless(model), Words(begin=0)), sampled(model, Words(begin=0)))


def test_a_token_of_no_probability_is_never_drawn() -> None:
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    found = [int(text._drawn(chances, draw[None])) for draw in draws]
    assert found == [1, 1, 3, 3, 3]


def test_a_broken_model_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        sampled(model, Words(begin=0))


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (1, 7)])
def test_impossible_sizes_are_refused(samples: int, length: int) -> None:
    with pytest.raises(InputError, match="sampling on"):
        sampled(tiny(), Words(begin=0), samples, length)
