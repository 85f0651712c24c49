"""What allocation is worth at 3.5 bits: our default against uniform and two-width mixes, same quantizer.

    python bench/allocation.py demo

Every row may use at most 3.5 bits per weight over the linears. Two-width mixes are spent by block order (LIM, ZD),
by the local proxy loss, and by our own scores restricted to two widths.
"""

from common import arguments, measure, write

MIXES = (("lim", "[3, 4]"), ("lim", "[2, 4]"), ("zd", "[3, 4]"), ("hessian", "[3, 4]"), ("fisher", "[3, 4]"),
         ("fisher", "[2, 4]"), ("fisher", "[3, 5]"))  # fmt: skip

if __name__ == "__main__":
    options = arguments(__doc__ or "")
    rows = [measure(options, "default, {2,3,4,5,6,8}", "3.5bits")]
    rows.append(measure(options, "uniform 3", "3.5bits", plan__bits="[3]"))
    for scorer, bits in MIXES:
        rows.append(measure(options, f"{scorer} {bits}", "3.5bits", scorer=scorer, plan__bits=bits))
    best = min(rows[1:], key=lambda row: row.kld)
    print(f"default / best other in KL: {rows[0].kld / best.kld:.3f} ({best.label})")
    write(options, rows, default_over_best_other=rows[0].kld / best.kld, best_other=best.label)
