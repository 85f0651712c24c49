"""Is the table of runtimes true? One mixed plan for each runtime and family, opened by the readers themselves, on CPU.

    python bench/runtimes.py --json bench/results/runtimes.json [--llama-cpp FOLDER]

Random models of four families are quantized for each runtime, in the formats and widths a plan for it may have. Every
program that the table says opens the result, as written or exported, then does so, where it can be installed here:
transformers with compressed-tensors, bitsandbytes or gguf, GPTQModel (in float16, all its torch kernel has), and
`llmcompress.load`. Logits are compared with those of the dequantized weights in float32, GPTQModel's with those in
float16, and the memory of the linears says whether they are packed. GGUF files are read by transformers and, with
FOLDER, where `npm install node-llama-cpp` was run, by llama.cpp, which rounds inputs to 8 bits while it multiplies: it
is held to a KL, and that it keeps weights packed is not measured. vLLM and SGLang are not run. No plan here is one that
a program refuses; the tests have those. At the end: are exports to nf4 and fp4 those of bitsandbytes, byte for byte?
"""

import argparse
import importlib
import importlib.util
import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import publish
from safetensors.torch import load_file
from torch import Tensor, nn

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.export.checkpoint import Options
from llmcompress.compress.export.run import Exported, ExportRequest, export
from llmcompress.compress.run import Finished, QuantizeRequest, quantize
from llmcompress.hub.source import Source
from llmcompress.recipes import load_recipe
from llmcompress.runtimes.answers import AS_WRITTEN, Answer, ask, planned
from llmcompress.types import ModelTrace

DEMO = Path(llmcompress.__file__).parent / "demo"
TOKENS = torch.arange(5, 53)[None]
SIZES = {
    "vocab_size": 1536, "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "head_dim": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
WINDOWED = {**GEMMA, "tie_word_embeddings": True, "sliding_window": 32}
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", WINDOWED),
    "gemma3": ("Gemma3TextConfig", {**WINDOWED, "num_hidden_layers": 6}),
}
PLANS = {
    "any": ("fast", "3.6bits"), "transformers": ("fast", "3.6bits"), "vllm": ("fast", "3.6bits"),
    "sglang": ("fast", "5bits"), "llamacpp": ("fast", "5bits"), "gptqmodel": ("fast", "3.6bits"),
    "bnb": ("nf4", "5bits"),
}  # fmt: skip
LOSSLESS = 1e-2
LLAMA_CPP = 1e-4  # nats per token
NOT_RUN, ELSEWHERE = "not run here", "read by transformers"


@dataclass(frozen=True)
class Row:
    """One program and one checkpoint: what the table claims, and what happened."""

    family: str
    planned_for: str
    widths: str
    opened_by: str
    how: str
    claim: str
    happened: str
    difference: float | None
    kld: float | None
    agrees: bool | None


def make_model(family: str, folder: Path) -> Path:
    """A random model with the tokenizer of the demo model."""
    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES | changes))
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / file, folder / file)
    return folder


def quantized(source: Path, output: Path, runtime: str) -> tuple[Finished, ModelTrace]:
    """A plan for a runtime, carried out."""
    recipe, budget = PLANS[runtime]
    found = load_recipe(recipe, (f"plan.runtime={runtime}", "plan.trials=false"))
    trace, last = None, None
    for event in quantize(
        QuantizeRequest(Source(source, source.name), output, found, parse_budget(budget), "cpu", "bench")
    ):
        trace = event.opened.trace if hasattr(event, "opened") else trace
        last = event
    if not isinstance(last, Finished) or trace is None:
        raise SystemExit("the run did not finish")
    return last, trace


def calm(model: Any) -> Any:
    """A model in float32 whose 4-bit modules keep their weights as they are on any CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
    for (
        parameter
    ) in model.parameters():  # what is not packed stays in the dtype of the file there, whatever is asked for
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    return model


def by_transformers(folder: Path) -> Any:
    """As plain transformers opens it; a GGUF file where there is one."""
    more = {"gguf_file": "model.gguf"} if (folder / "model.gguf").is_file() else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **more
    )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"keys do not agree: {info}")
    return calm(model)


def by_gptqmodel(folder: Path) -> Any:
    """As GPTQModel opens it, with its torch kernel."""
    library = importlib.import_module("gptqmodel")
    return library.GPTQModel.load(str(folder), device="cpu", backend=library.BACKEND.GPTQ_TORCH, dtype=torch.float16)


OPENERS: Mapping[str, Callable[[Path], Any]] = {
    "transformers": by_transformers,
    "bnb": by_transformers,
    "gptqmodel": by_gptqmodel,
    "llmcompress": lambda folder: llmcompress.load(folder, dtype=torch.float32),
}
NEEDED = {"gguf": "gguf", "gptq": "gptqmodel", "bnb": "bitsandbytes"}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits of the tokens, float32 `(tokens, vocabulary)`."""
    found: Tensor = model(input_ids=TOKENS).logits[0].float()
    return found


def memory_of(model: Any) -> int:
    """Bytes of everything the blocks hold in matrices."""
    inner: nn.Module = model if isinstance(model, nn.Module) else model.model
    held = [*inner.named_parameters(), *inner.named_buffers()]
    return sum(t.numel() * t.element_size() for n, t in held if "layers." in n and "norm" not in n)


def opened(
    answer: Answer, folder: Path, expected: Tensor, *, original: Path, weights: int
) -> tuple[str, float | None, float | None]:
    """What happens where a program opens a checkpoint: in words, the largest difference of logits, and the KL."""
    try:
        model = OPENERS[answer.runtime](folder)
        found = logits_of(model)
    except (RuntimeError, ValueError, ImportError, OSError, TypeError, AttributeError) as error:
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:100]}", None, None
    if answer.runtime == "gptqmodel":
        expected = logits_of(llmcompress.load(original, dtype=torch.float16, dense=True))
    size = memory_of(model)
    word = "runs packed" if size < 1.8 * weights else "loads, decompressed"  # 16 bits at least, once decompressed
    _, kld = apart(expected.double().log_softmax(-1), found.double().log_softmax(-1))
    return word, float((expected - found).abs().max()), kld


def by_llamacpp(node: Path | None, folder: Path, expected: Tensor) -> tuple[str, float | None, float | None]:
    """What llama.cpp makes of a GGUF file; what transformers makes of it where there is no llama.cpp."""
    if node is None:
        found = logits_of(by_transformers(folder)).double()
    else:
        out, file = folder.parent / "probabilities.json", folder / "model.gguf"
        script = Path(__file__).with_name("llamacpp.mjs")
        words = ["node", script, node.resolve(), file, out, *TOKENS[0].tolist()]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"refused: {done.stderr.strip()[-200:]}", None, None
        table = json.loads(out.read_text())
        found = torch.tensor(
            [[row[str(i)] for i in range(expected.shape[1])] for row in table], dtype=torch.double
        ).log()
    difference, kld = apart(expected.double().log_softmax(-1), found.log_softmax(-1))
    return ELSEWHERE if node is None else "opened", difference, kld


def apart(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The largest difference of two arrays of log-probabilities, and the mean KL divergence of their rows."""
    kld = float((first.exp() * (first - second)).sum(-1).mean())
    return float((first - second).abs().max()), max(kld, 0.0)


def exported(source: Path, answer: Answer, folder: Path) -> Path:
    """The checkpoint as the answer says."""
    if answer.how == AS_WRITTEN:
        return source
    name = answer.how.rpartition(" ")[2]
    output = folder / f"{source.name}-{name}"
    if not output.exists():
        options = Options(dtype="float32" if name in ("gguf", "bf16") else None)
        last = list(export(ExportRequest(Source(source, source.name), output, name, "bench", options)))[-1]
        if not isinstance(last, Exported):
            raise SystemExit("the export did not finish")
    return output


def check(family: str, runtime: str, folder: Path, node: Path | None) -> list[Row]:
    """All answers about one plan, held against what happens."""
    source = folder / family
    done, trace = quantized(source, folder / f"{family}-{runtime}", runtime)
    output = folder / f"{family}-{runtime}"
    specs = {a.linear: a.spec for a in done.plan.allocation.assigned}
    widths = "/".join(map(str, sorted({spec.bits for spec in specs.values()})))
    expected = logits_of(llmcompress.load(output, dtype=torch.float32, dense=True))
    rows = []
    for answer in ask(planned(trace, specs, done.plan.options)):
        missing = [m for word, m in NEEDED.items() if word in answer.how and importlib.util.find_spec(m) is None]
        happened: tuple[str, float | None, float | None] = (NOT_RUN, None, None)
        if not answer.loads and answer.runtime not in ("transformers", "llmcompress"):
            continue  # another layout than the program has: nothing to try
        if answer.runtime in OPENERS and not missing:
            place = exported(output, answer, folder) if answer.loads else output
            weights = sum(x.weights for x in trace.linears)
            happened = opened(answer, place, expected, original=output, weights=weights)
        if answer.runtime == "llamacpp" and not missing:
            happened = by_llamacpp(node, exported(output, answer, folder), expected)
        rows.append(row_of((family, runtime, widths), answer, happened))
        tell(rows[-1])
    return rows


def row_of(what: tuple[str, str, str], answer: Answer, happened: tuple[str, float | None, float | None]) -> Row:
    """A claim beside what happened."""
    word, difference, kld = happened
    agrees: bool | None = None
    if word == "opened" and kld is not None:
        agrees = answer.loads and kld <= LLAMA_CPP
    elif word not in (NOT_RUN, ELSEWHERE):
        agrees = word.partition(":")[0] == answer.words
        if difference is not None and answer.exact:
            agrees = agrees and difference <= LOSSLESS
    elif difference is not None and difference > LOSSLESS:
        agrees = False
    return Row(*what, answer.runtime, answer.how, answer.words, word, difference, kld, agrees)


def tell(row: Row) -> None:
    """Print a row."""
    mark = {None: "-", True: "yes", False: "NO"}[row.agrees]
    measured = "" if row.difference is None else f"  logits {row.difference:.2e}  KL {row.kld:.2e}"
    print(
        f"{row.family:<8}{row.planned_for:<13}{row.widths:<9}{row.opened_by:<13}{row.how:<22}{row.claim:<21}"
        f"{row.happened:<21}{mark:<4}{measured}",
        flush=True,
    )


def same_bytes(source: Path, folder: Path, kind: str, double: bool) -> bool:
    """Whether an export has the bytes of what bitsandbytes makes of the same weights and saves."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = folder / f"theirs-{kind}-{double}"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(theirs)
    recipe = load_recipe("nf4", (f"quantizer={kind}", f"quantize.double={str(double).lower()}"))
    ours, out = folder / f"ours-{kind}-{double}", folder / f"export-{kind}-{double}"
    list(quantize(QuantizeRequest(Source(source, "m"), ours, recipe, parse_budget("6bits"), "cpu", "bench")))
    list(export(ExportRequest(Source(ours, "m"), out, "bnb", "bench", Options())))
    left, right = (
        {name: tensor for shard in sorted(place.glob("*.safetensors")) for name, tensor in load_file(shard).items()}
        for place in (theirs, out)
    )
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))
        for n in left
    )


def main() -> None:
    """Check every claim; exits with 1 where one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--llama-cpp", type=Path, help="a folder with node-llama-cpp")
    parser.add_argument("--family", choices=list(FAMILIES), nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for family in options.family:
            make_model(family, folder / family)
            for runtime in PLANS:
                rows += check(family, runtime, folder, options.llama_cpp)
        identical = {
            f"{kind}, {'8-bit' if double else 'float32'} scales": same_bytes(
                folder / options.family[0], folder, kind, double
            )
            for kind in ("nf4", "fp4")
            for double in (False, True)
        }
    print("bytes of bitsandbytes:", identical)
    held = sum(row.agrees is True for row in rows)
    broken = [row for row in rows if row.agrees is False]
    print(f"{held} claims hold, {len(broken)} do not, {sum(row.agrees is None for row in rows)} could not be run here")
    publish(
        options.json,
        {
            "seed": 0,
            "bytes_of_bitsandbytes": identical,
            "llama_cpp": options.llama_cpp is not None,
            "rows": [asdict(row) for row in rows],
        },
    )
    raise SystemExit(1 if broken or not all(identical.values()) else 0)


if __name__ == "__main__":
    main()
