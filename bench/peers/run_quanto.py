"""optimum-quanto: rounding with scales by range or by half-quadratic search; it picks its group size itself."""

from typing import Any

from job import Job, run
from optimum.quanto import HqqOptimizer, MaxOptimizer, QuantizedModelForCausalLM, qint2, qint4

WIDTHS = {2: qint2, 4: qint4}


def quantize(job: Job) -> None:
    optimizer = HqqOptimizer() if job.settings["scales"] == "hqq" else MaxOptimizer()
    with job.timed():
        model = job.source()
        made = QuantizedModelForCausalLM.quantize(
            model, weights=WIDTHS[int(job.bits)], exclude="lm_head", optimizer=optimizer
        )
        made.save_pretrained(job.output)
    sizes = {name: getattr(module, "weight_group_size", None) for name, module in model.named_modules()}
    job.facts["group_sizes"] = {name: sizes[name] for name, _, _ in job.linears}


def reload(job: Job) -> Any:
    return QuantizedModelForCausalLM.from_pretrained(str(job.output))._wrapped


if __name__ == "__main__":
    run(("optimum-quanto",), quantize, reload)
