"""The parts of training: length filter, label proof, checkpoints, arguments."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job import families, storage
from job.engines.device import Accelerator, resolve_optim
from job.errors import DataError, InputError, SpecError
from job.families.encoded import IGNORED, Encoded
from job.prep import formulas
from job.prep.images import inspect
from job.prep.rows import Message, Part, Row
from job.reinforce.reinforce import _schedule
from job.spec.load import load_spec
from job.spec.types import JobSpec
from job.train import length_filter
from job.train.checkpoint.storage import MANIFEST, CheckpointStore
from job.train.dataset import Collator
from job.train.label_proof import LABEL_PROOF, label_proof, write_label_proof
from job.train.length_filter import filter_by_length, truncate
from job.train.lengths import lengths
from job.train.schedule import Schedule
from job.train.trainer_setup import training_arguments

TINY = Path(families.__file__).parent / "builtin" / "ernie-vl-tiny"
CPU = Accelerator(kind="cpu", name="test", memory_bytes=2**30)
GPU = Accelerator(kind="cuda", name="test", memory_bytes=2**30)


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec


@pytest.fixture(scope="module")
def family(spec: JobSpec) -> families.Family:
    return families.bind(families.read_checkpoint("tiny", TINY), spec.model, spec.data)


def row(answer: str, question: str = "Read.", images: int = 1) -> Row:
    spec = load_spec(Path("specs/latex.yaml").read_text(), "s", environ={}).spec
    image = inspect(formulas.sample(spec.data.train[0].formulas, 0).png)
    parts = [*[Part(image=i) for i in range(images)], Part(text=question)]
    return Row(
        id="rows.jsonl:1",
        messages=(
            Message(role="user", parts=tuple(parts)),
            Message(role="assistant", parts=(Part(text=answer),)),
        ),
        images=(image,) * images,
    )


def cut(family: families.Family, spec: JobSpec, made: Row, strategy: Any, length: int) -> Any:
    return truncate(
        family.encode(made),
        family,
        replace(spec.data, truncation_strategy=strategy),
        replace(spec.train, max_length=length),
    )


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_truncation_never_cuts_an_image(
    family: families.Family, spec: JobSpec, strategy: str
) -> None:
    made = row("x" * 60, question="y" * 60)
    whole = family.encode(made)
    short = cut(family, spec, made, strategy, len(whole.input_ids) - 50)
    image = [token for token in whole.input_ids if family.is_image_token(token)]
    assert [token for token in short.input_ids if family.is_image_token(token)] == image
    assert len(short.input_ids) == len(whole.input_ids) - 50
    assert short.images == whole.images


def test_a_row_that_is_too_long_is_dropped_whole_by_default(
    family: families.Family, spec: JobSpec
) -> None:
    made = row("x" * 60)
    length = len(family.encode(made).input_ids)
    assert cut(family, spec, made, "delete", length) is not None
    assert cut(family, spec, made, "delete", length - 1) is None


def test_a_row_whose_images_alone_are_too_long_is_dropped(
    family: families.Family, spec: JobSpec
) -> None:
    assert cut(family, spec, row("x", images=3), "right", 60) is None


def test_a_row_without_an_answer_left_is_dropped(family: families.Family, spec: JobSpec) -> None:
    made = row("x", question="y" * 60)
    length = len(family.encode(made).input_ids)
    assert cut(family, spec, made, "right", length - 40) is None


def test_dropped_rows_are_counted_and_none_left_is_an_error(
    family: families.Family, spec: JobSpec
) -> None:
    rows = [row("x"), row("x" * 90), row("y")]
    length = len(family.encode(rows[0]).input_ids)
    settings = replace(spec.train, max_length=length)
    filtered = filter_by_length(rows, family, spec.data, settings)
    assert (filtered.indices, filtered.dropped, filtered.lengths) == ((0, 2), 1, (length, length))
    assert filtered.token_counts == {length: 2, length + 89: 1}, "before they are cut or dropped"
    assert filtered.patches == (64, 64), "16 image tokens of four patches"
    with pytest.raises(DataError, match=r"all 1 training rows are longer .*max_length|longer"):
        filter_by_length(rows[1:2], family, spec.data, settings)


def test_lengths_hold_the_share_over_max_length_and_a_histogram() -> None:
    found = lengths(Counter({60: 70, 64: 24, 200: 5, 3000: 1}), 128)
    assert found == {
        "rows": 100,
        "tokens": 9736,
        "tokens_a_row": {
            "mean": 97.4,
            "median": 60,
            "p95": 200,
            "max": 3000,
            "histogram": {"32-63": 70, "64-127": 24, "128-255": 5, "2048-4095": 1},
        },
        "over_max_length": {"max_length": 128, "rows": 6, "share": 0.06},
    }


def test_worker_processes_measure_as_the_job_itself_does_and_name_the_row_they_refuse(
    family: families.Family, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(length_filter, "_MIN_ROWS_FOR_WORKERS", 1)
    rows = [row("x" * (1 + i % 7)) for i in range(130)]
    alone = filter_by_length(rows, family, spec.data, replace(spec.train, dataloader_num_workers=0))
    settings = replace(spec.train, dataloader_num_workers=2)
    assert filter_by_length(rows, family, spec.data, settings) == alone
    control = row("y", question="<|IMAGE_PLACEHOLDER|>")
    with pytest.raises(DataError) as alone_refused:
        family.encode(control)
    with pytest.raises(DataError) as refused:
        filter_by_length([*rows, control], family, spec.data, settings)
    assert refused.value.problems == alone_refused.value.problems


def test_a_batch_with_no_trained_token_is_an_error_that_names_its_rows(
    family: families.Family,
) -> None:
    encoded = family.encode(row("x"))
    mute = replace(encoded, labels=(IGNORED,) * len(encoded.labels))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: a batch has no trained token"):
        Collator(family, padding_free=False).batch([mute])


def test_the_label_proof_marks_exactly_the_answer(family: families.Family) -> None:
    proof = label_proof(family.encode(row("\\frac{a}{b}")), family)
    assert proof["marked"].endswith("</think>\n\n⟦\\frac{a}{b}<|end_of_sentence|>⟧")
    assert "<|IMAGE_PLACEHOLDER|>×16<|IMAGE_END|>" in proof["marked"]
    assert proof["trained_tokens"] == 8


def test_the_log_shows_both_ends_of_a_long_row(
    family: families.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = " ".join(f"x_{number}" for number in range(900))
    dataset = SimpleNamespace(row=lambda number: family.encode(row(answer)))
    write_label_proof(dataset, family, tmp_path)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert re.search(r"⟦x_0 x_1 .{60,120} … .{60,120}x_899.*⟧", said)
    assert len(said) < 1000
    assert answer in json.loads((tmp_path / LABEL_PROOF).read_text())["marked"]


def test_a_secret_where_a_long_row_is_cut_is_not_in_the_log(
    family: families.Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_plantedHubToken0123456789")
    for before in range(70, 110, 9):
        encoded = family.encode(row(f"{'x' * before}hf_plantedHubToken0123456789{'y' * 300}"))
        dataset = SimpleNamespace(row=lambda _, encoded=encoded: encoded)
        write_label_proof(dataset, family, tmp_path)  # type: ignore[arg-type]
    assert "plant" not in capsys.readouterr().err


def test_a_secret_in_a_row_is_in_its_label_proof_neither_as_text_nor_as_tokens(
    family: families.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_plantedHubToken0123456789")
    encoded = family.encode(row("say hf_plantedHubToken0123456789 \x9b2J"))
    dataset = SimpleNamespace(row=lambda _: encoded)
    write_label_proof(dataset, family, tmp_path)  # type: ignore[arg-type]
    text = (tmp_path / "label_proof.json").read_text(encoding="utf-8")
    assert "planted" not in text
    assert "\x9b" not in text
    proof = json.loads(text)
    assert proof["pieces"][-1]["text"].startswith("say ${HF_TOKEN} \x9b2J")
    assert proof["pieces"][-1]["tokens"] == []
    assert proof["pieces"][0]["tokens"]


def test_an_answer_that_is_not_trained_has_the_same_tokens_and_no_label(
    family: families.Family,
) -> None:
    first, last = row("a").messages, row("b", images=0).messages
    both = replace(row("a"), messages=(*first, *last))
    muted = replace(both, messages=(first[0], replace(first[1], train=False), *last))
    every, some = (
        label_proof(family.encode(both), family),
        label_proof(family.encode(muted), family),
    )
    assert family.encode(muted).input_ids == family.encode(both).input_ids
    assert [p["text"] for p in every["pieces"] if p["trained"]] == [
        "a<|end_of_sentence|>",
        "b<|end_of_sentence|>",
    ]
    assert [p["text"] for p in some["pieces"] if p["trained"]] == ["b<|end_of_sentence|>"]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_that_the_machine_lacks_is_rejected_with_its_substitute(
    spec: JobSpec, optim: str
) -> None:
    with pytest.raises(SpecError, match=rf"need a GPU \(found {optim}\)\n.*optim: adamw_torch "):
        resolve_optim(replace(spec.train, optim=optim), CPU)


def test_auto_selects_an_optimizer_that_the_machine_has(spec: JobSpec) -> None:
    automatic = replace(spec.train, optim="auto")
    assert resolve_optim(automatic, CPU) == "adamw_torch"
    assert resolve_optim(automatic, GPU) in ("adamw_8bit", "adamw_torch_fused")


class TestCheckpoints:
    """A checkpoint is valid as a whole or not at all."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> CheckpointStore:
        return CheckpointStore(uri=str(tmp_path / "checkpoints"), fingerprint="f")

    def save(
        self, store: CheckpointStore, tmp_path: Path, step: int, loss: float | None = None
    ) -> None:
        directory = tmp_path / f"made-{step}"
        directory.mkdir(exist_ok=True)
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (directory / "weights").write_bytes(bytes([step]) * 1000)
        store.save(directory, step, loss)

    def newest(self, store: CheckpointStore, tmp_path: Path) -> int | None:
        if store.latest(tmp_path / "fetched") is None:
            return None
        return (tmp_path / "fetched" / "weights").read_bytes()[0]

    def test_the_newest_is_found(self, store: CheckpointStore, tmp_path: Path) -> None:
        assert self.newest(store, tmp_path) is None
        for step in (5, 10, 100):
            self.save(store, tmp_path, step)
        assert self.newest(store, tmp_path) == 100

    @pytest.mark.parametrize("damage", ["wrong bytes", "missing file", "no manifest", "bad JSON"])
    def test_a_damaged_one_is_skipped_with_its_reason(
        self,
        store: CheckpointStore,
        tmp_path: Path,
        damage: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.save(store, tmp_path, 5)
        self.save(store, tmp_path, 10)
        newest = tmp_path / "checkpoints" / "step-10"
        if damage == "wrong bytes":
            (newest / "weights").write_bytes(b"\xff" * 1000)
        elif damage == "missing file":
            (newest / "weights").unlink()
        elif damage == "no manifest":
            (newest / MANIFEST).unlink()
        else:
            (newest / MANIFEST).write_text("{")
        assert self.newest(store, tmp_path) == 5
        assert "checkpoint skipped step=10 reason=" in capsys.readouterr().err

    def test_another_training_s_is_not_taken(self, store: CheckpointStore, tmp_path: Path) -> None:
        self.save(store, tmp_path, 5)
        assert self.newest(replace(store, fingerprint="g"), tmp_path) is None

    def test_what_changed_is_named(
        self, store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        then = {"train.seed": 1, "train.optim": "sgd", "the files of data.train": "a" * 64}
        self.save(replace(store, parts=then), tmp_path, 5)
        now = {**then, "train.seed": 2, "the files of data.train": "b" * 64}
        assert self.newest(replace(store, fingerprint="g", parts=now), tmp_path) is None
        logged = capsys.readouterr().err
        assert "train.seed was 1 and is 2; the files of data.train changed" in logged
        assert "optim" not in logged
        assert "training starts from the beginning: no usable checkpoint stored=1" in logged

    def test_one_of_another_length_is_taken_if_its_learning_rates_were_the_same(
        self, store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def of(kind: str, steps: int) -> CheckpointStore:
            schedule = Schedule(
                lr_scheduler_type=kind, warmup_steps=6, learning_rate=0.1, steps=steps
            )
            return replace(store, schedule=schedule)

        for kind in ("constant", "constant_with_warmup", "inverse_sqrt"):
            for step in (5, 10):
                self.save(of(kind, 10), tmp_path, step)
            assert self.newest(of(kind, 20), tmp_path) == 10
            assert self.newest(of(kind, 7), tmp_path) == 5
            assert "it is past the 7 steps of this training" in capsys.readouterr().err
        for kind in ("linear", "cosine", "cosine_with_restarts", "polynomial"):
            for step in (5, 10):
                self.save(of(kind, 10), tmp_path, step)
            assert self.newest(of(kind, 10), tmp_path) == 10
            assert self.newest(of(kind, 20), tmp_path) == 5, "within the warm-up"
            logged = capsys.readouterr().err
            assert f"train.lr_scheduler_type {kind} depends on the number of steps" in logged
            assert "which was 10 and is 20" in logged

    def test_reinforcement_of_another_length_names_its_own_keys(
        self, store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = Path("specs/latex-grpo.yaml").read_text()
        own = load_spec(text, "spec", environ={}).spec.reinforce
        assert own is not None
        schedule = _schedule(replace(own, lr_scheduler_type="linear", max_steps=10))
        store = replace(store, schedule=schedule)
        self.save(store, tmp_path, 5)
        assert self.newest(replace(store, schedule=replace(schedule, steps=20)), tmp_path) is None
        logged = capsys.readouterr().err
        assert "reinforce.lr_scheduler_type linear depends on the number of steps" in logged
        assert "which was 10 and is 20 (reinforce.max_steps)" in logged
        assert "train." not in logged

    def test_pruning_a_shorter_training_leaves_what_a_longer_one_stored(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        schedule = Schedule(lr_scheduler_type="constant", warmup_steps=0, learning_rate=1, steps=9)
        for step in (3, 6, 9):
            self.save(replace(store, schedule=schedule), tmp_path, step)
        replace(store, schedule=replace(schedule, steps=6)).prune(keep=1, reached=6)
        assert store.steps() == (6, 9)
        linear = replace(schedule, lr_scheduler_type="linear", steps=6)
        replace(store, schedule=linear).prune(keep=1, reached=6)
        assert store.steps() == ()

    def test_one_whose_content_does_not_match_is_skipped_or_rejected_with_the_reason(
        self, store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for step in (5, 10):
            self.save(store, tmp_path, step)

        def check(directory: Path) -> str | None:
            wrong = (directory / "weights").read_bytes()[0] == 10
            return "weights are too heavy" if wrong else None

        assert store.latest(tmp_path / "fetched", check) == store.at(5)
        assert 'skipped step=10 reason="weights are too heavy"' in capsys.readouterr().err
        with pytest.raises(InputError, match="weights are too heavy"):
            store.fetch(store.at(10), tmp_path / "fetched", check)

    def test_one_named_by_uri_is_used_or_rejected_with_the_reason(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        self.save(store, tmp_path, 5)
        other = replace(store, fingerprint="g")
        found = other.fetch(storage.join(store.uri, "step-5"), tmp_path / "fetched")
        assert (found / "weights").read_bytes() == bytes([5]) * 1000
        with pytest.raises(InputError, match="no manifest"):
            other.fetch(storage.join(store.uri, "step-6"), tmp_path / "fetched")

    def test_the_oldest_are_pruned(self, store: CheckpointStore, tmp_path: Path) -> None:
        for step in (5, 10, 15):
            self.save(store, tmp_path, step)
        store.prune(keep=2, reached=15)
        assert store.steps() == (10, 15)

    def test_one_that_a_resume_could_not_use_displaces_no_good_one(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        for step in (5, 10, 15):
            self.save(store, tmp_path, step, loss=1 / step)
        (tmp_path / "checkpoints" / "step-15" / "weights").write_bytes(b"damaged")
        assert self.newest(store, tmp_path) == 10
        for step in (11, 12):
            self.save(store, tmp_path, step, loss=9)
            store.prune(keep=1, reached=step)
            assert self.newest(store, tmp_path) == step
        assert store.steps() == (10, 12, 15)

    @pytest.mark.parametrize("path", ["../planted", "a/../../planted", "/tmp/planted"])
    def test_one_whose_files_lead_out_of_its_folder_is_rejected(
        self, store: CheckpointStore, tmp_path: Path, path: str
    ) -> None:
        self.save(store, tmp_path, 5)
        manifest = tmp_path / "checkpoints" / "step-5" / MANIFEST
        manifest.write_text(manifest.read_text().replace('"weights"', f'"{path}"'))
        with pytest.raises(InputError, match="leads out of its folder"):
            store.fetch(storage.join(store.uri, "step-5"), tmp_path / "fetched")
        assert self.newest(store, tmp_path) is None

    def test_the_best_is_kept_beside_the_newest(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        for step, loss in ((5, 3.0), (10, 1.0), (15, 2.0), (20, 2.5)):
            self.save(store, tmp_path, step, loss)
            store.prune(keep=1, reached=step)
        assert store.steps() == (10, 20)

    def test_unusable_ones_are_pruned_and_do_not_count(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        self.save(replace(store, fingerprint="g"), tmp_path, 100)
        for step in (5, 10, 15):
            self.save(store, tmp_path, step)
        (tmp_path / "checkpoints" / "step-15" / MANIFEST).unlink()
        store.prune(keep=2, reached=15)
        assert store.steps() == (5, 10)

    def test_one_that_other_machines_have_begun_is_not_pruned(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        part = tmp_path / "part"
        (part / "states" / "rank-1").mkdir(parents=True)
        (part / "states" / "rank-1" / "file").write_bytes(b"1")
        self.save(store, tmp_path, 5)
        store.begin(10)
        store.save_part(part, 10)
        store.prune(keep=1, reached=5)
        assert store.steps() == (5, 10)
        assert store.newest() == 5
        self.save(store, tmp_path, 15)
        store.prune(keep=2, reached=15)
        assert store.steps() == (5, 15), "what was never completed goes"

    def test_one_with_parts_of_other_machines_is_whole_or_not_at_all(
        self, store: CheckpointStore, tmp_path: Path
    ) -> None:
        self.save(store, tmp_path, 5)
        part, own = tmp_path / "part", tmp_path / "made-5"
        (part / "states" / "rank-1").mkdir(parents=True)
        (part / "states" / "rank-1" / "file").write_bytes(b"1")
        store.begin(5)
        assert store.newest() is None, "the parts of two trainings never mix"
        others = store.save_part(part, 5)
        store.save(own, 5, others=others)
        assert self.newest(store, tmp_path) == 5
        assert (tmp_path / "fetched" / "states" / "rank-1" / "file").read_bytes() == b"1"
        shutil.rmtree(tmp_path / "checkpoints" / "step-5" / "states")
        assert self.newest(store, tmp_path) is None

    def test_a_folder_of_one_is_fetched_alone(self, store: CheckpointStore, tmp_path: Path) -> None:
        made = tmp_path / "made-5" / "states"
        made.mkdir(parents=True)
        (made / "file").write_bytes(b"1")
        self.save(store, tmp_path, 5)
        target = tmp_path / "target"
        assert store.fetch_part(5, "states", target) is None
        assert [each.name for each in target.rglob("*") if each.is_file()] == ["file"]
        assert store.fetch_part(5, "state", target) == "it has no state"
        other = replace(store, fingerprint="g")
        assert "belongs to another spec" in str(other.fetch_part(5, "states", target))
        assert other.fetch_part(5, "states", target, verified=True) is None

    def test_one_with_a_pickle_in_it_is_rejected(
        self, store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "made-5").mkdir()
        (tmp_path / "made-5" / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        self.save(store, tmp_path, 5)
        assert self.newest(store, tmp_path) is None
        assert "optimizer.pt is a pickle" in capsys.readouterr().err


def test_a_gpu_s_peak_is_reset_without_cached_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", done.append)
    replace(GPU, index=3).reset_peak_memory()
    assert done == ["emptied", 3]


def test_one_process_uses_one_gpu_of_a_machine_with_several(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    engine: Any = SimpleNamespace(autocast=False, device=torch.device("cuda:0"))
    arguments = training_arguments(spec, "adamw_torch", engine, tmp_path, None)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == spec.train.per_device_train_batch_size


def test_transformers_says_no_more_in_other_processes_than_in_rank_0(
    spec: JobSpec, tmp_path: Path
) -> None:
    engine: Any = SimpleNamespace(autocast=False, device=torch.device("cpu"))
    arguments = training_arguments(spec, "adamw_torch", engine, tmp_path, None)
    assert arguments.log_level_replica == arguments.log_level == "error"


def test_encoded_rows_count_their_trained_tokens() -> None:
    encoded = Encoded(id="a", input_ids=(1, 2, 3), labels=(IGNORED, 2, 3), images=())
    assert encoded.supervised_tokens == 2
