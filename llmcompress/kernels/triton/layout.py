"""From the tensors of a file to those that kernels read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels import fourbit, stored
from llmcompress.kernels.triton.bits import Planar, planar
from llmcompress.spec import FOUR_BIT, LinearSpec

NO_TABLE, ONE_TABLE, TABLE_PER_ROW = 0, 1, 2
CHUNK_CODES = 1 << 24  # rows are repacked in chunks of about this many codes
COUNTERS = 1 << 12  # tiles of one product that several programs may share


@dataclass(frozen=True)
class Packing:
    """How the weight of one linear lies in memory, as far as a kernel must know when it is compiled.

    group   codes that share a scale; 0: the whole row, or no scales
    zero    groups have zero-points
    table   whether codes are places in a table, and in whose
    kind    the table's name, where it is one for all rows
    planar  the order of codes; None: as in the file
    """

    bits: int
    columns: int
    group: int
    zero: bool
    table: int
    kind: str
    planar: Planar | None

    @property
    def blocks(self) -> int:
        """Of a row, the last one padded; the row itself, where there is no planar order."""
        return self.planar.blocks(self.columns) if self.planar else 1

    @property
    def label(self) -> str:
        """What tuning tables call it."""
        kind = ("int", "table", "codebook")[self.table]
        return f"{kind}{self.bits}{'z' if self.zero else ''}"


def packing_of(spec: LinearSpec, columns: int) -> Packing:
    """The packing that `prepare` chooses for rows of `columns` codes."""
    group = 0 if spec.group_size in (0, columns) else spec.group_size
    table = ONE_TABLE if spec.kind in FOUR_BIT else TABLE_PER_ROW if spec.kind == "codebook" else NO_TABLE
    kind = spec.kind if table == ONE_TABLE else ""
    order = planar(spec.bits, group, columns, paired=table == ONE_TABLE)
    return Packing(spec.bits, columns, group, spec.kind == "asymmetric", table, kind, order)


def prepare(tensors: Mapping[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of one linear, named by the parts of `stored.parts_of`, as kernels read them, on the same device.

    words     int16 `(rows, words)`, planar, or int32 as in the file
    scale     (groups, rows), int: the dtype of the file; nf4, fp4: float32, doubly quantized ones decoded
    zero      uint8 (groups, rows)
    table     float32 `(1 or rows, 2**bits)`
    counters  int32 zeros; kernels leave zeros behind
    """
    codes = stored.codes_of("", spec, tensors.__getitem__)
    rows, columns = codes.codes.shape
    packing = packing_of(spec, columns)
    device = next(iter(tensors.values())).device
    found = {"counters": torch.zeros(COUNTERS, dtype=torch.int32)}
    if packing.planar is None:
        found["words"] = tensors[stored.PACKED].contiguous()
    else:
        found["words"] = planar_words(codes.codes, packing.planar)
    if codes.scale.numel():
        found["scale"] = codes.scale.view(rows, -1).T.contiguous()
    if codes.zero is not None:
        found["zero"] = codes.zero.T.contiguous()
    if packing.table == ONE_TABLE:
        found["table"] = fourbit.table_of(spec.kind)[None, :]
    elif codes.codebook is not None:
        found["table"] = codes.codebook.float()
    return {name: tensor.to(device) for name, tensor in found.items()}


def join(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several weights of one format, as `prepare` made them, one below the other."""
    first = weights[0]
    found = {"counters": first["counters"], "words": torch.cat([weight["words"] for weight in weights])}
    for name in ("scale", "zero"):
        if name in first:
            found[name] = torch.cat([weight[name] for weight in weights], dim=1)
    if "table" in first:
        shared = len(first["table"]) == 1 < len(first["words"])
        found["table"] = first["table"] if shared else torch.cat([weight["table"] for weight in weights])
    return found


def part(weight: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Rows `first ... last - 1` of a joined weight, scales and zero-points copied."""
    found = {"counters": weight["counters"], "words": weight["words"][first:last]}
    found |= {name: weight[name][:, first:last].contiguous() for name in ("scale", "zero") if name in weight}
    if "table" in weight:
        shared = len(weight["table"]) == 1 < len(weight["words"])
        found["table"] = weight["table"] if shared else weight["table"][first:last]
    return found


def planar_words(codes: Tensor, order: Planar) -> Tensor:
    """Codes uint8 `(rows, columns)` as int16 `(rows, words)` in the order of `bits.py`; zeros fill the last block."""
    rows, columns = codes.shape
    blocks = order.blocks(columns)
    words = torch.empty((rows, blocks * order.planes * order.words), dtype=torch.int16, device=codes.device)
    step = max(CHUNK_CODES // columns, 1)
    for start in range(0, rows, step):
        part = torch.nn.functional.pad(codes[start : start + step], (0, blocks * order.block - columns))
        fields = part.view(-1, blocks, order.fields, order.words).to(torch.int16)
        words[start : start + step] = _words(fields, order).reshape(len(part), -1)
    return words


def _words(fields: Tensor, order: Planar) -> Tensor:
    """Fields int16 `(rows, blocks, fields, run)` to words int16 `(rows, blocks, planes, run)`."""
    if order.paired:  # word of two, field of two, pair of codes, code of two
        parts = fields.view(*fields.shape[:2], 2, 2, order.words // 2, 2).permute(0, 1, 3, 5, 4, 2)
        return _side_by_side(parts.reshape(*fields.shape[:2], 1, 4, order.words), 4)
    if order.bits != 3:
        return _side_by_side(fields[:, :, None], order.bits)
    fields = fields.view(*fields.shape[:2], 4, 4, order.words)  # three planes, and the word that is spread over them
    top = torch.stack([(fields[:, :, 3] >> plane) & 1 for plane in range(3)], dim=2)
    return _side_by_side(fields[:, :, :3] | (top << 3), 4)


def _side_by_side(fields: Tensor, stride: int) -> Tensor:
    """The fields of each word, `(..., fields, run)`, `stride` bits apart in one int16."""
    found = fields[..., 0, :].clone()
    for field in range(1, fields.shape[-2]):
        found |= fields[..., field, :] << (field * stride)
    return found
