"""Rounding methods, one per file: `quantize(weight, hessian, spec, ...) -> Quantized`."""
