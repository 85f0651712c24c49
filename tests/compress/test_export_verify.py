"""Exports to bitsandbytes byte for byte, to our own layout, and verified from their records."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from safetensors.torch import load_file
from test_export import MIXED, exported, logits_of, quantized

import llmcompress
from llmcompress.cli import cli
from llmcompress.compress.export import int8
from llmcompress.compress.verify import VerifyError
from llmcompress.errors import InputError
from llmcompress.kernels.codes import Codes
from llmcompress.spec import LinearSpec


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several widths."""
    return quantized(llama, tmp_path_factory.mktemp("export") / "mixed", "4.2bits", *MIXED)


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_an_export_has_the_bytes_that_bitsandbytes_saves(kind: str, double: bool, tmp_path: Path) -> None:
    import transformers

    source = save_model(tmp_path / "source", llama_config(num_hidden_layers=2), shard_size="1GB")
    changes = (f"quantizer={kind}", f"quantize.double={str(double).lower()}")
    exported(quantized(source, tmp_path / "nf4", "8bits", *changes, recipe="nf4"), tmp_path / "ours", "bnb")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        {name: tensor for shard in (tmp_path / word).glob("*.safetensors") for name, tensor in load_file(shard).items()}
        for word in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape), name
        assert bytes(ours[name].view(torch.uint8).numpy()) == bytes(tensor.view(torch.uint8).numpy()), name


def test_eight_bit_rows_are_those_of_bitsandbytes(mixed: Path, tmp_path: Path) -> None:
    import transformers
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Linear8bitLt

    done = exported(mixed, tmp_path / "rows", "bnb", kind="int8")
    assert 0 < done.record.largest_error < 0.02
    assert "once more" in done.record.notes[0]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rows", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = llmcompress.load(mixed, dense=True)
    linears = [(name, module) for name, module in theirs.named_modules() if isinstance(module, Linear8bitLt)]
    assert len(linears) == 3 * 7
    for name, module in linears:
        codes, scale, _ = int8_vectorwise_quant(ours.get_submodule(name).weight.detach().half())
        assert torch.equal(module.weight.data, codes)
        assert torch.equal(module.weight.SCB, scale)
    with pytest.raises(InputError, match="--double"):
        exported(mixed, tmp_path / "double", "bnb", kind="int8", double=True)


def test_eight_bit_codes_of_whole_rows_are_carried_over() -> None:
    codes = torch.randint(0, 256, (32, 64), dtype=torch.uint8)
    found = Codes(codes, torch.randn(32, 1).to(torch.bfloat16), LinearSpec(bits=8, group_size=64))
    stored, scale = int8.carried(found) or (None, None)
    assert stored is not None
    assert scale is not None
    torch.testing.assert_close(int8.weight_of(stored, scale), found.dequantize(), rtol=1e-6, atol=0)
    assert int8.carried(replace(found, spec=LinearSpec(bits=8, group_size=32), scale=torch.ones(32, 2))) is None


def test_a_native_export_holds_the_same_codes(mixed: Path, tmp_path: Path) -> None:
    done = exported(mixed, tmp_path / "native", "native")
    assert done.record.lossless
    ours, before = llmcompress.load(tmp_path / "native"), llmcompress.load(mixed)
    assert torch.equal(logits_of(ours), logits_of(before))
    section = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "llmcompress"


@pytest.mark.parametrize(
    ("format_", "options"), [("gptq", {}), ("bf16", {}), ("bnb", {"kind": "int8"}), ("native", {})]
)
def test_an_export_is_verified_from_its_record(format_: str, options: Any, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(mixed, out, format_, **options)
    found = CliRunner().invoke(cli, ["verify", str(out), "--json"], catch_exceptions=False)
    assert [check["name"] for check in json.loads(found.stdout)] == ["hashes", "shards and index", "finite", "logits"]
    (out / "README.md").write_text("another")
    failed = CliRunner().invoke(cli, ["verify", str(out)])
    assert isinstance(failed.exception, VerifyError)
    assert "README.md" in failed.exception.what
    (out / "export.json").write_text("{}")
    assert isinstance(CliRunner().invoke(cli, ["verify", str(out)]).exception, InputError)


def test_the_input_is_looked_over_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    code = (
        "import sys\nfrom llmcompress.cli import cli\nfrom llmcompress.errors import InputError\n"
        "try:\n    cli(['export', 'bad', '--format', 'bf16'], standalone_mode=False)\n"
        "except InputError as error:\n    print('torch' in sys.modules, error.what)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("False")
    assert "config.json" in found.stdout
