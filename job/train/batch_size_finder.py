"""Whether a step fits into memory, tried before the first one.

The heaviest passes that the training will come to, by tokens and by pictures, are computed forward
and backward. Where one does not fit, the rows of a step are divided further, and then activations
are computed again rather than kept; the step stays the same.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from job import log
from job.distributed import process_group
from job.engines import gradient_checkpointing
from job.engines.base import Engine
from job.engines.compiling import release_blocks
from job.engines.device import Accelerator, release_memory
from job.engines.trainer import with_gradient
from job.errors import OutOfMemoryError
from job.families.batches import model_inputs, to_device
from job.spec.types import JobSpec, TrainSpec
from job.train.dataset import Collator, EncodedDataset
from job.train.heaviest_batches import heaviest


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a process computes its rows of a step. The names are those of the spec."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool

    @classmethod
    def of(cls, train: TrainSpec) -> "Division":
        return cls(
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            gradient_checkpointing=train.gradient_checkpointing,
        )

    def smaller(self) -> "Division | None":
        """The same rows with less memory at a time; None where that is not possible."""
        rows = self.per_device_train_batch_size
        if rows > 1:
            part = max(n for n in range(1, rows // 2 + 1) if rows % n == 0)
            return replace(
                self,
                per_device_train_batch_size=part,
                gradient_accumulation_steps=self.gradient_accumulation_steps * (rows // part),
            )
        if not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True)
        return None

    def __str__(self) -> str:
        rows, passes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        kept = "checkpointing" if self.gradient_checkpointing else "all activations kept"
        return f"{rows} × {passes}, {kept}"


def find(
    start: Division, fits: Callable[[Division], bool]
) -> tuple[Division | None, list[Division]]:
    """The first division from `start` on that fits every process, or None; and those too large."""
    division: Division | None = start
    too_large: list[Division] = []
    while division is not None:
        fitted = fits(division)
        release_memory()  # what the step held: its error, and the frames of it, are gone by now
        if not process_group.any_rank(not fitted):
            return division, too_large
        too_large.append(division)
        smaller = division.smaller()
        log.warn("a step does not fit into memory", tried=division, next=smaller or "nothing")
        division = smaller
    return None, too_large


def fits(
    model: Any, make: Callable[[], dict[str, Any]], engine: Engine, division: Division
) -> bool:
    """Whether the batch can be made and computed forward and backward; leaves no trace.

    Random numbers are drawn as if nothing had been tried.
    """
    was_training = model.training
    model.train()
    if division.gradient_checkpointing:
        gradient_checkpointing.turn_on(model)
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _autocast(engine):
            with_gradient(model(**make()).loss, model).backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if division.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error).lower()


def record(division: Division, too_large: Sequence[Division]) -> dict[str, Any]:
    """What run.json keeps of the trial."""
    return {**asdict(division), "too_large": [asdict(each) for each in too_large]}


def _autocast(engine: Engine) -> Any:
    if not engine.autocast:
        return nullcontext()
    return torch.autocast(engine.device.type, torch.bfloat16)


def fitted_to_memory(
    spec: JobSpec,
    engine: Engine,
    accelerator: Accelerator,
    collate: Collator,
    model: Any,
    dataset: EncodedDataset,
    order: Callable[[TrainSpec], Iterable[list[int]]],
) -> tuple[JobSpec, dict[str, Any] | None]:
    """The spec with its step divided so that it fits, and what there is to keep of the trial.

    `order` gives the rows of each pass of this process, of the whole training. Raises
    OutOfMemoryError where nothing fits.
    """
    wanted = spec.train.fit == "on" or (spec.train.fit == "auto" and accelerator.kind != "cpu")
    if not wanted or spec.runtime.distributed == "fsdp2":  # which fits only once it is in shares
        return spec, None

    def fits_here(division: Division) -> bool:
        def make(rows: Sequence[int]) -> dict[str, Any]:
            batch = collate.batch([dataset.row(row) for row in rows])
            return to_device(model_inputs(batch), engine.device)

        if spec.train.torch_compile and division.gradient_checkpointing:
            release_blocks(model)  # which cannot be computed again as they were
        passes = order(replace(spec.train, **asdict(division)))
        return all(
            fits(model, functools.partial(make, rows), engine, division)
            for rows in heaviest(passes, dataset.lengths, dataset.patches)
        )

    start = Division.of(spec.train)
    found, too_large = find(start, fits_here)
    if found is None:
        raise OutOfMemoryError(
            "$.train.per_device_train_batch_size",
            f"no step fits into the {log.size(accelerator.memory_bytes)} of {accelerator.name}: "
            f"tried {'; '.join(map(str, too_large))}",
            value=spec.train.per_device_train_batch_size,
            fix="lower data.max_pixels or train.max_length",
        )
    log.info("a step fits into memory", tried=found)
    compiled = spec.train.torch_compile and not found.gradient_checkpointing
    train = replace(spec.train, **asdict(found), torch_compile=compiled)
    return replace(spec, train=train), record(found, too_large)


def raise_if_out_of_memory(error: BaseException, spec: TrainSpec, accelerator: Accelerator) -> None:
    if not is_out_of_memory(error):
        return
    rows = spec.per_device_train_batch_size
    raise OutOfMemoryError(
        "$.train.per_device_train_batch_size",
        f"a training step does not fit into the {log.size(accelerator.memory_bytes)} "
        f"of {accelerator.name}",
        value=rows,
        fix=(
            f"--set train.per_device_train_batch_size={max(1, rows // 2)} "
            f"--set train.gradient_accumulation_steps={spec.gradient_accumulation_steps * 2}"
            if rows > 1
            else "--set train.gradient_checkpointing=true, or lower data.max_pixels"
        ),
    ) from error
