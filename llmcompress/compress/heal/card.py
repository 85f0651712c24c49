"""The README.md of a healed checkpoint: the one it had, where we wrote it, and a section on the healing."""

from pathlib import Path

from llmcompress.compress.card import card
from llmcompress.compress.heal.records import Figure, HealRecord
from llmcompress.compress.heal.write import is_ours
from llmcompress.compress.output import Origin
from llmcompress.hub.card import CARD_NAME, plain
from llmcompress.runtime.adapter import FOLDER


def healed_card(source: Path, origin: Origin, record: HealRecord) -> str:
    """The whole card."""
    before = source / CARD_NAME
    known = before.read_text(encoding="utf-8") if is_ours(source) and before.is_file() else _front(origin)
    return f"{known.rstrip()}\n\n{_section(record)}"


def _front(origin: Origin) -> str:
    return card(origin, "finetune", ("healed",), f"# {plain(origin.name)}, healed\n")


def _section(record: HealRecord) -> str:
    return f"""## Healed

{_what(record)}

| on {record.sequences} sequences that neither trained nor stopped it | before | after |
|---|---|---|
| KL to `{plain(record.against)}`, nats per token | {_cell(record.kld_before)} | {_cell(record.kld)} |
| rise of the loss, nats per token | {_cell(record.rise_before)} | {_cell(record.rise)} |

    {record.command}
{_opening(record)}"""


def _cell(figure: Figure) -> str:
    return f"{figure.mean:.5f} [{figure.low:.5f}, {figure.high:.5f}]"


def _what(record: HealRecord) -> str:
    blocks = ", ".join(map(str, record.blocks))
    if not record.helped:
        return (
            f"Tried on blocks {blocks} (`--at {record.at}`, {record.method}), and nothing helped: "
            "every weight is what it was."
        )
    norms = "gains of norms, and quantization scales or corrections of tied blocks where there are"
    what = "low-rank adapters" if record.method == "lora" else norms
    return (
        f"Trained to give the answers of `{plain(record.against)}`: {what}, in blocks {blocks} (`--at {record.at}`), "
        f"{record.parameters:,} numbers, {record.steps} steps on {record.tokens:,} tokens of "
        f"{plain(record.calibration)}; the numbers kept are those after step {record.best_step}."
    )


def _opening(record: HealRecord) -> str:
    if not record.adapter_bytes:
        return ""
    return f"""
The adapters lie in `{FOLDER}/`, {record.adapter_bytes:,} bytes, in peft's format. The checkpoint beside
them is what it was, and computes as before where it is opened alone. `llmcompress eval` and `verify` add them.
Elsewhere, with PATH this folder:

    base = llmcompress.load(PATH, dense=True)
    model = peft.PeftModel.from_pretrained(base, PATH + "/{FOLDER}")
"""
