"""Measures what parity compares: losses, logits, exports, ways to compute, tests for GPUs."""

import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from job import log
from job.artifacts import sbom
from job.artifacts.provenance import source_revision
from job.engines import ways
from job.engines.device import Accelerator, detect
from job.engines.ways import child
from job.errors import JobError
from job.spec.load import load_spec
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from job.prep.rows import Row

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "specs" / "latex.yaml"
EXACT = {
    "data.train.limit": 64,
    "data.eval.limit": 8,
    "data.validation": "null",
    "train.eval_strategy": "no",
    "train.eval_steps": "null",
    "train.load_best_model_at_end": "false",
    "train.max_steps": 8,
    "train.save_steps": 8,
    "train.warmup_steps": 1,
    "train.per_device_train_batch_size": 8,
    "train.logging_steps": 1,
    "eval.max_samples": 8,
    "eval.generation.max_new_tokens": 8,
    "model.dtype": "float32",
    "train.optim": "adamw_torch",
    "train.fit": "off",
}
"""Settings of the run that every device computes in fp32, in the same passes."""
FAST = {**EXACT, "model.dtype": "auto", "train.optim": "auto", "train.fit": "auto"}
"""Settings of the run as a GPU computes it by default, in bf16."""
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "transformers", "peft", "bitsandbytes")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SHOWN_TOKENS, SHOWN_LOGITS = 8, 16
"""Of each row's logits: the last tokens, and the first entries of the vocabulary."""


JOB_SECONDS, TESTS_SECONDS = 30 * 60.0, 90 * 60.0
"""Limits of one run of the tiny job, which takes a minute or two, and of all tests for GPUs."""


def measure(cache: Path, tests: Path | None) -> dict[str, Any]:
    """The record of this machine. `tests` is the folder of the tests for GPUs.

    Raises JobError if the tiny job fails.
    """
    started = time.monotonic()
    spec = _spec(cache)
    accelerator = detect(spec.runtime)
    log.info("parity", device=accelerator.name, kind=accelerator.kind)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"float32": _run("float32", EXACT, Path(folder) / "float32", cache)}
        if accelerator.kind != "cpu":
            runs["bfloat16"] = _run("bfloat16", FAST, Path(folder) / "bfloat16", cache)
    found = ways.find(accelerator, cache, anew=True)
    record = {
        "name": f"parity-{accelerator.kind}",
        "kind": accelerator.kind,
        "device": accelerator.name,
        "runs": runs,
        "logits": _logits(spec, accelerator),
        "ways": [outcome.to_json() for outcome in found.outcomes],
        "gpu_tests": _gpu_tests(tests, accelerator),
        "versions": _versions(accelerator),
        "command": "python -m job parity",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "source_revision": source_revision(),
        "seconds": round(time.monotonic() - started, 1),
    }
    return {**record, "ran": _ran(record)}


def _spec(cache: Path) -> JobSpec:
    overrides = [f"{key}={value}" for key, value in {**EXACT, "runtime.cache_dir": cache}.items()]
    return load_spec(SPEC.read_text(encoding="utf-8"), str(SPEC), overrides, environ={}).spec


def _run(name: str, settings: Mapping[str, object], output: Path, cache: Path) -> dict[str, Any]:
    """Runs the tiny job in a process of its own; its losses, digests and speed."""
    every = {**settings, "runtime.cache_dir": cache, "runtime.workdir": output / "work"}
    arguments = [item for key, value in every.items() for item in ("--set", f"{key}={value}")]
    command = ["run", str(SPEC), "--output", str(output / "out"), "--log-format", "text"]
    log.info("run the tiny job", computes_in=name)
    started = time.monotonic()
    fix = f"run it alone: python -m job {' '.join([*command, *arguments])}"
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-m", "job", *command, *arguments],
            # One thread: sums that other numbers of threads divide are rounded otherwise.
            env=child.environ() | ONE_THREAD,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"was not done after {log.duration(JOB_SECONDS)}"
        raise JobError(f"the tiny job in {name}", reason, fix=fix) from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-4:])
        reason = f"ended with exit code {done.returncode}: {said}"
        raise JobError(f"the tiny job in {name}", reason, fix=fix)
    return _result(output / "out", time.monotonic() - started)


def _result(output: Path, seconds: float) -> dict[str, Any]:
    run = json.loads((output / "run.json").read_text())
    stages = run["stages"]
    train = stages["train"]["summary"]
    export = json.loads((output / "merged" / "export.json").read_text())
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    sums = [line.split("  ", 1) for line in (output / "SHA256SUMS").read_text().splitlines()]
    return {
        "losses": [_finite(entry["loss"]) for entry in map(json.loads, lines) if "loss" in entry],
        "evaluated": {
            name: _finite(run["metrics"][name]["loss"]) for name in ("baseline", "final")
        },
        "exported": {path: digest for digest, path in sums if path.endswith(".safetensors")},
        "proof": {key: export[key] for key in ("tensors", "verified", "merged_reloaded")},
        "computed": train["ways"]["ran"],
        "compiled": train["computing"]["torch_compile"] is True,
        "tokens_per_second": train["tokens_per_second"],
        "seconds": round(seconds, 1),
    }


def _logits(spec: JobSpec, accelerator: Accelerator) -> list[list[float | None]]:
    """Logits of the tiny model in fp32 for the last tokens of fixed rows; None if not finite."""
    import torch

    from job import engines, families
    from job.families import model_source
    from job.families.batches import model_inputs, to_device

    uri = spec.model.model_name_or_path
    checkpoint = families.read_checkpoint(uri, model_source.MODELS / uri.partition("://")[2])
    family = families.bind(checkpoint, spec.model, spec.data)
    model_spec = replace(spec.model, experts_implementation="eager")
    engine = engines.create(model_spec, spec.lora, accelerator)
    model = engine.load(family)
    batch = family.collate([family.encode(row) for row in _rows()])
    inputs = dict(to_device(model_inputs(batch), accelerator.device))
    ends = inputs["attention_mask"].sum(1).tolist()
    inputs.pop("labels", None)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    parts = [
        row[end - SHOWN_TOKENS : end, :SHOWN_LOGITS] for row, end in zip(logits, ends, strict=True)
    ]
    return [[_finite(round(float(value), 6)) for value in part.flatten()] for part in parts]


def _finite(value: float | None) -> float | None:
    """The value as JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def _rows() -> "Sequence[Row]":
    """Two rows with images of plain stripes."""
    import numpy as np
    from PIL import Image

    from job.prep.images import inspect
    from job.prep.rows import Message, Part, Row

    rows = []
    for number, answer in enumerate(("x ^ { 2 }", "a + b = c")):
        stripes = (np.arange(224) // (4 + number) % 2 * 255).astype(np.uint8)
        pixels = np.broadcast_to(stripes[None, :, None], (56, 224, 3))
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
        question = (Part(image=0), Part(text="Write the LaTeX representation for this image."))
        rows.append(
            Row(
                id=f"parity:{number}",
                messages=(
                    Message(role="user", parts=question),
                    Message(role="assistant", parts=(Part(text=answer),)),
                ),
                images=(inspect(file.getvalue()),),
            )
        )
    return rows


def _gpu_tests(tests: Path | None, accelerator: Accelerator) -> dict[str, Any]:
    """How the tests for GPUs ended, or why they did not run."""
    reason = None
    if accelerator.kind == "cpu":
        reason = "there is no GPU"
    elif tests is None or not tests.is_dir():
        reason = "the tests are not here"
    elif find_spec("pytest") is None:
        reason = "pytest is not installed"
    if reason is not None:
        log.info("tests for GPUs do not run", reason=reason)
        return {"not_run": reason}
    log.info("run the tests for GPUs", folder=tests)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        try:
            subprocess.run(  # noqa: S603
                [*command, str(tests)],
                cwd=ROOT,
                stdout=sys.stderr,
                timeout=TESTS_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            late = f"pytest was not done after {log.duration(TESTS_SECONDS)}"
            return {"passed": 0, "failed": [late], "skipped": 0}
        if not report.is_file():
            return {"not_run": "pytest wrote no report"}
        return counts(report)


def counts(report: Path) -> dict[str, Any]:
    """The tests that passed, failed and were skipped, by pytest's own report."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314 - of our pytest
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
        "skipped": len(skipped),
    }


def _ran(record: Mapping[str, Any]) -> list[str]:
    """What this record shows to have run, by the names that docs/support.yaml has for it."""
    computed = record["runs"].get("bfloat16", record["runs"]["float32"])
    taken = [outcome["way"] for outcome in record["ways"] if outcome["taken"]]
    ran = {
        "train": bool(computed["losses"]),
        "eval": "final" in computed["evaluated"],
        "export": computed["proof"]["verified"] == "reload",
        ways.ATTENTION: computed["computed"]["attention"] == "by boundaries",
        ways.CAPTURED: computed["computed"]["passes"] == "captured",
        ways.COMPILED: ways.COMPILED in taken,
        ways.EIGHT_BIT: "8bit" in computed["computed"]["optimizer"],
        ways.FOUR_BIT: ways.FOUR_BIT in taken,
        f"{ways.GROUPED}: triton": any(w.endswith(", triton") for w in taken),
    }
    return [name for name, holds in ran.items() if holds]


def _versions(accelerator: Accelerator) -> dict[str, str]:
    """What decides the bytes of an export: packages and, on a CPU, which one it is."""
    packages = sbom.packages()
    found = {name: packages[name].version for name in PACKAGES if name in packages}
    cpu = {"cpu": _cpu()} if accelerator.kind == "cpu" else {}
    return {"python": platform.python_version(), **found, **cpu}


def _cpu() -> str:
    """Family, model and stepping: two CPUs of one name may round differently."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        values = {key.strip(): value.strip() for key, value in pairs.items()}
        return "-".join(values.get(key, "") for key in ("cpu family", "model", "stepping"))
    return platform.machine()
