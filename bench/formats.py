"""What a format is worth: one width for every linear, each quantizer with the format it makes, no allocation.

    python bench/formats.py demo
    python bench/formats.py demo --table inputs
    python bench/formats.py demo --table attention

The second table rounds what linears read as well, the third keys and values, or attention weights. Quantizers that look
at inputs aim at what the file's own layers read (`quantize.target: residual`, the default). Sizes differ, so read a row
against the rows on both sides of it.
"""

from common import arguments, measure, write

ALONE = {"scorer": "zd", "plan__trials": "false", "calibration__samples": "24"}
WEIGHTS = (
    ("gptq", "[2]", "128"), ("gptq", "[2]", "64"), ("codebook", "[2]", "128"), ("twotier", "[2]", "128"),
    ("gptq", "[3]", "128"), ("gptq", "[3]", "32"), ("twotier", "[3]", "128"), ("codebook", "[3]", "128"),
    ("rtn", "[4]", "128"), ("rtn", "[4]", "64"), ("nf4", "[4]", "64"), ("fp4", "[4]", "64"), ("hqq", "[4]", "64"),
)  # fmt: skip
ATTENTION = (
    ("gptq", "[8]", {"kv_cache": "int8"}),
    ("gptq", "[8]", {"kv_cache": "fp8"}),
    ("gptq", "[8]", {"softmax": "log2", "softmax_bits": "8"}),
    ("gptq", "[8]", {"softmax": "log2", "softmax_bits": "4"}),
    ("gptq", "[4]", {"inputs": "int4-token", "softmax": "log2"}),
)
INPUTS = (
    ("gptq", "[8]", {}),
    ("gptq", "[8]", {"inputs": "int8-token"}),
    ("gptq", "[8]", {"inputs": "int8"}),
    ("gptq", "[8]", {"inputs": "int8", "input_clip": "none"}),
    ("gptq", "[8]", {"inputs": "int8", "rewrite.methods": "[repquant]"}),
    ("gptq", "[8]", {"inputs": "int8-symmetric"}),
    ("gptq", "[8]", {"inputs": "int8-symmetric", "input_clip": "none"}),
    ("rtn", "[8]", {"inputs": "int8"}),
    ("fp8", "[8]", {}),
    ("fp8", "[8]", {"inputs": "fp8-token"}),
    ("fp8", "[8]", {"inputs": "fp8"}),
    ("gptq", "[4]", {}),
    ("gptq", "[4]", {"inputs": "int8-token"}),
    ("gptq", "[4]", {"inputs": "int8"}),
    ("gptq", "[4]", {"inputs": "int4-token"}),
    ("gptq", "[4]", {"inputs": "int4"}),
)

if __name__ == "__main__":
    options = arguments(__doc__ or "", tables=("weights", "inputs", "attention"))
    tables = {"weights": [(name, bits, {"plan.group_size": size}) for name, bits, size in WEIGHTS]}
    for table, cases in (("inputs", INPUTS), ("attention", ATTENTION)):
        tables[table] = [
            (name, bits, {k if "." in k else f"quantize.{k}": v for k, v in said.items()}) for name, bits, said in cases
        ]
    rows = []
    for name, bits, said in tables[options.table]:
        label = " ".join([name, bits, *(f"{key.rpartition('.')[2]}={value}" for key, value in said.items())])
        rows.append(measure(options, label, "9bits", quantizer=name, plan__bits=bits, **said, **ALONE))
    write(options, rows, calibration_samples=24)
