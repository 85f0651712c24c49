"""What a checkpoint can be exported to, one format per file.

Each has `write(checkpoint, folder, options) -> Written`, which puts weights and config into `folder` or raises
InputError with the reason why the format cannot hold them; `reopen(checkpoint, folder) -> Skeleton`, the model as a
reader of those files sees it, tensors under the names they have in `checkpoint`; `OPTIONS`, the fields of `Options` it
reads; and for the model card `TITLE`, `TAG`, `LIBRARY`, and `opens_with(folder)`, what opens it.
"""
