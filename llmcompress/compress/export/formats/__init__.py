"""What a checkpoint can be exported to, one format per file.

Each has `write(checkpoint, folder, options) -> Written`, which puts weights and config into `folder` or raises
InputError with the reason why the format cannot hold them; `decode(folder)`, what shows those files as a plain
checkpoint, or, where they are no checkpoint by themselves, `reopen(checkpoint, folder) -> Skeleton`, the model with
tensors under the names they have in `checkpoint`, and `tensors(folder)`, all of them, where
`available()`; `OPTIONS`, the fields of
`Options` it reads; and for the model card `TITLE`, `TAG`, `LIBRARY`, and `opens_with(folder)`, what opens it.
"""
