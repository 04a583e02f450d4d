"""Ways to compute are taken or left by their trials, which never end the job."""

import functools
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.engines import ways
from job.engines.device import Accelerator, require_four_bit, resolve_optim
from job.engines.ways import child, kept, trials
from job.errors import SpecError
from job.families import outcome as outcomes
from job.families.ernie45_vl.packed import varlen_trial
from job.families.grouped_products import choice
from job.families.outcome import Outcome, attempt, left, unless_slower
from job.pipeline.wanted_ways import wanted
from job.train.capture_choice import why_eager
from job.train.checkpoint.storage import CheckpointStore
from job.train.train import _optim
from tests.unit.engines import broken_trials
from tests.unit.train.test_compile_choice import spec

CPU = torch.device("cpu")
NOT_FOUR_BIT = (ways.CAPTURED, ways.COMPILED, ways.EIGHT_BIT)
GPU = Accelerator(kind="cuda", name="a GPU", memory_bytes=2**34)


def taken(way: str, milliseconds: float = 1.0) -> Outcome:
    return Outcome(way=way, taken=True, reason="right", milliseconds=milliseconds, off=0.0)


@pytest.fixture(autouse=True)
def _no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes the families use is of no GPU."""
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(varlen_trial, "_known", [])


def test_a_result_that_is_wrong_or_fails_leaves_its_way_and_one_that_is_right_is_timed() -> None:
    exact = [torch.ones(4), torch.zeros(4)]
    right = attempt("w", lambda: [torch.full((4,), 1.001), torch.zeros(4)], exact, tolerance=1e-2)
    assert right.taken
    assert right.milliseconds is not None
    assert right.off == pytest.approx(1e-3, rel=0.01)
    wrong = attempt("w", lambda: [torch.full((4,), 1.1), torch.zeros(4)], exact, tolerance=1e-2)
    assert (wrong.taken, wrong.reason) == (False, "is off by 1.0e-01")
    infinite = attempt("w", lambda: [torch.full((4,), torch.nan), exact[1]], exact, tolerance=1.0)
    assert (infinite.taken, infinite.reason) == (False, "is off by inf")
    assert json.dumps(infinite.to_json(), allow_nan=False)

    def full() -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("no memory\nand more")

    failed = attempt("w", full, exact, tolerance=1.0)
    assert (failed.taken, failed.reason, failed.untried) == (False, "no memory", True)


def test_a_way_that_is_much_slower_than_its_alternative_is_left() -> None:
    assert unless_slower(taken("w", 2.9), 1.0, "plain").taken
    slow = unless_slower(taken("w", 3.1), 1.0, "plain")
    assert str(slow) == "left: slower: 3.10 ms, plain 1.00 ms"
    assert slow.passing  # the next start measures again
    torchs, tritons = taken("torch", 600.0), taken("triton", 2.0)
    assert choice.decide([torchs, tritons]).way == "triton"
    assert choice.decide([replace(torchs, milliseconds=2.5), tritons]).way == "torch"
    found = choice.decide([left("torch", "waits"), left("triton", "no C compiler")])
    assert found == ("loop", "torch: waits; triton: no C compiler")


def test_on_a_cpu_every_way_is_left_with_a_reason_and_nothing_is_kept(tmp_path: Path) -> None:
    cpu = Accelerator(kind="cpu", name="a CPU", memory_bytes=2**34)
    found = ways.find(cpu, tmp_path)
    assert [each.way for each in found.outcomes] == list(ways.TRAINING)
    assert all(found.obstacle(each.way) for each in found.outcomes)
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_is_kept_for_a_device_and_versions_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def run(names: Sequence[str]) -> list[Outcome]:
        calls.append(list(names))
        full = left(ways.CAPTURED, "out of memory", untried=True)
        found = {ways.ATTENTION: taken(ways.ATTENTION), ways.CAPTURED: full}
        return [found[name] for name in names]

    names = (ways.ATTENTION, ways.CAPTURED)
    find = functools.partial(ways.find, GPU, tmp_path, names, run)
    find()
    assert "attention by boundaries" in capsys.readouterr().err
    assert varlen_trial.serves(torch.device("cuda", 0))  # without a trial, which would fail here
    again = find()
    assert calls == [[*names], [ways.CAPTURED]]  # full memory may pass
    assert "from an earlier start" in capsys.readouterr().err
    assert again.obstacle(ways.CAPTURED) is None  # the capture itself tells
    find(anew=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of the same kind
    find()
    assert calls.pop() == [ways.CAPTURED]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    find()
    ways.find(replace(GPU, name="another GPU"), tmp_path, names, run)
    assert calls[2:] == [[*names]] * 3
    for file in (tmp_path / kept.FOLDER).glob("*.json"):
        assert json.loads(file.read_text())["key"]["torch"] == torch.__version__.partition("+")[0]
        file.write_text("{}")  # damaged
    find()
    assert calls[5:] == [[*names]]


def test_a_failure_leaves_a_way_for_this_start_and_is_not_kept(tmp_path: Path) -> None:
    broken = outcomes.failed(ways.ATTENTION, RuntimeError("no C compiler"))
    found = ways.find(GPU, tmp_path, [ways.ATTENTION], lambda _: [broken])
    assert found.obstacle(ways.ATTENTION) == "no C compiler"
    repaired = ways.find(GPU, tmp_path, [ways.ATTENTION], lambda _: [taken(ways.ATTENTION)])
    assert repaired.obstacle(ways.ATTENTION) is None


def test_a_way_that_one_rank_left_is_left_on_all() -> None:
    left_it = ways.Ways((taken(ways.COMPILED), left(ways.CAPTURED, "is off by 5.0e-01")))
    full = ways.Ways((left(ways.COMPILED, "full", untried=True), taken(ways.CAPTURED)))
    for ranks in ([left_it, full], [full, left_it]):
        found = ways.agreed(ranks)
        assert found.obstacle(ways.CAPTURED) == "is off by 5.0e-01"
        assert found.obstacle(ways.COMPILED) is None


@pytest.mark.parametrize(
    ("settings", "trains", "more"),
    [
        ({}, True, {*NOT_FOUR_BIT}),
        ({"max_steps": 60}, True, {ways.CAPTURED, ways.EIGHT_BIT}),  # too few to compile for
        ({"max_steps": 600}, True, {*NOT_FOUR_BIT}),
        ({}, False, set()),
        ({"torch_compile": False, "cuda_graphs": False, "optim": "adamw_torch"}, True, set()),
        ({"torch_compile": True, "optim": "adamw_8bit", "max_steps": 60}, True, {*NOT_FOUR_BIT}),
        ({"gradient_checkpointing": True, "optim": "sgd"}, True, {ways.CAPTURED}),
    ],
)
def test_only_ways_that_the_spec_allows_are_tried(
    settings: dict[str, Any], *, trains: bool, more: set[str]
) -> None:
    changed = replace(spec(), train=replace(spec().train, optim="auto", max_steps=-1))
    changed = replace(changed, train=replace(changed.train, **settings))
    generating = {ways.ATTENTION, *(ways.grouped(kernel, "bfloat16") for kernel in ways.KERNELS)}
    names = wanted(changed, dtypes=["bfloat16"], trains=trains)
    assert {*names} == {*generating, *more}
    assert sorted(names, key=ways.TRAINING.index) == [*names]
    packed = replace(changed, model=replace(changed.model, load_in_4bit=True))
    assert ways.FOUR_BIT in wanted(packed, dtypes=["bfloat16"], trains=trains)


def test_grouped_products_are_tried_in_the_dtypes_that_weights_are_loaded_in() -> None:
    names = wanted(spec(), dtypes=["bfloat16", "float16"], trains=True)
    tried = [name for name in names if name.startswith(ways.GROUPED)]
    assert tried == [ways.grouped(k, d) for d in ("bfloat16", "float16") for k in ways.KERNELS]


def test_what_was_not_wanted_before_is_tried_once_it_is(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def run(names: Sequence[str]) -> list[Outcome]:
        calls.append([*names])
        return [taken(name) for name in names]

    few, many = (
        wanted(
            replace(spec(), train=replace(spec().train, max_steps=steps)),
            dtypes=["bfloat16"],
            trains=True,
        )
        for steps in (60, 6000)
    )
    ways.find(GPU, tmp_path, few, run)
    assert ways.find(GPU, tmp_path, many, run).of(ways.COMPILED) is not None
    assert calls == [[*few], [ways.COMPILED]]


def test_trials_that_compile_run_beside_each_other_and_every_trial_runs_once() -> None:
    groups = child.groups(ways.TRAINING)
    assert sorted(name for group in groups for name in group) == sorted(ways.TRAINING)
    assert [ways.ATTENTION, ways.CAPTURED, ways.EIGHT_BIT, ways.FOUR_BIT] in groups
    assert [ways.COMPILED] in groups
    assert all(len(group) == 1 for group in groups if group[0].startswith(ways.GROUPED))
    assert child.groups([]) == []
    names = [ways.COMPILED, "serves", ways.grouped("triton", "bfloat16"), "raises"]
    found = child.run(names, CPU, module=broken_trials.__name__)
    assert [each.way for each in found] == names


def test_what_is_chosen_for_a_gpu_is_not_used_on_a_cpu() -> None:
    choice.use(torch.float32, choice.Choice("triton", "right"))
    varlen_trial.use(taken=True)
    assert choice.choose(torch.device("cuda", 0), torch.float32).way == "triton"
    assert choice.choose(CPU, torch.float32).way == "loop"
    assert not varlen_trial.serves(CPU)


def test_trials_go_on_beside_other_work_and_their_error_does_not_end_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_work = threading.Event()

    def run(_: Sequence[str]) -> list[Outcome]:
        assert other_work.wait(60)
        raise OSError("no process")

    end = ways.begin(GPU, tmp_path, [ways.ATTENTION], run)
    other_work.set()
    found = end()
    assert found.obstacle(ways.ATTENTION) is None  # its first use tells
    assert capsys.readouterr().err.count("the trials failed: OSError: no process") == 1
    assert not list((tmp_path / kept.FOLDER).glob("*.json"))


def test_a_cache_that_cannot_be_written_costs_a_trial_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = ways.find(GPU, tmp_path / "file", [ways.ATTENTION], lambda _: [taken(ways.ATTENTION)])
    assert found.obstacle(ways.ATTENTION) is None


def test_a_trial_that_kills_its_process_or_hangs_is_left_and_the_others_are_tried() -> None:
    names = ["serves", "crashes", "hangs", "raises"]
    found = child.run(names, CPU, module=broken_trials.__name__, limit=5.0)
    assert [(each.way, each.taken) for each in found] == [
        ("serves", True),
        ("crashes", False),
        ("hangs", False),
        ("raises", False),
    ]
    assert "SIGSEGV" in found[1].reason
    assert "not done after 5" in found[2].reason
    assert not any(each.untried for each in found)
    # "raises" says itself whether it may pass; what ends a process may be repaired.
    assert [each.passing for each in found] == [False, True, True, False]


def test_a_device_that_hangs_is_given_up_by_all_trials_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Sequence[str]] = []

    def hangs(names: Sequence[str], *_: object) -> Any:
        started.append(names)
        return [], 0, child._Failure("not done after 10m", untried=True, of_all=True)

    monkeypatch.setattr(child, "_run", hangs)
    monkeypatch.setattr(child, "cores", lambda: 2)
    found = child.run(ways.TRAINING, CPU)
    assert [each.way for each in found] == [*ways.TRAINING]
    assert all(each.untried and each.reason == "not done after 10m" for each in found)
    assert len(started) <= 2 < len(child.groups(ways.TRAINING)), "one for each thread"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_device_that_no_process_can_use_leaves_the_ways_untried() -> None:
    found = child.run(["serves", "raises"], torch.device("cuda", 0), module=broken_trials.__name__)
    assert [each.untried for each in found] == [True, True]
    assert found[0].reason.startswith("no process could try it")


def test_a_trial_that_raises_before_it_compares_leaves_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(device: torch.device) -> Outcome:
        raise RuntimeError("no such driver")

    monkeypatch.setattr(trials, "TRIALS", {ways.CAPTURED: broken})
    found = trials.run([ways.CAPTURED], CPU)
    assert found == [left(ways.CAPTURED, "no such driver", passing=True)]


def test_the_block_of_the_trials_is_within_their_tolerance_in_bf16() -> None:
    exact, inputs = trials._exact_block(CPU)
    block = trials._Block(CPU, torch.bfloat16)
    off = outcomes.difference(block.results(inputs), exact)
    assert 0 < off < trials.BF16_TOLERANCE / 2


def test_8_bit_optimizers_are_not_tried_for_sharded_weights_nor_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    automatic = replace(spec(), train=replace(spec().train, optim="auto"))
    sharded = replace(automatic, runtime=replace(automatic.runtime, distributed="fsdp2"))
    assert ways.EIGHT_BIT in wanted(automatic, dtypes=("bfloat16",), trains=True)
    assert ways.EIGHT_BIT not in wanted(sharded, dtypes=("bfloat16",), trains=True)
    monkeypatch.setattr("job.engines.device._has_bitsandbytes", lambda: True)
    for each, chosen in ((automatic, "adamw_8bit"), (sharded, "adamw_torch_fused")):
        context: Any = SimpleNamespace(
            spec=each,
            accelerator=GPU,
            ways=ways.Ways(()),
            checkpoints=CheckpointStore(uri="memory://empty", fingerprint="f"),
        )
        assert _optim(context) == chosen


def test_attention_by_boundaries_is_compared_with_the_grid_and_left_where_it_fails() -> None:
    assert "_flash_attention_forward" in varlen_trial._trial(CPU).reason
    assert not varlen_trial.serves(CPU)


def test_what_a_trial_left_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = why_eager(spec(), on_gpu=True, padding_free=True, trial_obstacle="HIP graphs fail")
    assert eager == "HIP graphs fail"
    monkeypatch.setattr("job.engines.device._has_bitsandbytes", lambda: True)
    automatic = replace(spec().train, optim="auto")
    assert resolve_optim(automatic, GPU) == "adamw_8bit"
    assert resolve_optim(automatic, GPU, "is off by 5.0e-01") == "adamw_torch_fused"
    with pytest.raises(SpecError, match=r"failed their trial on this GPU: is off by 5\.0e-01"):
        resolve_optim(replace(automatic, optim="adamw_8bit"), GPU, "is off by 5.0e-01")
    require_four_bit(spec().model, "no kernel")
    with pytest.raises(SpecError, match="does not work on this device: no kernel"):
        require_four_bit(replace(spec().model, load_in_4bit=True), "no kernel")


def test_no_choice_of_a_way_asks_for_a_vendor_or_a_capability() -> None:
    """Names of builds are told by `job.engines.device.build`; only the doctor shows a capability,
    to explain a failure; a plan has no trial to go by; and Triton names its targets."""
    root = Path(ways.__file__).parents[2]
    words = r"version\.hip|get_device_capability|gcnArchName|\.is_cuda"
    # torch's device.type is "cuda" whatever the vendor.
    kinds = r"(?<!\.type) (?:[!=]=|(?:not )?in) [(\[{]?\"(?:cuda|rocm)\""
    asked = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(f"{words}|{kinds}", path.read_text(encoding="utf-8"))
    }
    assert asked == {
        *("doctor/device.py", "engines/device.py", "engines/memory.py"),
        *("families/grouped_products/launch.py", "families/grouped_products/tiles.py"),
    }
