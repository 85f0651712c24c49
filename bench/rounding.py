"""Does GPTQ earn its keep? `gptq` against `rtn` at uniform 3 bits: same format, same bytes.

python bench/rounding.py demo
"""

from common import arguments, measure, write

if __name__ == "__main__":
    options = arguments(__doc__ or "")
    rows = [measure(options, name, "8bits", quantizer=name, plan__bits="[3]") for name in ("rtn", "gptq")]
    ratio = rows[1].kld / rows[0].kld
    print(f"gptq / rtn in KL: {ratio:.3f}")
    write(options, rows, gptq_over_rtn=ratio)
