"""The export stage: verifies the stored adapter, then writes and verifies the merged weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.errors import ProofError
from job.export.export_context import ExportContext
from job.export.four_bit_proof import merged_outputs, prove_streamed, reader
from job.export.merge import Merge
from job.export.proof import Comparison
from job.export.reload import Reloaded, TrainedModel, measure_trained, reload_merged
from job.export.stopwatch import Stopwatch
from job.export.streamed import Read, unload_packed
from job.export.vllm_proof import Served, prove_merged
from job.redaction import redacted
from job.storage.digests import FileDigest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROOF = "export.json"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was exported, and the measurements that verify it; the content of `export.json`."""

    layout: str
    dtype: str
    tensors: int
    adapted_tensors: int
    changed_tensors: int
    largest_change: float
    bytes: int
    seconds: float
    took: dict[str, float]
    """Seconds of each part, in order."""
    verified: str
    adapter_reloaded: Comparison | None
    merged_reloaded: Comparison | None
    merged_served: Served | None
    in_four_bit: Comparison | None
    """How far the trained model, whose base was in 4 bits, was from the original base with the
    adapter, which the merged weights are compared with; None for other trainings."""
    trained_against_base: Comparison | None
    tensors_checked: int
    system: str | None
    """The system prompt of `data.system`, which requests to the served model need."""
    notes: tuple[str, ...]
    """Repairs to the base model's settings."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MergedWeights:
    """The merged weights that were written."""

    digests: dict[str, str]
    """By tensor name, see `job.export.tensor_digests`."""
    adapted: int
    changed: int
    largest_change: float
    notes: tuple[str, ...]


def export(context: ExportContext) -> ExportResult:
    """Writes `merged/` and verifies it against the trained model.

    Raises ProofError if the merged weights equal the base, differ from the trained model, or
    contain a value that is not finite.
    """
    watch = Stopwatch()
    verify = context.spec.export.verify
    with watch.timed("load_trained"):
        trained = context.load_trained()
    measured = None
    if verify != "none":
        with watch.timed("probe_trained"):
            measured = measure_trained(context, trained)
    if context.engine.four_bit is None:
        with watch.timed("write"):
            merged = write_merged(context, trained)
            del trained
            context.release()
        reloaded: Reloaded | None = None
        if measured is not None:
            reloaded = reload_merged(context, merged.digests, measured.expected, watch)
    else:
        merged, reloaded = _export_four_bit(context, trained, measured, watch)
        del trained
        context.release()
    served: Served | None = None
    if measured is not None and reloaded is not None and verify == "vllm":
        expected = measured.expected
        if context.engine.four_bit is not None:
            expected = merged_outputs(context, watch)
        with watch.timed("serve"):
            served = prove_merged(context, expected, reloaded.comparison)
    with watch.timed("hash"):
        files = context.digest_tree(context.target)
    result = ExportResult(
        layout=context.spec.export.merged.layout,
        dtype=context.dtype_name,
        tensors=len(merged.digests),
        adapted_tensors=merged.adapted,
        changed_tensors=merged.changed,
        largest_change=merged.largest_change,
        bytes=sum(file.size for file in files),
        seconds=watch.total,
        took=watch.seconds,
        verified=verify,
        adapter_reloaded=measured.adapter_reloaded if measured else None,
        merged_reloaded=reloaded.comparison if reloaded else None,
        merged_served=served,
        in_four_bit=reloaded.in_four_bit if reloaded else None,
        trained_against_base=measured.against_base if measured else None,
        tensors_checked=reloaded.tensors_checked if reloaded else 0,
        system=context.spec.data.system,
        notes=merged.notes,
    )
    _write_proof(result, files, context.target)
    log.info("exported", **{part: log.seconds(took) for part, took in watch.seconds.items()})
    return result


def _export_four_bit(
    context: ExportContext, trained: "PeftModel", measured: TrainedModel | None, watch: Stopwatch
) -> tuple[MergedWeights, Reloaded | None]:
    """Merges the adapter into the original weights instead of those in 4 bits, which it frees."""
    with context.family.stored_weights() as base:
        log.info("the merge reads the original weights", packed=unload_packed(trained))
        with watch.timed("write"):
            read = reader(context, base, context.engine.dtype)
            merged = write_merged(context, trained, read)
        if measured is None:
            return merged, None
        return merged, prove_streamed(
            context, trained, base, merged.digests, measured.expected, watch
        )


def write_merged(
    context: ExportContext, trained: "PeftModel | PreTrainedModel", read: Read | None = None
) -> MergedWeights:
    """Writes the merged weights; `read` reads those of the base that are not in memory.

    Raises ProofError if they equal the base's.
    """
    merge = Merge(trained, dtype=context.dtype, keeps_fp32=context.family.keeps_fp32, read=read)
    notes = context.family.save(
        trained.get_base_model() if context.adapter is not None else trained,
        merge.weights(),
        context.target,
        dtype=context.dtype,
        max_shard_size=context.spec.export.merged.max_shard_size,
        layout=context.spec.export.merged.layout,
        finished=context.on_shard_written,
    )
    for note in notes:
        log.warn(note)
    if context.adapter is not None and not merge.changed:
        raise ProofError(
            "merged",
            f"training changed nothing: none of the {merge.adapted} adapted tensors differs from "
            f"the base after the cast to {context.dtype_name}",
            fix="train for more steps or at a higher learning rate"
            if context.spec.reinforce is None
            else "use rewards that differ between the answers to a row, which the log and the "
            "report tell, or raise reinforce.max_steps or reinforce.learning_rate",
        )
    log.info(
        "merged",
        adapted=merge.adapted,
        changed=merge.changed,
        largest_change=merge.largest_change,
    )
    return MergedWeights(
        digests=merge.digests,
        adapted=merge.adapted,
        changed=merge.changed,
        largest_change=merge.largest_change,
        notes=notes,
    )


def _write_proof(result: ExportResult, files: Sequence[FileDigest], target: Path) -> None:
    proof = {**redacted(result.to_json()), "files": [file.to_json() for file in files]}
    (target / PROOF).write_text(json.dumps(proof, indent=2) + "\n")
