"""What allocation is worth at a budget: our default against uniform and two-width mixes, same quantizer.

    python bench/allocation.py demo --budget 3.5bits

Every row but the first is one allocation, without trials or exchange. Two-width orders are those of arXiv 2406.17415:
whole blocks, the most important ones wide. The other mixes are spent by the integer program on the scores named.
"""

from common import arguments, measure, write

ORDERS = (("lim", "[3, 4]"), ("lim", "[2, 4]"), ("zd", "[3, 4]"), ("zd", "[2, 4]"))
MIXES = (("hessian", "[3, 4]"), ("fisher", "[3, 4]"), ("fisher", "[2, 4]"), ("fisher", "[2, 3, 4, 5, 6, 8]"))
ALONE = {"plan__trials": "false", "plan__exchange": "0"}

if __name__ == "__main__":
    options = arguments(__doc__ or "", budget="3.5bits")
    budget = options.budget
    rows = [measure(options, "default", budget), measure(options, "default, exchange 2", budget, plan__exchange="2")]
    for size in ("128", "64"):
        rows.append(measure(options, f"uniform 3, groups of {size}", budget, plan__bits="[3]",
                            plan__group_size=size, **ALONE))  # fmt: skip
    for scorer, bits in ORDERS:
        rows.append(measure(options, f"order by {scorer}, {bits}", budget, scorer=scorer, plan__program="order",
                            plan__bits=bits, **ALONE))  # fmt: skip
    for scorer, bits in MIXES:
        rows.append(measure(options, f"{scorer}, {bits}", budget, scorer=scorer, plan__bits=bits, **ALONE))
    rows.append(measure(options, "fisher, quadratic, [3, 4, 5]", budget, plan__program="quadratic",
                        plan__bits="[3, 4, 5]", **ALONE))  # fmt: skip
    best = min(rows[2:], key=lambda row: row.kld)
    ratios = {row.label: rows[0].kld / row.kld for row in rows[1:]}
    print(f"default / best other in KL: {rows[0].kld / best.kld:.3f} ({best.label})")
    write(options, rows, default_over=ratios, best_other=best.label)
