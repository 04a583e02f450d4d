"""The export stage: the stored adapter proven, then the merged weights written and proven."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.engines.base import Engine
from job.errors import ProofError
from job.export.merge import Merge, digest
from job.export.proof import (
    PROBES,
    TOLERANCE,
    Comparison,
    Outputs,
    compare,
    outputs,
    require_equal,
)
from job.export.vllm_proof import Served, prove, serve
from job.families.base import Family
from job.prep.rows import Row
from job.redaction import redacted
from job.spec.types import JobSpec
from job.storage.background import BackgroundTasks
from job.storage.digests import digest_tree

if TYPE_CHECKING:
    import torch

MERGED, PROOF = "merged", "export.json"
CHECKED_AT_ONCE = 4
"""Reloaded tensors whose digests are made together."""
Load = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was exported, and the figures that prove it; `export.json` holds the same."""

    layout: str
    dtype: str
    tensors: int
    adapted_tensors: int
    changed_tensors: int
    largest_change: float
    bytes: int
    seconds: float
    verified: str
    adapter_reloaded: Comparison | None
    merged_reloaded: Comparison | None
    merged_served: Served | None
    trained_against_base: Comparison | None
    tensors_checked: int
    notes: tuple[str, ...]
    """What of the base's own settings was repaired."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    spec: JobSpec,
    engine: Engine,
    family: Family,
    probes: Sequence[Row],
    adapter: Path | None,
    directory: Path,
    *,
    load_trained: Load,
    load_base: Load,
    release: Callable[[], None],
    bind_merged: Callable[[Path], Family],
    finished: Callable[[Path], None] | None = None,
) -> ExportResult:
    """Writes `merged/` under `directory` and proves it against the trained model.

    `load_trained` gives the trained model, `load_base` the base without the adapter (where weights
    of its own were trained: all, or biases), `release` lets go of the models in memory before the
    merged one is loaded.
    `finished` is told of each shard of the weights when it is whole, long before it is proven.
    Raises ProofError where the merge equals the base, differs from what was trained, or holds a
    value that is not finite.
    """
    import torch

    started = time.monotonic()
    verify = spec.export.verify != "none"
    rows = list(probes[:PROBES])
    dtype = getattr(torch, spec.export.merged.dtype)
    expected = against_base = reloaded_adapter = None
    trained = load_trained()
    if verify:
        expected = outputs(trained, family, rows)
        if adapter is not None and spec.lora.bias == "none":
            against_base = compare(_without_adapter(trained, family, rows), expected)
            reloaded_adapter = _prove_adapter(engine, trained, family, rows, adapter, expected)
        else:  # the trained model holds the base's weights no more
            base = load_base()
            against_base = compare(outputs(base, family, rows), expected)
            if adapter is not None:
                reloaded_adapter = _prove_on_base(engine, base, family, rows, adapter, expected)
            del base

    target = directory / MERGED
    merge = Merge(trained, dtype=dtype, keeps_fp32=family.keeps_fp32)
    notes = family.save(
        trained.get_base_model() if adapter is not None else trained,
        merge.weights(),
        target,
        dtype=dtype,
        max_shard_size=spec.export.merged.max_shard_size,
        layout=spec.export.merged.layout,
        finished=finished,
    )
    for note in notes:
        log.warn(note)
    if adapter is not None and not merge.changed:
        raise ProofError(
            "merged",
            f"none of the {merge.adapted} adapted tensors differs from the base after the cast "
            f"to {spec.export.merged.dtype}: the training changed nothing that the export can hold",
            fix="train for more steps or at a higher learning rate",
        )
    log.info(
        "merged",
        adapted=merge.adapted,
        changed=merge.changed,
        largest_change=merge.largest_change,
    )
    digests, changed, adapted = merge.digests, merge.changed, merge.adapted
    largest = merge.largest_change
    del trained, merge
    release()

    checked = 0
    reloaded: Comparison | None = None
    served: Served | None = None
    if expected is not None:
        # In a dtype that holds every stored value: fp16's own where it is fast, else fp32.
        exact = torch.float32 if engine.device.type == "cpu" else dtype
        model = engine.load(bind_merged(target), exact)
        checked = _check_tensors(model, digests, dtype, family.keeps_fp32)
        reloaded = compare(expected, outputs(model, family, rows))
        del model
        release()
        require_equal("merged", reloaded, spec.export.merged.dtype, _name(engine.dtype))
        if spec.export.verify == "vllm":
            # vLLM computes in the stored dtype, the reloaded model perhaps in fp32.
            spread = float(expected.logits.std())
            limit = max(4 * reloaded.largest, TOLERANCE[spec.export.merged.dtype] * spread)
            served = _prove_served(family, rows, target, spec, expected, limit)
    files = digest_tree(target)
    done = ExportResult(
        layout=spec.export.merged.layout,
        dtype=spec.export.merged.dtype,
        tensors=len(digests),
        adapted_tensors=adapted,
        changed_tensors=changed,
        largest_change=largest,
        bytes=sum(file.size for file in files),
        seconds=round(time.monotonic() - started, 3),
        verified=spec.export.verify,
        adapter_reloaded=reloaded_adapter,
        merged_reloaded=reloaded,
        merged_served=served,
        trained_against_base=against_base,
        tensors_checked=checked,
        notes=notes,
    )
    told = {**redacted(done.to_json()), "files": [file.to_json() for file in files]}
    proof = json.dumps(told, indent=2)
    (target / PROOF).write_text(proof + "\n")
    return done


def _prove_served(
    family: Family,
    rows: Sequence[Row],
    target: Path,
    spec: JobSpec,
    expected: Outputs,
    rounding: float,
) -> Served:
    log_file = target.with_name("vllm.log")
    with serve(target, family, dtype=spec.export.merged.dtype, log_file=log_file) as server:
        found = prove(server, family, rows, expected, rounding)
    log_file.unlink()
    log.info(
        "served by vLLM",
        probes=found.probes,
        same_answers=found.same_answers,
        tokens=found.tokens,
        logprobs_within=f"{found.largest_logprob_difference:.2g}",
    )
    return found


def _without_adapter(trained: Any, family: Family, rows: Sequence[Row]) -> Outputs:
    """What the base says, whose weights are in the trained model as they were."""
    without: AbstractContextManager[Any] = trained.disable_adapter()
    with without:
        return outputs(trained, family, rows)


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _prove_adapter(
    engine: Engine,
    trained: Any,
    family: Family,
    rows: Sequence[Row],
    adapter: Path,
    expected: Outputs,
) -> Comparison:
    """Loads the stored adapter beside the trained one and compares what they say."""
    trained.load_adapter(adapter, adapter_name="reloaded", is_trainable=False)
    trained.set_adapter("reloaded")
    try:
        found = compare(expected, outputs(trained, family, rows))
    finally:
        trained.set_adapter("default")
        trained.delete_adapter("reloaded")
    require_equal("adapter", found, _name(engine.dtype))
    return found


def _prove_on_base(
    engine: Engine, base: Any, family: Family, rows: Sequence[Row], adapter: Path, expected: Outputs
) -> Comparison:
    """The same on a base of its own: an adapter with biases has no place beside another one."""
    found = compare(expected, outputs(engine.load_adapter(base, adapter), family, rows))
    require_equal("adapter", found, _name(engine.dtype))
    return found


def _check_tensors(
    model: Any,
    digests: dict[str, str],
    dtype: "torch.dtype",
    keeps_fp32: Callable[[str], bool],
) -> int:
    """Compares every reloaded tensor, bit by bit, with what the merge computed; a few at once."""
    import torch

    def check(name: str, parameter: "torch.Tensor") -> None:
        stored = parameter.detach().to(torch.float32 if keeps_fp32(name) else dtype)
        if digests.get(name) != digest(stored):
            raise ProofError(
                f"merged: {name}",
                "the tensor on disk is not the one that was merged",
                fix="check the disk; export again",
            )

    checked = 0
    with BackgroundTasks("check", threads=CHECKED_AT_ONCE, max_pending=CHECKED_AT_ONCE) as checks:
        for name, parameter in model.named_parameters():
            checks.submit(functools.partial(check, name, parameter))
            checked += 1
    if checked != len(digests):
        raise ProofError("merged", f"{len(digests) - checked} tensors were not written")
    return checked
