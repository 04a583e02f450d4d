"""Between micro-batches the trainer does nothing that waits for the device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from job.engines.data_timer import DataTimer
from job.engines.trainer import StepTrainer, keep_packed_from_ddp
from job.families.four_bit import FourBit
from tests.unit.train.short_training import ROWS, short_training


class TransformersLoop(StepTrainer):
    """The trainer with Transformers' own epoch loop, which `StepTrainer` replaces."""

    _run_epoch = Trainer._run_epoch

    def get_batch_samples(self, loader: Any, count: int, _device: Any) -> tuple[list[Any], int]:
        batches = self._fetch(loader, count)
        return batches, sum(batch["counted_tokens"] for batch in batches)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self.state.num_input_tokens_seen += inputs["tokens"]


def collate(rows: list[int]) -> dict[str, Any]:
    values = torch.tensor(rows, dtype=torch.float)
    return {"input_ids": values, "counted_tokens": len(rows), "tokens": sum(rows), "images": 0}


@pytest.mark.parametrize("max_grad_norm", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_an_epoch_has_the_steps_logs_and_weights_of_transformers_loop(
    max_grad_norm: float, tmp_path: Path
) -> None:
    ours, theirs = (
        short_training(
            tmp_path,
            list(range(ROWS)),
            collate,
            DataTimer(),
            trainer=kind,
            max_grad_norm=max_grad_norm,
            learning_rate=0.01,
            max_steps=7,
            logging_steps=2,
            include_num_input_tokens_seen="non_padding",
        )
        for kind in (StepTrainer, TransformersLoop)
    )
    for trainer in (ours, theirs):
        trainer.train()
    assert ours.model.weight.item() == theirs.model.weight.item() != 1.0
    logged = [
        [
            {
                k: v
                for k, v in e.items()
                if k in ("step", "epoch", "loss", "grad_norm", "learning_rate")
            }
            for e in trainer.state.log_history
            if "loss" in e
        ]
        for trainer in (ours, theirs)
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 3
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen


@pytest.fixture
def trainer(tmp_path: Path) -> StepTrainer:
    """Row n has n tokens."""
    return short_training(
        tmp_path,
        list(range(ROWS)),
        collate,
        DataTimer(),
        num_train_epochs=2,
        include_num_input_tokens_seen="non_padding",
    )


def test_tokens_are_counted_on_the_host_and_flops_not_at_all(
    trainer: StepTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(_: Any) -> Any:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * sum(range(ROWS))


def test_batches_are_copied_while_the_device_computes(
    trainer: StepTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[bool] = []
    to: Any = torch.Tensor.to

    def noted(tensor: Any, *given: Any, non_blocking: bool = False, **more: Any) -> Any:
        copied.append(non_blocking)
        return to(tensor, *given, non_blocking=non_blocking, **more)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    assert len(list(trainer.get_train_dataloader())) == 8
    assert copied == [True] * 8


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_trains_an_adapter_on_weights_in_4_bits() -> None:
    pytest.importorskip("bitsandbytes", reason="not installed: make setup EXTRAS=gpu")
    from job.families.four_bit.tensor import FourBitTensor

    base, adapter = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(64, 8, bias=False)
    packed = FourBitTensor.of(base.weight, FourBit(quant_type="nf4", double_quant=True))
    base.weight = torch.nn.Parameter(packed, requires_grad=False)
    model = torch.nn.ModuleDict({"base": base, "adapter": adapter})
    model.forward = lambda x: base(x) + adapter(x)
    keep_packed_from_ddp(model)
    x = torch.randn(3, 64)
    DistributedDataParallel(model)(x).sum().backward()
    assert torch.equal(base.weight + 0, packed.unpacked())
    torch.testing.assert_close(adapter.weight.grad, x.sum(0).expand(8, 64))
