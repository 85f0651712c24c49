"""The tensors that stand for one quantized linear in a file, by its format: written, foreseen, and read.

Names begin with the linear's stem, the name of its weight without `.weight`:

    int         .weight_packed int32 (rows, words)   .weight_scale 16-bit (rows, groups)   .weight_shape int64 (2,)
                with high columns also .weight_packed_high, and .weight_high, a bit for each column, in uint8
    asymmetric  the same with .weight_zero uint8 (rows, groups)
    codebook    .weight_packed, .weight_codebook float16 (rows, 2**bits), .weight_shape
    int8, fp8   .weight int8 or float8_e4m3fn (rows, columns)   .weight_scale 16-bit (rows, 1)
    nf4, fp4    what bitsandbytes stores: .weight, .weight.absmax, .weight.quant_map, a JSON record, and with a double
                scale .weight.nested_absmax and .weight.nested_quant_map

and with a low-rank correction .weight_up 16-bit (rows, rank) and .weight_down 16-bit (rank, columns), whose product is
added to the weight of the codes; where inputs are rounded under a scale from calibration, .input_scale 16-bit (1,) and
.input_zero_point int8 (1,).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.files import parse_json
from llmcompress.kernels import fourbit, reference, words
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.inputs import FLOAT8, InputQuantizer
from llmcompress.spec import DOUBLE_BLOCK, FOUR_BIT, HIGH_BITS, PER_ROW, STATE_BYTES, InputSpec, LinearSpec

Read = Callable[[str], Tensor]
Layout = dict[str, tuple[str, tuple[int, ...]]]

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
ZERO, CODEBOOK = ".weight_zero", ".weight_codebook"
PACKED_HIGH, HIGH = ".weight_packed_high", ".weight_high"
WEIGHT, ABSMAX, MAP = ".weight", ".weight.absmax", ".weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = ".weight.nested_absmax", ".weight.nested_quant_map"
STATE = ".weight.quant_state.bitsandbytes__"
UP, DOWN = ".weight_up", ".weight_down"
INPUT_SCALE, INPUT_ZERO = ".input_scale", ".input_zero_point"
INPUT_PARTS = (INPUT_SCALE, INPUT_ZERO)
BESIDE = (UP, DOWN, *INPUT_PARTS)  # what is no affair of a kernel that multiplies with codes
PACKED_PARTS = (PACKED, SCALE, ZERO, CODEBOOK, PACKED_HIGH, HIGH, SHAPE, *BESIDE)
PER_ROW_PARTS = (WEIGHT, SCALE, *INPUT_PARTS)
FOUR_BIT_PARTS = (WEIGHT, ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP, *(STATE + kind for kind in FOUR_BIT), *INPUT_PARTS)


def parts_of(spec: LinearSpec, columns: int) -> tuple[str, ...]:
    """What the names of the tensors of a linear end with; they begin with its stem."""
    return _weight_parts(spec, columns) + input_parts(spec.inputs)


def input_parts(spec: InputSpec | None) -> tuple[str, ...]:
    """What the names of the tensors end with that say how inputs are rounded."""
    if spec is None or spec.scale == "token":
        return ()
    return (INPUT_SCALE,) if spec.symmetric else INPUT_PARTS


def _weight_parts(spec: LinearSpec, columns: int) -> tuple[str, ...]:
    if spec.kind in PER_ROW:
        return (WEIGHT, SCALE)
    if spec.kind in FOUR_BIT:
        nested = (NESTED_ABSMAX, NESTED_MAP) if spec.double else ()
        return (WEIGHT, ABSMAX, MAP, *nested, STATE + spec.kind)
    factors = (UP, DOWN) if spec.rank else ()
    if spec.kind == "codebook":
        return (PACKED, CODEBOOK, SHAPE, *factors)
    zero = (ZERO,) if spec.kind == "asymmetric" else ()
    high = (PACKED_HIGH, HIGH) if spec.high_columns(columns) else ()
    return (PACKED, SCALE, *zero, *high, SHAPE, *factors)


def layout_of(stem: str, spec: LinearSpec, size: tuple[int, int], scale_dtype: str) -> Layout:
    """Dtype and shape of the tensors of a linear of `size` (rows, columns), without making them."""
    rows, columns = size
    inputs: Layout = {INPUT_SCALE: (scale_dtype, (1,)), INPUT_ZERO: ("I8", (1,))}
    if spec.kind in FOUR_BIT:
        return _four_bit_layout(stem, spec, rows * columns) | _named(stem, inputs, input_parts(spec.inputs))
    high = spec.high_columns(columns)
    groups = columns // spec.group_size if spec.group_size else 0
    known: Layout = {
        PACKED: ("I32", (rows, reference.words_per_row(columns - high, spec.bits))),
        PACKED_HIGH: ("I32", (rows, reference.words_per_row(high, spec.bits + HIGH_BITS))),
        HIGH: ("U8", (-(-columns // 8),)),
        SCALE: (scale_dtype, (rows, groups)),
        ZERO: ("U8", (rows, groups)),
        CODEBOOK: ("F16", (rows, 1 << spec.bits)),
        SHAPE: ("I64", (2,)),
        UP: (scale_dtype, (rows, spec.rank_of(rows, columns))),
        DOWN: (scale_dtype, (spec.rank_of(rows, columns), columns)),
        WEIGHT: ("F8_E4M3" if spec.kind == "fp8" else "I8", (rows, columns)),
    }
    return _named(stem, known | inputs, parts_of(spec, columns))


def _named(stem: str, known: Layout, parts: tuple[str, ...]) -> Layout:
    return {stem + part: known[part] for part in parts}


def _four_bit_layout(stem: str, spec: LinearSpec, weights: int) -> Layout:
    blocks = -(-weights // spec.group_size)
    known: Layout = {
        WEIGHT: ("U8", (-(-weights // 2), 1)),
        ABSMAX: ("U8" if spec.double else "F32", (blocks,)),
        MAP: ("F32", (16,)),
        NESTED_ABSMAX: ("F32", (-(-blocks // DOUBLE_BLOCK),)),
        NESTED_MAP: ("F32", (256,)),
        STATE + spec.kind: ("U8", (STATE_BYTES[spec.double],)),
    }
    return _named(stem, known, _weight_parts(spec, 0))


def tensors_of(stem: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors of a linear, those of `layout_of` with their contents, on the CPU."""
    spec = codes.spec
    rows, columns = codes.codes.shape
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    found: dict[str, Tensor | None]
    if spec.kind in FOUR_BIT:
        found = _four_bit_tensors(codes)
    elif spec.kind in PER_ROW:
        found = {WEIGHT: _bytes_of(codes), SCALE: codes.scale}
    else:
        low = codes.codes if codes.high is None else codes.codes[:, ~codes.high]
        found = {PACKED: words.pack(low, spec.bits), SCALE: codes.scale, ZERO: codes.zero}
        found |= {CODEBOOK: codes.codebook, SHAPE: shape, UP: codes.up, DOWN: codes.down}
    if codes.high is not None:
        found[PACKED_HIGH] = words.pack(codes.codes[:, codes.high], spec.bits + HIGH_BITS)
        bits = numpy.packbits(codes.high.cpu().numpy(), bitorder="little")
        found[HIGH] = torch.from_numpy(bits)
    if codes.inputs is not None:
        found |= {INPUT_SCALE: codes.inputs.scale, INPUT_ZERO: codes.inputs.zero}
    wanted = parts_of(spec, columns)
    return {stem + part: tensor.cpu().contiguous() for part in wanted if (tensor := found[part]) is not None}


def misshapen_layout(layout: Layout) -> Layout:
    """The same with every weight of one byte each in a single column, so that no stranger takes it for the weight."""
    return {
        n: (d, (math.prod(s), 1)) if n.endswith(WEIGHT) and d in ("I8", "F8_E4M3") else (d, s)
        for n, (d, s) in layout.items()
    }


def misshapen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `misshapen_layout`."""
    return {
        n: t.view(-1, 1) if n.endswith(WEIGHT) and t.dtype in (torch.int8, FLOAT8) else t for n, t in tensors.items()
    }


def _bytes_of(codes: Codes) -> Tensor:
    """One byte for each weight: the code around zero, or the float8."""
    if codes.spec.kind == "fp8":
        return codes.codes.view(FLOAT8)
    return (codes.codes.to(torch.int16) - 128).to(torch.int8)


def _codes_of_bytes(stem: str, spec: LinearSpec, tensor: Tensor) -> Tensor:
    wanted = FLOAT8 if spec.kind == "fp8" else torch.int8
    if tensor.dtype != wanted or tensor.numel() % spec.group_size:
        raise InputError(f"{stem}{WEIGHT}: not what its format needs", "config.json and the shards are not of one run")
    rows = tensor.view(-1, spec.group_size)
    return rows.view(torch.uint8) if spec.kind == "fp8" else (rows.to(torch.int16) + 128).to(torch.uint8)


def _four_bit_tensors(codes: Codes) -> dict[str, Tensor | None]:
    spec, double = codes.spec, codes.double
    return {
        WEIGHT: fourbit.pack_nibbles(codes.codes, spec.kind),
        ABSMAX: codes.scale if double is None else double.codes,
        MAP: fourbit.table_of(spec.kind),
        NESTED_ABSMAX: None if double is None else double.absmax,
        NESTED_MAP: None if double is None else fourbit.dynamic_table(),
        STATE + spec.kind: _state(codes),
    }


def _state(codes: Codes) -> Tensor:
    """The record of a 4-bit weight: JSON, padded with spaces so that its size is known beforehand."""
    spec = codes.spec
    record: dict[str, object] = {
        "quant_type": spec.kind,
        "blocksize": spec.group_size,
        "dtype": "float32",
        "shape": list(codes.codes.shape),
    }
    if codes.double is not None:
        # nine digits give a float32 back exactly
        offset = float(f"{float(codes.double.offset):.8e}")
        record |= {"nested_blocksize": DOUBLE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(record).encode().ljust(STATE_BYTES[spec.double])
    return torch.from_numpy(numpy.frombuffer(text, dtype=numpy.uint8).copy())


def codes_of(stem: str, spec: LinearSpec, read: Read) -> Codes:
    """A linear from its tensors. Raises InputError where their shapes are not those of `spec`."""
    return replace(_weight_codes(stem, spec, read), inputs=inputs_of(stem, spec.inputs, read))


def inputs_of(stem: str, spec: InputSpec | None, read: Read) -> InputQuantizer | None:
    """What rounds the inputs of a linear. Raises InputError where a scale is not a single positive number."""
    if spec is None:
        return None
    tensors = {part: read(stem + part) for part in input_parts(spec)}
    for part, tensor in tensors.items():
        if tensor.numel() != 1 or (part == INPUT_SCALE and not 0 < float(tensor) < math.inf):
            raise InputError(f"{stem}{part}: not one number, and a scale positive", "the file is damaged")
    return InputQuantizer(spec, tensors.get(INPUT_SCALE), tensors.get(INPUT_ZERO))


def _weight_codes(stem: str, spec: LinearSpec, read: Read) -> Codes:
    if spec.kind in PER_ROW:
        codes, scale = _codes_of_bytes(stem, spec, read(stem + WEIGHT)), read(stem + SCALE)
        _check_shape(stem + SCALE, scale, (len(codes), 1))
        return Codes(codes, scale, spec)
    if spec.kind in FOUR_BIT:
        return _read_four_bit(stem, spec, read)
    rows, columns = size_of(stem, spec.kind, read)
    tensors = {part: read(stem + part) for part in _weight_parts(spec, columns)}
    for name, (_, shape) in layout_of(stem, spec, (rows, columns), "BF16").items():
        if name.removeprefix(stem) in tensors:
            _check_shape(name, tensors[name.removeprefix(stem)], shape)
    packed = tensors[PACKED].to(torch.int32)
    high = None
    if HIGH in tensors:
        bits = numpy.unpackbits(tensors[HIGH].cpu().numpy(), bitorder="little", count=columns)
        high = torch.from_numpy(bits.astype(bool)).to(packed.device)
        if int(high.sum()) != spec.high_columns(columns):
            raise InputError(f"{stem}{HIGH}: not {spec.high_columns(columns)} columns", "the file is damaged")
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=packed.device)
        codes[:, ~high] = words.unpack(packed, spec.bits, columns - int(high.sum()))
        codes[:, high] = words.unpack(tensors[PACKED_HIGH], spec.bits + HIGH_BITS, int(high.sum()))
    else:
        codes = words.unpack(packed, spec.bits, columns)
    scale = tensors.get(SCALE, torch.empty((rows, 0)))
    found = Codes(codes, scale, spec, zero=tensors.get(ZERO), codebook=tensors.get(CODEBOOK), high=high)
    return replace(found, up=tensors.get(UP), down=tensors.get(DOWN))


def _read_four_bit(stem: str, spec: LinearSpec, read: Read) -> Codes:
    rows, columns = size_of(stem, spec.kind, read)
    tensors = {part: read(stem + part) for part in _weight_parts(spec, columns)}
    for name, (_, shape) in _four_bit_layout(stem, spec, rows * columns).items():
        if not name.endswith(STATE + spec.kind):
            _check_shape(name, tensors[name.removeprefix(stem)], shape)
    codes = fourbit.unpack_nibbles(tensors[WEIGHT], rows, columns)
    if not spec.double:
        return Codes(codes, tensors[ABSMAX], spec)
    offset = nested_offset(spec.kind, tensors)
    double = fourbit.DoubleScale(tensors[ABSMAX], tensors[NESTED_ABSMAX], offset)
    return Codes(codes, double.decode(), spec, double=double)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{name}: shape {tuple(tensor.shape)}, its format needs {shape}",
            "config.json and the shards are not of one run",
        )


@dataclass(frozen=True)
class _Record:
    """What the JSON record of a 4-bit weight says."""

    rows: int
    columns: int
    block: int
    offset: float


def _record(stem: str, kind: str, read: Read) -> _Record:
    """The JSON record of a 4-bit weight. Raises InputError when it is damaged."""
    name = stem + STATE + kind
    try:
        document = parse_json(read(name).cpu().numpy().tobytes(), name)
        rows, columns = document["shape"]
        offset = float(document.get("nested_offset", 0.0))
        found = _Record(int(rows), int(columns), int(document["blocksize"]), offset)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{name}: not the record of a 4-bit weight", "the file is damaged") from None
    if min(found.rows, found.columns, found.block) < 1:
        raise InputError(f"{name}: sizes that are not positive", "the file is damaged")
    return found


def nested_offset(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What is added to each scale of a doubly quantized linear, float32 `()`; tensors by the ends of their names."""
    offset = _record("", kind, lambda name: tensors[name]).offset
    return torch.tensor(offset, dtype=torch.float32, device=tensors[WEIGHT].device)


def size_of(stem: str, kind: str | None, read: Read) -> tuple[int, int]:
    """Rows and columns of a linear, from its smallest tensors; `kind` is `nf4` or `fp4`, or None for any other."""
    if kind in FOUR_BIT:
        record = _record(stem, kind, read)
        return record.rows, record.columns
    shape = read(stem + SHAPE)
    if shape.numel() != 2 or int(shape.min()) < 1:
        raise InputError(f"{stem}{SHAPE}: not two sizes", "the file is damaged")
    return int(shape[0]), int(shape[1])


def four_bit_spec(stem: str, kind: str, double: bool, read: Read) -> LinearSpec:
    """The format of a 4-bit weight from its record. Raises InputError when it is damaged."""
    if kind not in FOUR_BIT:
        raise InputError(f"{stem}{STATE}{kind[:20]}: not a known type", "it should be nf4 or fp4")
    block = _record(stem, kind, read).block
    return LinearSpec.model_validate({"bits": 4, "group_size": block, "kind": kind, "double": double})
