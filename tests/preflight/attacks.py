"""Model directories that are damaged or hostile, made where they are needed: what is done to a good one, by name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

ROWS, WIDTH = 16, 8
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS, "hidden_size": WIDTH,
    "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
TOKENIZER = {"model": {"type": "WordLevel", "vocab": {"a": 3, "<unk>": 0}, "unk_token": "<unk>"}, "added_tokens": []}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLE = b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR."
HOSTILE = "{% for a in range(99999999) %}{% for b in range(99999999) %}{{ ''.__class__ }}{% endfor %}{% endfor %}"


def tensors() -> dict[str, NDArray[numpy.float32]]:
    """The weights of a Llama of two blocks."""
    random = numpy.random.default_rng(0)
    shapes = {EMBEDDING: (ROWS, WIDTH), HEAD: (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    for block in range(2):
        stem = f"model.layers.{block}"
        shapes |= {f"{stem}.{name}.weight": (WIDTH, WIDTH) for name in LINEARS}
        shapes |= {f"{stem}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
    return {name: random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}


def good(folder: Path) -> Path:
    """A model directory there is nothing wrong with."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(tensors(), folder / SINGLE)
    return folder


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map() -> dict[str, Any]:
    """Where the tensors of a model in two shards are."""
    return {name: FIRST if name == EMBEDDING else SECOND for name in tensors()}


def shard(folder: Path) -> Path:
    return folder / SINGLE


def split(folder: Path, changes: object = None) -> None:
    """The same model in two shards, with an index that says something else in places, or is something else."""
    shard(folder).unlink()
    for name in (FIRST, SECOND):
        save_file({k: v for k, v in tensors().items() if weight_map()[k] == name}, folder / name)
    index(folder, weight_map() | changes if isinstance(changes, dict) else weight_map() if changes is None else changes)


def header(folder: Path, document: object, payload: bytes = b"\0" * 16, *, length: int | None = None) -> None:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    shard(folder).write_bytes(size + text + payload)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """The header of the good shard, edited, over the same payload."""
    data = shard(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    edit(document)
    header(folder, document, data[8 + length :])


def entry(start: int, stop: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def stored(folder: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> None:
    """The weights, changed and written by the library."""
    found: dict[str, NDArray[Any]] = dict(load_file(shard(folder)))
    change(found)
    save_file(found, shard(folder))


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def outside(path: Path, levels: int = 1) -> None:
    """The file moves out of the model, and a link to it takes its place."""
    moved = path.parents[levels] / f"outside-{path.name}"
    if path.exists():
        shutil.move(path, moved)
    else:
        moved.write_text("{}")
    link(path, moved)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def sparse(path: Path, size: int) -> None:
    """A file of any size that takes no room."""
    path.touch()
    os.truncate(path, size)


def adapter(folder: Path, *, rank: object = 2, alpha: object = 4, up: tuple[int, int] = (WIDTH, 2)) -> None:
    inner = folder / "adapter"
    inner.mkdir()
    (inner / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    parts = {f"{stem}.lora_A.weight": numpy.zeros((2, WIDTH), "f4"), f"{stem}.lora_B.weight": numpy.zeros(up, "f4")}
    save_file(parts, inner / "adapter_model.safetensors")


def only_pickles(folder: Path) -> None:
    shard(folder).unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(PICKLE)


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda f: (f / name).write_bytes(text.encode() if isinstance(text, str) else text)


@dataclass(frozen=True)
class Fault:
    """What is done to a good directory, and a word of what is said. `plain`: only wrong where nothing is packed."""

    damage: Callable[[Path], object]
    word: str
    plain: bool = False


SHARDS = {
    "no weights": Fault(lambda f: shard(f).unlink(), "model.safetensors"),
    "pickle only": Fault(only_pickles, "pickled"),
    "empty file": Fault(lambda f: shard(f).write_bytes(b""), "0 bytes"),
    "cut header": Fault(lambda f: shard(f).write_bytes(shard(f).read_bytes()[:20]), "header needs"),
    "truncated": Fault(lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-5]), "its tensors end at"),
    "trailing bytes": Fault(lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "its tensors end at"),
    "huge header": Fault(lambda f: header(f, {}, length=2**63), "limit"),
    "header of 99 MB": Fault(lambda f: (header(f, {}, length=99 << 20), sparse(shard(f), 100 << 20)), "limit"),
    "padded header": Fault(lambda f: header(f, b"{}" + b" " * (2 << 20)), "padded"),
    "header beyond the file": Fault(lambda f: header(f, {}, length=4000), "header needs"),
    "header not json": Fault(lambda f: header(f, b"{]"), "JSON"),
    "header not a table": Fault(lambda f: header(f, [1, 2]), "table"),
    "header begins elsewhere": Fault(lambda f: header(f, b"  {}"), "table"),
    "header too deep": Fault(lambda f: header(f, b'{"a":' * 200_000), "deep"),
    "header in another encoding": Fault(lambda f: header(f, b'{"\xff": 1}'), "utf-8"),
    "duplicate tensors": Fault(lambda f: header(f, b'{"a": 1, "a": {}}'), "duplicate"),
    "metadata not texts": Fault(lambda f: edited(f, lambda d: d.update(__metadata__={"a": {}})), "__metadata__"),
    "overlap": Fault(lambda f: header(f, {"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24), "overlaps"),
    "hole": Fault(lambda f: header(f, {"a": entry(0, 16), "b": entry(32, 48)}, b"\0" * 48), "hole"),
    "unknown dtype": Fault(lambda f: edited(f, lambda d: d[HEAD].update(dtype="F99")), "F99"),
    "dtype lies": Fault(lambda f: edited(f, lambda d: d[HEAD].update(dtype="F16")), "needs"),
    "dtype not a word": Fault(lambda f: edited(f, lambda d: d[HEAD].update(dtype=[1])), "dtype"),
    "shape lies": Fault(lambda f: edited(f, lambda d: d[HEAD].update(shape=[5])), "needs"),
    "negative shape": Fault(lambda f: edited(f, lambda d: d[HEAD].update(shape=[-4])), "shape"),
    "shape of fractions": Fault(lambda f: edited(f, lambda d: d[HEAD].update(shape=[1.5])), "shape"),
    "shape of truths": Fault(lambda f: edited(f, lambda d: d[HEAD].update(shape=[True])), "shape"),
    "a thousand dimensions": Fault(lambda f: edited(f, lambda d: d[HEAD].update(shape=[1] * 1000)), "shape"),
    "product overflows": Fault(lambda f: header(f, {"a": entry(0, 16, shape=(2**40, 2**40))}), "values"),
    "overflow hidden by zero": Fault(lambda f: header(f, {"a": entry(0, 0, shape=(2**62, 0))}, b""), "values"),
    "offsets malformed": Fault(lambda f: edited(f, lambda d: d[HEAD].update(data_offsets=[0])), "offsets"),
    "offsets backwards": Fault(lambda f: edited(f, lambda d: d[HEAD].update(data_offsets=[512, 0])), "needs"),
    "extra header field": Fault(lambda f: edited(f, lambda d: d[HEAD].update(x=1)), "malformed"),
    "escape in a name": Fault(lambda f: edited(f, lambda d: d.update({"a\x1b[31m": d.pop(HEAD)})), "not a name"),
    "line end in a name": Fault(lambda f: edited(f, lambda d: d.update({"a\n::error::": d.pop(HEAD)})), "not a name"),
    "half a pair in a name": Fault(lambda f: edited(f, lambda d: d.update({"\ud800": d.pop(HEAD)})), "not a name"),
    "endless name": Fault(lambda f: edited(f, lambda d: d.update({"a" * 10_000: d.pop(HEAD)})), "not a name"),
    "integer weights": Fault(lambda f: stored(f, lambda t: t.update({HEAD: t[HEAD].astype("i4")})), "I32", plain=True),
    "bool weights": Fault(lambda f: stored(f, lambda t: t.update({HEAD: t[HEAD] > 0})), "BOOL", plain=True),
    "embedding of another size": Fault(lambda f: stored(f, lambda t: t.update({EMBEDDING: t[EMBEDDING][:9]})), "vocab"),
}
INDICES = {
    "traversal": Fault(lambda f: split(f, {HEAD: "../outside/x.safetensors"}), HEAD),
    "traversal inside": Fault(lambda f: split(f, {HEAD: "a/../../x.safetensors"}), HEAD),
    "absolute": Fault(lambda f: split(f, {HEAD: "/etc/hostname"}), HEAD),
    "nested": Fault(lambda f: split(f, {HEAD: "sub/x.safetensors"}), HEAD),
    "backslash": Fault(lambda f: split(f, {HEAD: "..\\x.safetensors"}), HEAD),
    "hidden": Fault(lambda f: split(f, {HEAD: ".x.safetensors"}), HEAD),
    "not safetensors": Fault(lambda f: split(f, {HEAD: "config.json"}), HEAD),
    "pickle in the index": Fault(lambda f: split(f, {HEAD: "pytorch_model.bin"}), HEAD),
    "nul in the index": Fault(lambda f: split(f, {HEAD: "a\0.safetensors"}), HEAD),
    "not a name": Fault(lambda f: split(f, {HEAD: 7}), HEAD),
    "empty index": Fault(lambda f: split(f, []), "weight_map"),
    "index not a table": Fault(lambda f: split(f, "x"), "weight_map"),
    "index not json": Fault(lambda f: (split(f), write(INDEX, "{")(f)), "JSON"),
    "index too large": Fault(lambda f: (split(f), sparse(f / INDEX, 1 << 30)), "limit"),
    "duplicate index": Fault(
        lambda f: (split(f), write(INDEX, '{"weight_map": {"a": "x", "a": "y"}}')(f)), "duplicate"
    ),
    "index a link outside": Fault(lambda f: (split(f), outside(f / INDEX)), "link"),
    "missing shard": Fault(lambda f: (split(f), (f / FIRST).unlink()), FIRST),
    "tensor not there": Fault(lambda f: split(f, {"a.weight": FIRST}), "a.weight"),
    "tensor elsewhere": Fault(lambda f: split(f, {HEAD: FIRST}), HEAD),
    "tensor not named": Fault(lambda f: (split(f), index(f, {EMBEDDING: FIRST, HEAD: SECOND})), "not in the index"),
    "tensor twice": Fault(lambda f: (split(f), save_file(tensors(), f / FIRST)), "another shard"),
}
FILES = {
    "link outside": Fault(lambda f: outside(shard(f)), "link"),
    "link loop": Fault(lambda f: link(shard(f), shard(f)), "link"),
    "dangling link": Fault(lambda f: link(shard(f), f / "nothing"), "link"),
    "fifo": Fault(lambda f: fifo(shard(f)), "regular"),
    "directory": Fault(lambda f: folder_instead(shard(f)), "regular"),
    "device": Fault(lambda f: link(shard(f), Path("/dev/zero")), "link"),
    "config a fifo": Fault(lambda f: fifo(f / "config.json"), "config.json: not a regular"),
    "config a link outside": Fault(lambda f: outside(f / "config.json"), "config.json: a link"),
    "tokenizer a link outside": Fault(lambda f: outside(f / "tokenizer.json"), "tokenizer.json: a link"),
    "tokenizer a fifo": Fault(lambda f: fifo(f / "tokenizer_config.json"), "tokenizer_config.json"),
    "licence a link outside": Fault(lambda f: outside(f / "LICENSE"), "LICENSE: a link"),
    "template a link outside": Fault(lambda f: outside(f / "chat_template.jinja"), "chat_template.jinja: a link"),
    "templates elsewhere": Fault(lambda f: link(f / "additional_chat_templates", Path("/etc")), "templates"),
    "huge config": Fault(lambda f: sparse(f / "config.json", 1 << 30), "limit"),
    "huge tokenizer": Fault(lambda f: sparse(f / "tokenizer.json", 1 << 40), "limit"),
    "huge template": Fault(lambda f: sparse(f / "chat_template.jinja", 1 << 30), "limit"),
    "line end in a file name": Fault(lambda f: (f / "LICENSE\n::error::x").write_text("x"), "name"),
}
SETTINGS = {
    "no config": Fault(lambda f: (f / "config.json").unlink(), "config.json"),
    "bad json": Fault(write("config.json", "{"), "config.json"),
    "deep json": Fault(write("config.json", "[" * 200_000), "deep"),
    "deep but readable json": Fault(write("config.json", '{"a":' * 900 + "1" + "}" * 900), "model_type"),
    "NaN in json": Fault(write("config.json", '{"model_type": NaN}'), "NaN"),
    "number beyond numbers": Fault(write("config.json", '{"model_type": "llama", "a": 1e999}'), "1e999"),
    "number of 5000 digits": Fault(write("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json"),
    "duplicate keys in config": Fault(write("config.json", '{"model_type": "a", "model_type": "b"}'), "duplicate"),
    "config not a table": Fault(write("config.json", "[1]"), "table"),
    "config in another encoding": Fault(write("config.json", json.dumps(CONFIG).encode("utf-16")), "utf-8"),
    "no model type": Fault(write("config.json", "{}"), "model_type"),
    "hostile model type": Fault(lambda f: config(f, model_type="x\n::error::y"), "model_type"),
    "not causal": Fault(lambda f: config(f, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "architectures not a list": Fault(lambda f: config(f, architectures="LlamaForCausalLM"), "list"),
    "encoder-decoder": Fault(lambda f: config(f, is_encoder_decoder=True), "causal"),
    "already quantized": Fault(
        lambda f: config(f, quantization_config={"quant_method": "gptq"}), "gptq", plain=True
    ),
    "quantized by nobody": Fault(lambda f: config(f, quantization_config=[1]), "quantized"),
    "auto_map": Fault(lambda f: config(f, auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "auto_map inside": Fault(lambda f: config(f, text_config={"a": [{"auto_map": {}}]}), "auto_map"),
    "auto_map in the tokenizer": Fault(write("tokenizer_config.json", '{"auto_map": {}}'), "tokenizer_config.json"),
    "auto_map in the processor": Fault(write("processor_config.json", '{"auto_map": {}}'), "processor_config.json"),
    "auto_map in generation": Fault(write("generation_config.json", '{"auto_map": {}}'), "generation_config.json"),
    "kernel to download": Fault(lambda f: config(f, attn_implementation="org/kernel"), "attn_implementation"),
    "kernel inside": Fault(lambda f: config(f, attn_implementation={"": "org/kernel"}), "attn_implementation"),
    "kernel by the back door": Fault(lambda f: config(f, _attn_implementation_internal="o/k"), "_internal"),
    "kernel of experts": Fault(lambda f: config(f, experts_implementation="o/k"), "experts_implementation"),
    "other weights": Fault(lambda f: config(f, transformers_weights="x.safetensors"), "transformers_weights"),
    "tokenizer elsewhere": Fault(
        write("tokenizer_config.json", '{"fast_tokenizer_files": ["../tokenizer.9.json"]}'), "fast_tokenizer_files"
    ),
    "dtype by name": Fault(lambda f: config(f, dtype="load"), "dtype"),
    "absurd depth": Fault(lambda f: config(f, num_hidden_layers=10**9), "num_hidden_layers"),
    "deeper than its weights": Fault(lambda f: config(f, num_hidden_layers=9000), "num_hidden_layers"),
    "wider than its weights": Fault(lambda f: config(f, hidden_size=900_000), "hidden_size"),
    "negative width": Fault(lambda f: config(f, hidden_size=-4), "hidden_size"),
    "no heads": Fault(lambda f: config(f, num_attention_heads=0), "num_attention_heads"),
    "width in words": Fault(lambda f: config(f, hidden_size="8"), "hidden_size"),
    "width a truth": Fault(lambda f: config(f, num_key_value_heads=True), "num_key_value_heads"),
    "epsilon in words": Fault(lambda f: config(f, rms_norm_eps="small"), "rms_norm_eps"),
    "heads that do not divide": Fault(lambda f: config(f, num_attention_heads=3), "num_attention_heads"),
    "activation of a module": Fault(lambda f: config(f, hidden_act="os.system"), "hidden_act"),
    "words for a truth": Fault(lambda f: config(f, attention_bias="x", mlp_bias=[]), "attention_bias"),
    "negative epsilon": Fault(lambda f: config(f, rms_norm_eps=-1), "rms_norm_eps"),
    "negative theta": Fault(lambda f: config(f, rope_parameters={"rope_theta": -1.0}), "rope_theta"),
    "ties in words": Fault(lambda f: config(f, tie_word_embeddings="no"), "tie_word_embeddings"),
    "padding beyond": Fault(lambda f: config(f, pad_token_id=99), "pad_token_id"),
    "vocabulary lies": Fault(lambda f: config(f, vocab_size=17), "vocab_size"),
    "generation not json": Fault(write("generation_config.json", "{"), "generation_config.json"),
    "tokenizer not json": Fault(write("tokenizer.json", "\x80"), "tokenizer.json"),
    "tokenizer not a table": Fault(write("tokenizer.json", "[]"), "tokenizer.json"),
    "vocabulary with duplicates": Fault(write("vocab.json", '{"a": 1, "a": 2}'), "vocab.json"),
    "token beyond": Fault(write("tokenizer.json", '{"model": {"vocab": {"a": 16}}}'), "token id 16"),
    "added token beyond": Fault(write("tokenizer.json", '{"added_tokens": [{"id": 99}]}'), "token id 99"),
    "list of tokens beyond": Fault(
        write("tokenizer.json", json.dumps({"model": {"vocab": [["a", 0.5]] * 17}})), "token id 16"
    ),
    "an adapter's directory": Fault(write("adapter_config.json", '{"base_model_name_or_path": "o/m"}'), "adapter"),
    "adapter of no rank": Fault(lambda f: adapter(f, rank=0), "adapter/adapter_config.json"),
    "adapter of words": Fault(lambda f: adapter(f, alpha="4"), "adapter/adapter_config.json"),
    "adapter that does not fit": Fault(lambda f: adapter(f, up=(WIDTH, 3)), "not a factor"),
    "adapter damaged": Fault(
        lambda f: (adapter(f), write("adapter/adapter_model.safetensors", b"x")(f)), "adapter_model.safetensors"
    ),
    "adapter pickled": Fault(
        lambda f: (adapter(f), (f / "adapter/adapter_model.safetensors").rename(f / "adapter/adapter_model.bin")),
        "adapter_model.safetensors",
    ),
    "adapter a link outside": Fault(
        lambda f: (adapter(f), outside(f / "adapter/adapter_model.safetensors", 2)), "link"
    ),
    "adapter elsewhere": Fault(lambda f: link(f / "adapter", Path("/etc")), "adapter"),
}  # fmt: skip
FAULTS = SHARDS | INDICES | FILES | SETTINGS
# found when weights are read, of small models before that
WEIGHTS = {
    "NaN": Fault(lambda f: stored(f, lambda t: t[EMBEDDING].__setitem__((3, 2), numpy.nan)), "index 26"),
    "infinity": Fault(lambda f: stored(f, lambda t: t[EMBEDDING].__setitem__((3, 2), -numpy.inf)), "index 26"),
}
# needs the model's class: found once its skeleton is built, before any work
MISFITS = {
    "tensor missing": Fault(lambda f: stored(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "tensor of another model": Fault(lambda f: stored(f, lambda t: t.update(x=t[HEAD])), "do not belong"),
    "tensor of another shape": Fault(
        lambda f: stored(f, lambda t: t.update({"model.norm.weight": t[HEAD][0, :4]})), "model.norm.weight"
    ),
    "unknown type": Fault(lambda f: config(f, model_type="lllama"), "llama"),
    "unknown activation": Fault(lambda f: config(f, hidden_act="geluu"), "config.json"),
    "unknown rotation": Fault(
        lambda f: config(f, rope_parameters={"rope_type": "x", "rope_theta": 1e4}), "config.json"
    ),
}
