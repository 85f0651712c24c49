"""What a format is worth: one width for every linear, each quantizer with the format it makes, no allocation.

    python bench/formats.py demo

Quantizers that look at inputs aim at what the file's own layers read (`quantize.target: residual`, the default). Sizes
differ, so read a row against the rows on both sides of it.
"""

from common import arguments, measure, write

ALONE = {"scorer": "zd", "plan__trials": "false", "calibration__samples": "24"}
ROWS = (
    ("gptq", "[2]", "128"), ("gptq", "[2]", "64"), ("codebook", "[2]", "128"), ("twotier", "[2]", "128"),
    ("gptq", "[3]", "128"), ("gptq", "[3]", "32"), ("twotier", "[3]", "128"), ("codebook", "[3]", "128"),
    ("rtn", "[4]", "128"), ("rtn", "[4]", "64"), ("nf4", "[4]", "64"), ("fp4", "[4]", "64"), ("hqq", "[4]", "64"),
)  # fmt: skip

if __name__ == "__main__":
    options = arguments(__doc__ or "")
    rows = [
        measure(options, f"{name} {bits}, groups of {size}", "9bits", quantizer=name, plan__bits=bits,
                plan__group_size=size, **ALONE)
        for name, bits, size in ROWS
    ]  # fmt: skip
    write(options, rows, calibration_samples=24)
