"""Pre-RMSNorm (arXiv 2305.14858): centre everything that writes the residual stream, so that LayerNorm is RMSNorm.

With a stream of zero mean the two agree; gains and biases of the norms move into the linears that read them. Once the
norms are RMSNorms without a gain, any rotation of the stream passes through them.
"""

from llmcompress.compress.rewriting.residual import (
    centre,
    centred_norms,
    find_residual,
    fold_norms,
    record_untied,
    replace_norms,
    tied,
    untie,
)
from llmcompress.compress.rewriting.work import Rewritten, Subject, working
from llmcompress.errors import InputError
from llmcompress.options import ReparamOptions

SCOPE = "model"
KEPT = "LayerNorms are kept, without a gain: the model's own class holds the result and computes the same"
REPLACED = (
    "LayerNorms became torch.nn.RMSNorm, which the model's own class does not have; "
    "rmsnorm.norms=keep gives an equal model that can be saved"
)


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Rewrite a LayerNorm model in place. Raises InputError where it has none, or where more than linears writes.

    `keep` leaves LayerNorm modules with gain 1 and bias 0 inside the blocks and the final one as it was; `replace` puts
    RMSNorms there and folds the final one into the head, which gets a bias if there is one to fold.
    """
    model = subject.module
    keep = options.rmsnorm.norms == "keep"
    with working(subject) as work:
        residual = find_residual(model, work.probe)
        if not all(centred_norms(residual)):
            raise InputError("the model already has RMSNorms, which do not subtract a mean", "leave rmsnorm out")
        shared = tied(model)

        def edit() -> None:
            untie(model)
            centre(residual)
            fold_norms(residual, only_native=keep)
            if not keep:
                replace_norms(residual)

        work.require("model", list(model.modules()), edit)
        record_untied(model)
    notes = (KEPT if keep else REPLACED, *(("the head now has a weight of its own",) if shared else ()))
    return work.result(native=keep, notes=notes)
