"""On-disk layouts, one per file.

Each has `holds(specs)`, whether it can hold linears of these formats together; `packed_tensors(linear, codes)` and
`packed_layout(linear, spec, scale_dtype)`, the tensors that replace one weight, and the same without their contents;
`config_document(source, plan, trace, heads)`, the config.json of the output; and for the model card `TITLE`, `TAG`,
`LIBRARY` and `opens_with(transposed)`, a sentence on what opens it.
"""
