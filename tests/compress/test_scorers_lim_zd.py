"""LIM and ZD on inputs with a known answer."""

import math
from pathlib import Path

import pytest
import torch
from scoring_help import scored

from llmcompress.compress.scorers.lim import modification
from llmcompress.compress.scorers.zd import z_share


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_lim_of_known_blocks(mode: str) -> None:
    hidden = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    assert modification(hidden, hidden, mode=mode).tolist() == pytest.approx([-1.0] * 3)
    assert modification(hidden, -hidden, mode=mode).tolist() == pytest.approx([1.0] * 3)
    turned = torch.stack([hidden[..., 1::2], -hidden[..., ::2]], -1).flatten(-2)
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)  # a quarter turn of every pair
    assert modification(hidden, hidden + turned, mode=mode).tolist() == pytest.approx([-1 / math.sqrt(2)] * 3)
    assert torch.allclose(modification(hidden, hidden + turned), modification(7 * hidden, 7 * (hidden + turned)))


def test_lim_skips_the_first_token_when_asked() -> None:
    before = torch.ones(1, 4, 8)
    after = before.clone()
    after[:, 0] = -100
    assert modification(before, after, skip_first=True).item() == pytest.approx(-1.0)
    assert modification(before, after, skip_first=False).item() == pytest.approx(-0.5)
    assert modification(before, after, mode="flat", skip_first=False).item() == pytest.approx(
        776 / math.sqrt(32 * 80_024)
    )


def test_zd_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2_000_000, generator=generator) * 3 + 5
    uniform = torch.rand(2_000_000, generator=generator) * 4 - 1
    assert z_share([normal]) == pytest.approx(0.15866, abs=1e-3)
    assert z_share([normal], two_sided=True) == pytest.approx(0.31731, abs=1e-3)
    assert z_share([uniform]) == pytest.approx((1 - 1 / math.sqrt(3)) / 2, abs=1e-3)
    spikes = torch.cat([torch.zeros(900), torch.full((100,), 4.0)])
    assert z_share([spikes[:500], spikes[500:]]) == pytest.approx(0.1)


def test_zd_sides_are_an_option(llama: Path) -> None:
    one, two = scored(llama, "zd"), scored(llama, "zd", zd={"sides": "two"})
    assert one.layers[0].importance != two.layers[0].importance
