"""Verifies by reloading: the stored adapter and the merged weights against the trained model."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.errors import ProofError
from job.export.export_context import ExportContext
from job.export.proof import Comparison, ProbeOutputs, compare, probe_outputs, require_equal
from job.export.stopwatch import Stopwatch
from job.export.tensor_digests import TensorDigests

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The trained model's outputs, compared with the base's and the stored adapter's."""

    expected: ProbeOutputs
    against_base: Comparison
    adapter_reloaded: Comparison | None


@dataclass(frozen=True, kw_only=True)
class Reloaded:
    """The comparison of the reloaded merged model with the trained one."""

    comparison: Comparison
    tensors_checked: int
    in_four_bit: Comparison | None = None
    """How far the model with its base in 4 bits was from it; None if the base was not."""


def measure_trained(context: ExportContext, trained: "PeftModel | PreTrainedModel") -> TrainedModel:
    """Runs the probes through the trained model, the base and the stored adapter.

    Raises ProofError if the stored adapter differs from the trained one.
    """
    expected = _outputs(context, trained)
    if context.adapter is not None and context.spec.lora.bias == "none":
        with trained.disable_adapter():
            base = _outputs(context, trained)
        reloaded = compare(expected, _outputs_of_stored_adapter(context, trained))
    else:  # the trained model no longer contains the base weights
        model = context.load_base()
        base, reloaded = _outputs(context, model), None
        if context.adapter is not None:  # trained biases: PEFT cannot load two such adapters
            adapted = context.engine.load_adapter(model, context.adapter)
            reloaded = compare(expected, _outputs(context, adapted))
    if reloaded is not None:
        require_equal("adapter", reloaded, dtype_name(context.engine.dtype))
    return TrainedModel(
        expected=expected, against_base=compare(base, expected), adapter_reloaded=reloaded
    )


def reload_merged(
    context: ExportContext, digests: dict[str, str], expected: ProbeOutputs, watch: Stopwatch
) -> Reloaded:
    """Loads the merged weights and compares every tensor, and the outputs on the probes.

    Raises ProofError if a tensor is not bit-identical, or the outputs differ by more than rounding.
    """
    with watch.timed("reload"):
        model = context.engine.load(context.bind_merged(context.target), exact_dtype(context))
    with watch.timed("compare_tensors"):
        checked = check_tensors(
            model.named_parameters(), digests, context.dtype, context.family.keeps_fp32
        )
    with watch.timed("probe_reloaded"):
        comparison = compare(expected, _outputs(context, model))
    del model
    context.release()
    require_equal("merged", comparison, context.dtype_name, dtype_name(context.engine.dtype))
    return Reloaded(comparison=comparison, tensors_checked=checked)


def exact_dtype(context: ExportContext) -> "torch.dtype":
    """In which merged weights are computed: as stored or, on a CPU, in fp32, which represents every
    stored value exactly."""
    import torch

    return torch.float32 if context.engine.device.type == "cpu" else context.dtype


def _outputs(context: ExportContext, model: "PeftModel | PreTrainedModel") -> ProbeOutputs:
    return probe_outputs(model, context.family, context.probes)


def _outputs_of_stored_adapter(context: ExportContext, trained: "PeftModel") -> ProbeOutputs:
    """Loads the stored adapter next to the trained one, which is active again afterwards."""
    from job.families.lora.saved_modules import tie_copies

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which `tie_copies` ties
        trained.load_adapter(context.adapter, adapter_name="reloaded", is_trainable=False)
    tie_copies(trained, "reloaded")
    trained.set_adapter("reloaded")
    try:
        return _outputs(context, trained)
    finally:
        trained.set_adapter("default")
        trained.delete_adapter("reloaded")


def check_tensors(
    tensors: "Iterable[tuple[str, torch.Tensor]]",
    digests: dict[str, str],
    dtype: "torch.dtype",
    keeps_fp32: Callable[[str], bool],
) -> int:
    """Compares the digest of every reloaded tensor with the merge's; returns their number."""
    import torch

    with TensorDigests() as reloaded:
        for name, tensor in tensors:
            reloaded.add(name, tensor.detach(), torch.float32 if keeps_fp32(name) else dtype)
        found = reloaded.finish()
    if different := [name for name, digest in found.items() if digests.get(name) != digest]:
        raise ProofError(
            f"merged: {different[0]}",
            "the tensor on disk is not the one that was merged"
            + (f", nor are {len(different) - 1} others" if len(different) > 1 else ""),
            fix="check the disk; export again",
        )
    if len(found) != len(digests):
        raise ProofError("merged", f"{len(digests) - len(found)} tensors were not written")
    return len(found)


def dtype_name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
