"""Verifies an export whose base was in 4 bits during training.

The merge adds the adapter to the original weights, so the exported model is not quite the one that
was trained: it is the original base with the adapter. That is what it is compared with, and how far
the trained model was from it is reported. Both run block by block, so they fit wherever the
training did; neither generates, which would read all weights again for each token.
"""

from typing import TYPE_CHECKING

import torch

from job.export.export_context import ExportContext
from job.export.proof import (
    ProbeOutputs,
    compare,
    label_logits,
    probe_outputs,
    require_equal,
    without_answers,
)
from job.export.reload import Reloaded, check_tensors, dtype_name, exact_dtype
from job.export.stopwatch import Stopwatch
from job.export.streamed import Read, streamed_weights

if TYPE_CHECKING:
    from peft import PeftModel

    from job.families.stored_weights import StoredWeights


def reader(context: ExportContext, stored: "StoredWeights", dtype: torch.dtype) -> Read:
    """Reads weights in the dtype that they have in a model that is loaded in `dtype`."""
    keeps_fp32, device = context.family.keeps_fp32, context.engine.device

    def read(name: str) -> torch.Tensor:
        return stored.read(name, torch.float32 if keeps_fp32(name) else dtype, device)

    return read


def prove_streamed(
    context: ExportContext,
    trained: "PeftModel",
    base: "StoredWeights",
    digests: dict[str, str],
    expected: ProbeOutputs,
    watch: Stopwatch,
) -> Reloaded:
    """Compares every exported tensor, and the logits, with the original base and the adapter.

    `trained` has none of its weights in 4 bits any more; `expected` are its outputs with them.
    Raises ProofError if a tensor is not bit-identical, or the logits differ by more than rounding.
    """
    family, rows = context.family, context.probes
    read = reader(context, base, context.engine.dtype)
    with watch.timed("probe_original"), streamed_weights(trained, read, every=False):
        original = without_answers(label_logits(trained, family, rows))
    with context.bind_merged(context.target).stored_weights() as merged:
        with watch.timed("compare_tensors"):
            stored = reader(context, merged, context.dtype)
            tensors = ((name, stored(name)) for name in digests)
            checked = check_tensors(tensors, digests, context.dtype, family.keeps_fp32)
        read = reader(context, merged, exact_dtype(context))
        with (
            watch.timed("probe_reloaded"),
            streamed_weights(trained, read, every=True),
            trained.disable_adapter(),
        ):
            found = without_answers(label_logits(trained, family, rows))
    comparison = compare(original, found)
    require_equal("merged", comparison, context.dtype_name, dtype_name(context.engine.dtype))
    return Reloaded(
        comparison=comparison,
        tensors_checked=checked,
        in_four_bit=compare(original, without_answers(expected.logits)),
    )


def merged_outputs(context: ExportContext, watch: Stopwatch) -> ProbeOutputs:
    """The outputs of the merged model, answers included, loaded as a whole: for a server's."""
    with watch.timed("reload"):
        model = context.engine.load(context.bind_merged(context.target), exact_dtype(context))
    with watch.timed("probe_reloaded"):
        outputs = probe_outputs(model, context.family, context.probes)
    del model
    context.release()
    return outputs
