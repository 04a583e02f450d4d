"""A plan knows rows, tokens, memory, disk and time before a GPU is paid for."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from job import families, log, planning, storage
from job.engines import cpu, device, memory
from job.engines.device import Accelerator
from job.errors import InputError, OutOfMemoryError, UsageError
from job.families import model_source
from job.families.encoded import RowSize
from job.families.ernie45_vl import Ernie45VL
from job.local import eviction
from job.pipeline.context import RunContext
from job.planning import data, facts, speed
from job.planning.accelerators import ACCELERATORS
from job.planning.devices import memory_fit
from job.planning.feasibility import nearest_change
from job.planning.sample import worst_batch
from job.spec.load import LoadedSpec, load_spec
from job.spec.types import JobSpec, ModelSpec
from tests.jobs import ROOT, job

ROW = RowSize(tokens=400, image_tokens=202, supervised_tokens=150, patches=(800,))
PARAMETERS = 29_399_294_336


def estimate(
    model: Any, spec: JobSpec, rows: Sequence[RowSize], device: Accelerator
) -> memory.MemoryEstimate:
    """The estimate of a family that can tell."""
    found = memory.estimate(Ernie45VL, model, spec, rows, device)
    assert found is not None
    return found


def loaded(name: str, *overrides: str) -> LoadedSpec:
    return load_spec((ROOT / f"specs/{name}.yaml").read_text(), name, overrides, {})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 20 rows, of which one has no label and two are longer than 60 tokens."""
    folder = tmp_path_factory.mktemp("rows")
    texts = ["x" * 10] * 17 + ["y" * 50] * 2
    texts.insert(3, "")
    for number in range(len(texts)):
        Image.new("L", (112, 56), 10 * number).save(folder / f"{number}.png")
    lines = [{"image": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def made(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> facts.Plan:
    spec = loaded(
        "im2latex",
        f"data.train.uri={rows}",
        "data.eval=null",
        "data.eval_fraction=0.25",
        "train.max_length=60",
        f"output.uri={tmp_path_factory.mktemp('output')}",
    )
    return planning.make_plan(planning.PlanOptions(loaded=spec, accelerator="mi300x"))


def test_a_sample_of_rows_is_encoded_as_training_would(made: facts.Plan) -> None:
    found = made.data
    assert (found.train_rows, found.held_out_rows) == (13, 6)
    assert (found.sampled, found.refused, found.too_long) == (20, 1, 2)
    assert found.first_refusal is not None
    assert found.first_refusal.startswith("train.jsonl:4")
    assert found.longest_row == found.tokens_a_row
    assert found.tokens_an_epoch == round(13 * 17 / 19 * found.longest_row)  # type: ignore[operator]


def test_rows_to_validate_on_are_counted_apart(rows: Path, tmp_path: Path) -> None:
    fractions = ("data.eval=null", "data.eval_fraction=0.25", "data.validation_fraction=0.1")
    sets = (f"data.train.uri={rows}", *fractions, "train.eval_strategy=steps")
    spec = loaded("im2latex", *sets, f"output.uri={tmp_path}")
    plan = planning.make_plan(planning.PlanOptions(loaded=spec, accelerator="mi300x"))
    found = (plan.data.train_rows, plan.data.held_out_rows, plan.data.validation_rows)
    assert found == (10, 6, 3)  # as prep will count them
    assert "validation rows  3\n" in planning.text(plan)
    assert plan.validation is not None
    assert plan.validation.rows == 3


def test_a_plan_fits_a_terminal(made: facts.Plan) -> None:
    assert max(map(len, planning.text(made).splitlines())) <= 100


def test_the_json_form_keeps_its_keys(made: facts.Plan) -> None:
    """Keys are only ever added: whoever reads plans relies on these."""
    found = json.loads(planning.as_json(made))
    assert found["plan_version"] == 1
    assert {
        "name", "output", "settings", "data", "steps", "model", "memory", "disk", "pods", "time",
        "time_unknown", "stages", "stages_unknown",
    } <= found.keys()  # fmt: skip
    [fit] = found["memory"]["fits"]
    assert {
        "accelerator",
        "title",
        "memory",
        "fits",
        "tight",
        "dtype",
        "parts",
        "total",
    } <= fit.keys()
    assert fit["total"] == sum(fit["parts"].values())
    assert (fit["accelerator"], fit["fits"]) == ("mi300x", True)


def test_what_nobody_measured_is_not_told(made: facts.Plan) -> None:
    assert made.time is None
    assert made.time_unknown == (
        "no measurement for this accelerator (AMD Instinct MI300X) with a model of this size"
    )


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return families.architecture(ernie().model)[1]


def ernie(*overrides: str) -> JobSpec:
    # Without routed experts, which a full fine-tune cannot name.
    given = ("train.gradient_checkpointing=false", "lora.finetune_experts=null", *overrides)
    return loaded("ernie-4.5-vl-28b-latex", *given).spec


@pytest.mark.parametrize(
    ("accelerator", "overrides", "changed"),
    [
        ("h200", ("train.per_device_train_batch_size=64",), {"train.per_device_train_batch_size"}),
        (
            "h100",
            ("train.per_device_train_batch_size=1", "train.padding_free=false"),
            None,
        ),
        (
            "mi210",
            ("train.per_device_train_batch_size=3",),
            {"train.gradient_checkpointing"},
        ),
        ("mi300x", ("lora.method=full", "train.optim=adamw_torch"), {"lora.method"}),
        ("a100-40gb", (), set()),
    ],
)
def test_the_nearest_change_is_one_that_the_same_estimate_finds_to_fit(
    model: Any, accelerator: str, overrides: tuple[str, ...], changed: set[str] | None
) -> None:
    spec, device = ernie(*overrides), ACCELERATORS[accelerator].device()
    rows = spec.train.per_device_train_batch_size
    now = estimate(model, spec, worst_batch([ROW], rows), device)
    if changed is None:
        assert now.fits(device.memory_bytes)
        return
    assert not now.fits(device.memory_bytes)
    change = nearest_change(Ernie45VL, model, spec, [ROW], device)
    if not changed:  # the weights alone are more than there is
        assert change is None
        return
    assert change is not None
    assert changed <= set(change.settings)
    settings = [f"{key}={value}" for key, value in change.settings.items()]
    edited = ernie(*overrides, *(s.lower() if "True" in s else s for s in settings))
    batch = worst_batch([ROW], edited.train.per_device_train_batch_size)
    assert estimate(model, edited, batch, device) == change.memory
    assert change.memory.fits(device.memory_bytes)


def test_smaller_passes_keep_the_rows_of_a_step(model: Any) -> None:
    spec, device = ernie("train.per_device_train_batch_size=64"), ACCELERATORS["h200"].device()
    change = nearest_change(Ernie45VL, model, spec, [ROW], device)
    assert change is not None
    rows, passes = change.settings.values()
    assert rows * passes == 64 * spec.train.gradient_accumulation_steps
    twice = replace(spec, train=replace(spec.train, per_device_train_batch_size=rows * 2))
    larger = estimate(model, twice, worst_batch([ROW], rows * 2), device)
    assert not larger.fits(device.memory_bytes), "no smaller pass than needed is proposed"


def test_the_vendor_s_memory_is_not_all_there_is() -> None:
    for known in ACCELERATORS.values():
        assert known.device().memory_bytes < known.gigabytes * 2**30


def test_an_unknown_accelerator_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        planning.make_plan(planning.PlanOptions(loaded=loaded("latex"), accelerator="mi300"))
    assert "try mi300x" in str(caught.value)


def test_what_cannot_fit_ends_with_20_and_the_change_that_would(rows: Path, tmp_path: Path) -> None:
    done = job(
        "plan",
        "specs/im2latex.yaml",
        "--accelerator=a100-40gb",
        f"--set=data.train.uri={rows}",
        "--set=data.eval=null",
        "--set=train.per_device_train_batch_size=32768",
        "--set=train.fit=off",
        f"--output={tmp_path}",
    )
    assert done.code == OutOfMemoryError.exit_code, done.err
    assert "does not fit" in done.out
    assert "fix: --set train.per_device_train_batch_size=" in done.err


def sharded_fit(model: Any, accelerator: str, *more: str) -> facts.MemoryFit:
    """Of all weights of the large model, trained in shards."""
    settings = (
        "lora={method: full}",
        "model.dtype=auto",
        "train.optim=auto",
        "train.gradient_checkpointing=auto",
        *more,
    )
    spec = ernie(*settings, "runtime.distributed=fsdp2")
    device = ACCELERATORS[accelerator].device()
    fit = memory_fit(Ernie45VL, model, spec, [ROW], {accelerator: device})
    assert fit is not None
    return fit


def test_the_fewest_processes_that_hold_sharded_weights_are_named(model: Any) -> None:
    [fit] = sharded_fit(model, "mi300x").fits
    assert fit.fits
    assert fit.processes == 4
    [alone] = [fit for fit in sharded_fit(model, "mi325x").fits if fit.fits]
    assert alone.processes == 2


def test_weights_that_are_read_in_shards_need_not_fit_on_one_gpu(model: Any) -> None:
    [fit] = sharded_fit(model, "h100").fits
    assert fit.processes is not None
    assert fit.fits
    assert fit.parts["weights"] < fit.loading < fit.memory < fit.processes * fit.parts["weights"]


def test_random_weights_that_one_gpu_cannot_hold_are_refused_however_many_there_are(
    model: Any,
) -> None:
    memory = sharded_fit(model, "h100", "model.init=random")
    [fit] = memory.fits
    assert fit.total < fit.memory < fit.loading
    plan: Any = SimpleNamespace(memory=memory)
    with pytest.raises(OutOfMemoryError, match="loading the weights, before the first step"):
        planning.refuse_if_too_large(plan)


# --- time ------------------------------------------------------------------------------------


def took(
    batch_tokens: float,
    device: str = "NVIDIA H200",
    cores: int | None = None,
    parameters: int = PARAMETERS,
) -> speed.TimeRange | None:
    return speed.training_time(
        speed.measurements(),
        speed.Training(
            device=device,
            cores=cores,
            parameters=parameters,
            method="lora",
            compiled=False,
            tokens=1e6,
            batch_tokens=batch_tokens,
        ),
    )


def test_time_lies_between_the_measured_passes_on_both_sides() -> None:
    time = took(1000)
    assert time is not None
    assert (time.shortest, time.longest) == pytest.approx((1e6 / 12_581, 1e6 / 763))
    assert not time.beyond
    assert len(time.sources) == 2


def test_a_pass_smaller_than_any_measured_says_so() -> None:
    time = took(100)
    assert time is not None
    assert time.shortest == time.longest == pytest.approx(1e6 / 763)
    assert time.beyond


def test_there_is_no_time_for_another_device_or_model() -> None:
    assert took(1000, "AMD Instinct MI355X") is None
    assert took(1000, "NVIDIA H100") is None


TINY_PARAMETERS = 5_747_736


@pytest.mark.parametrize("name", ["x86_64", "Another CPU"])
def test_a_cpu_s_speed_stands_for_those_of_as_many_cores_and_says_what_was_measured(
    name: str,
) -> None:
    time = took(1209, name, 2, TINY_PARAMETERS)
    assert time is not None
    [source] = time.sources
    assert source.endswith(", on x86_64 with 2 cores")
    assert took(1209, name, 64, TINY_PARAMETERS) is None
    assert took(1209, name, None, TINY_PARAMETERS) is None, "no GPU has a CPU's speed"
    assert took(1000, "NVIDIA H200", 2) is None, "no CPU has a GPU's speed"


def test_a_plan_for_a_cpu_that_nobody_measured_tells_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The architecture's name is one for a laptop and for a server of 64 cores."""
    monkeypatch.setattr(cpu, "model", lambda: "x86_64")
    order = planning.PlanOptions(loaded=loaded("latex", "runtime.accelerator=cpu"))
    for cores in (2, 64):
        monkeypatch.setattr(device, "cores", lambda cores=cores: cores)
        made = planning.make_plan(order)
        assert (made.time is not None) is (cores == 2)
    assert made.time_unknown == (
        "no measurement for this CPU of 64 cores (x86_64) with a model of this size"
    )


def test_every_record_of_a_cpu_s_speed_says_how_many_cores() -> None:
    for each in speed.measurements():
        assert (each.cores is None) is ("NVIDIA" in each.device), each.source


def test_a_measured_speed_names_its_file_and_its_model_s_size() -> None:
    known = list(speed.measurements())
    assert {each.source.split(":")[0] for each in known} >= {
        "prototype-ladder-h200.json",
        "training-tiny-cpu.json",
    }
    for each in known:
        assert 0 < each.slowest <= each.fastest
        assert each.parameters > 1e6


def test_a_plan_tells_time_and_cost_of_every_stage_that_will_run(made: facts.Plan) -> None:
    def took(stage: str, shortest: float, longest: float) -> facts.StageTime:
        return facts.StageTime(
            stage=stage,
            shortest=shortest,
            longest=longest,
            error=0.2,
            cost_from=shortest / 900,
            cost_to=longest / 900,
        )

    whole = facts.JobTime(
        accelerator="h200",
        stages=(took("start", 9, 9), took("eval", 8, 21)),
        total=took("total", 17, 30),
        sources=("reference-job-28b-h200.json",),
    )
    shown = planning.text(replace(made, job_time=whole))
    assert "time and cost on h200" in shown
    assert "training time" not in shown
    for line in (
        "start        9.0s, ±20%",
        "eval         8.0s to 21.0s, ±20%",
        "total        17.0s to 30.0s, ±20%; 0.02 to 0.03 at the given price",
        "measured     reference-job-28b-h200.json",
    ):
        assert f"\n  {line}\n" in shown
    written = json.loads(planning.as_json(replace(made, job_time=whole)))
    assert written["job_time"]["total"]["longest"] == 30
    assert written["work"]["steps"] == made.steps.total


# --- what is read ----------------------------------------------------------------------------


def read_by_this_process() -> int:
    """Bytes that this process has asked the kernel for, pages in its cache included."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def large_rows(path: Path, size: int) -> int:
    """Writes a list of about so many bytes; gives its number of rows."""
    lines = [json.dumps({"image": "a.png", "text": "x" * n}) + "\n" for n in range(1, 1000)]
    text = "".join(lines)
    path.write_text(text * (size // len(text)))
    return len(lines) * (size // len(text))


def of(path: Path, *more: str) -> planning.PlanOptions:
    output = f"output.uri={path.parent / 'output'}"
    sets = (f"data.train.uri={path}", "data.eval=null", output, *more)
    return planning.PlanOptions(loaded=loaded("im2latex", *sets), accelerator="mi300x")


def test_a_plan_tells_whether_a_pass_of_reinforcement_fits() -> None:
    def plan(name: str | None, *settings: str) -> tuple[facts.Plan, str]:
        options = planning.PlanOptions(loaded=loaded("latex-grpo", *settings), accelerator=name)
        made = planning.make_plan(options)
        return made, " ".join(planning.text(made).split())

    made, text = plan("rtx-4090")
    assert made.reinforcement is not None
    [fit] = made.reinforcement.fits
    assert fit.fits
    assert f"a pass {log.size(fit.total)} of {log.size(fit.memory)}: fits" in text
    stored = made.disk.checkpoints
    long = ("reinforce.max_completion_length=16384",)
    larger, text = plan("rtx-4090", *long)
    assert larger.reinforcement is not None
    [other] = larger.reinforcement.fits
    assert other.total - fit.total > larger.reinforcement.logits_bytes / 2
    assert not other.fits
    assert ": does not fit" in text
    assert "reinforced/ " in text
    assert "a pass does not fit " in plan(None, *long)[1]
    alone = "train.max_steps=0", "train.eval_strategy=no", "train.eval_steps=null"
    started, _ = plan("rtx-4090", *alone, "train.load_best_model_at_end=false")
    assert stored == 2 * started.disk.checkpoints, "of training and of reinforcement"


def test_a_large_list_is_not_read_through(made: facts.Plan, tmp_path: Path) -> None:
    Image.new("L", (112, 56)).save(tmp_path / "a.png")
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = large_rows(train, 80 * 2**20)
    held_out.write_text(json.dumps({"image": "a.png", "text": "x"}) + "\n")
    before = read_by_this_process()
    found = planning.make_plan(of(train, f"data.eval={{uri: {held_out}}}"))
    assert read_by_this_process() - before < 40 * 2**20
    assert found.data.train_rows == pytest.approx(rows, rel=0.01)
    assert not found.data.exact
    assert f"about {found.data.train_rows:,}" in planning.text(found)
    stages = dict(found.stages)
    assert stages.pop("push") == "off (export.push_to_hub: false)"
    assert set(stages.values()) == {"will run"}


def test_weights_are_not_read_for_a_plan(made: facts.Plan, rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_source.MODELS / "ernie-vl-tiny", model)
    with (model / "model.safetensors").open("ab") as weights:
        weights.truncate(200 * 2**20)
    order = of(rows, f"model.model_name_or_path={model}", f"output.uri={tmp_path}/output")
    before = read_by_this_process()
    planning.make_plan(order)
    assert read_by_this_process() - before < 40 * 2**20


def test_a_stage_that_was_made_is_compared_with_what_it_would_be(
    rows: Path, tmp_path: Path
) -> None:
    order = of(rows, f"output.uri={tmp_path}")
    output = RunContext(order.loaded, "run").output
    fingerprint = RunContext(order.loaded, "run").fingerprint("prep")
    output.acquire()
    (output.stages.local.create("prep") / "file").write_text("made")
    output.stages.publish("prep", fingerprint, "2026-01-01T00:00:00Z", 1.0, {"rows": {}})
    output.release()
    stages = planning.make_plan(order).stages
    assert stages["prep"].startswith("complete since 2026-01-01")
    assert stages["train"] == "will run"
    other = planning.make_plan(of(rows, f"output.uri={tmp_path}", "data.instruction=Another"))
    assert other.stages["prep"] == "will run"


# --- what will not train ---------------------------------------------------------------------


def test_rows_that_are_counted_are_those_before_leakage_and_refusals(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SPLIT_ROWS", 39)  # one less than there are
    made = planning.make_plan(of(rows, f"data.eval={{uri: {rows}}}"))
    assert made.data.exact
    assert "20 before leak removal and rejects" in planning.text(made)
    assert "20 before rejects, at most" in planning.text(made)


def test_a_split_without_rows_is_told_before_a_run_refuses_it(rows: Path) -> None:
    made = planning.make_plan(of(rows, f"data.eval={{uri: {rows}}}"))
    assert made.data.warning is not None
    assert made.data.warning.startswith("no row is left to train on")


def test_rows_that_are_all_too_long_are_told_before_training_refuses_them(rows: Path) -> None:
    made = planning.make_plan(of(rows, "train.max_length=16"))
    assert made.data.too_long == 19
    assert made.data.warning is not None
    assert "training will refuse them" in " ".join(planning.text(made).split())
    assert planning.make_plan(of(rows, "train.max_length=60")).data.warning is None


def test_missing_data_is_told_with_all_that_is_known_without_it(tmp_path: Path) -> None:
    done = job(
        "plan",
        "specs/im2latex.yaml",
        "--accelerator=mi300x",
        f"--set=data.train.uri={tmp_path}/none.jsonl",
        f"--output={tmp_path}/output",
    )
    assert done.code == InputError.exit_code, done.err
    assert "none.jsonl" in done.err
    for section in ("model", "disk", "resources of a pod"):
        assert f"\n{section}\n" in done.out
    assert "\nmemory of one device" in done.out
    assert "unknown" in done.out


# --- what is fetched -------------------------------------------------------------------------


def test_no_weights_are_fetched_for_a_plan(tmp_path: Path) -> None:
    uri = "memory://plan/model"
    for name in ("config.json", "tokenizer.json", "model-1.safetensors"):
        storage.write_bytes(storage.join(uri, name), b"{}")
    spec = replace(loaded("latex").spec.model, model_name_or_path=uri)
    assert isinstance(spec, ModelSpec)
    directory = model_source.fetch_headers(model_source.find_model(spec), tmp_path)
    found = {path.name for path in directory.iterdir()}
    assert found == {"config.json", "tokenizer.json", eviction.COMPLETE, eviction.USED}


def test_an_output_that_may_not_be_read_leaves_the_rest_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    text = Path("specs/latex.yaml").read_text(encoding="utf-8")
    overrides = ("output.uri=s3://somebody-elses/bucket", "data.train.limit=8")
    made = planning.make_plan(
        planning.PlanOptions(loaded=load_spec(text, "latex.yaml", overrides, {}))
    )
    assert made.memory is not None
    assert made.data.train_rows
    assert "access denied" in (made.stages_unknown or "")


def test_the_worst_pass_is_one_that_training_may_come_to() -> None:
    short = RowSize(tokens=100, image_tokens=50, supervised_tokens=40, patches=(200,))
    sampled = [
        *[short] * 31,
        RowSize(tokens=900, image_tokens=50, supervised_tokens=40, patches=(200,)),
    ]
    pair, many = worst_batch(sampled, 2), worst_batch(sampled, 64)
    assert sum(row.tokens for row in pair) == 900 + 900 - 1, "in a thousand pairs they meet"
    longest = sum(row.tokens >= 899 for row in many)
    assert 2 < longest < 12, "64 of them never do"
    assert many == worst_batch(sampled, 64)
