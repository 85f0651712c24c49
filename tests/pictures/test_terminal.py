"""The forms for terminals: one line a block, plain characters unless bars are asked for."""

from synthetic_scores import make_file, make_trace, usage_series

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.decide import decide, desk_of, pick
from llmcompress.pictures.columns import columns_of
from llmcompress.pictures.terminal import BARS, aligned, heat_map_lines, void_map_lines
from llmcompress.pictures.voidmap import usage_of
from llmcompress.types import Assigned, BitAllocation, LinearSpec


def test_heat_map_shows_every_unit_of_every_block() -> None:
    file = make_file(80, head=True)
    allocation = decide(desk_of(file, pick(file)), parse_budget("3.5bits"))
    lines = heat_map_lines(file.trace, allocation)
    assert lines[0].split() == ["block", "q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    assert all(line.isascii() for line in lines)
    assert max(map(len, lines)) <= 80
    bits = {a.linear: str(a.spec.bits) for a in allocation.assigned}
    for block, line in zip(file.trace.blocks, lines[1:], strict=False):
        firsts = (0, 3, 4, 6)
        assert line.split() == [str(block.index), *(bits[block.linears[place].name] for place in firsts)]
    assert lines[-1].split() == ["head", "lm_head", "kept"]
    assert len(lines) == 82


def test_bars_grow_with_the_width_and_change_no_number() -> None:
    file = make_file(4)
    allocation = decide(desk_of(file, pick(file)), parse_budget("4bits"))
    plain, barred = (heat_map_lines(file.trace, allocation, bars=bars) for bars in (False, True))
    stripped = ["".join(" " if letter in BARS else letter for letter in line).split() for line in barred]
    assert stripped == [line.split() for line in plain]
    assert any(letter in BARS[1:] for line in barred for letter in line)


def test_units_that_disagree_and_linears_left_out_are_told() -> None:
    file = make_file(1)
    allocation = decide(desk_of(file, pick(file)), parse_budget("4bits"))
    names = [x.name for x in file.trace.linears]
    assigned = tuple(
        Assigned(linear=name, spec=LinearSpec(bits=bits, group_size=128))
        for name, bits in zip(names[:3], (3, 4, 3), strict=True)
    )
    changed: BitAllocation = allocation.model_copy(update={"assigned": assigned})
    assert heat_map_lines(file.trace, changed)[1].split() == ["0", "3/4", "kept", "kept", "kept"]


def test_void_map_lines() -> None:
    usage = usage_of(usage_series(8))
    lines = void_map_lines(usage)
    assert len(lines) == 9
    assert all(line.isascii() for line in lines)
    assert lines[2].split() == ["1", "7", "%", "7", "%"]
    barred = void_map_lines(usage, bars=True)
    assert barred[2].count("█") == 1
    assert barred[2].count("░") == 19
    assert void_map_lines({}) == ["block"]


def test_nothing_in_a_table_is_cut() -> None:
    lines = aligned(["name", "value"], [["x" * 90, "1"], ["y", "22"]])
    assert lines[1] == "x" * 90 + "      1"
    assert lines[2].endswith("22")
    assert len({len(line) for line in lines}) == 1


def test_names_that_end_alike_keep_their_path() -> None:
    trace = make_trace(2)
    renamed = [
        b.model_copy(
            update={
                "linears": tuple(
                    x.model_copy(update={"name": f"{b.name}.{path}"})
                    for x, path in zip(
                        b.linears, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), strict=False
                    )
                )
            }
        )
        for b in trace.blocks
    ]
    columns = columns_of(trace.model_copy(update={"blocks": tuple(renamed)}))
    assert set(columns.kinds) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
