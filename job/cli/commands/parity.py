"""The command `parity`. The docstring is the command's help."""

import json
from pathlib import Path
from typing import Annotated

import typer

from job import log
from job.errors import ProofError, UsageError
from job.spec import keys

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("cpu", "cuda", "rocm")


def parity(
    to: Annotated[
        str,
        typer.Option(help="Where to write the record: a file, a URI, or - for a line of output."),
    ] = ("parity.json"),
    against: Annotated[
        Path, typer.Option(help="The folder of the committed records to compare with.")
    ] = RESULTS,
    tests: Annotated[
        Path | None, typer.Option(help="The folder of the tests for GPUs, to run them too.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="The cache folder (default: runtime.cache_dir's).")
    ] = None,
) -> None:
    """Run the tiny job on this device and compare it with committed results.

    Needs a checkout or an image, which have the job and the results to compare with.

    Writes losses by step, logits, digests of the export, the ways to compute with their speed,
    and versions. Exits with 30 if anything differs by more than rounding explains, with a line
    for each difference.
    """
    from job import storage
    from job.parity import compare, measure

    _require(measure.SPEC, against, tests)
    if to != "-":
        storage.check_access(storage.parent(to), "write")
    cache = (cache_dir or Path(str(keys.default("runtime.cache_dir")))).expanduser()
    record = measure.measure(cache.absolute(), tests)
    if to == "-":
        print(json.dumps(record), flush=True)
    else:
        storage.write_text(to, json.dumps(record, indent=2) + "\n")
    log.info("written", record=to, took=log.seconds(record["seconds"]))
    different = list(compare.faults(record))
    for kind in KINDS:
        path = against / f"parity-{kind}.json"
        if not path.is_file():
            log.info("not compared", kind=kind, reason=f"{path} does not exist")
            continue
        committed = json.loads(path.read_text(encoding="utf-8"))
        found = list(compare.differences(record, committed))
        different += found
        log.info("compared", kind=kind, device=committed["device"], differences=len(found))
        if not compare.same_bytes(record, committed):
            reason = "a GPU, another device or other versions"
            log.info("exported bytes are not compared", reason=reason)
    for line in different:
        log.error(line)
    if different:
        raise typer.Exit(ProofError.exit_code)


def _require(spec: Path, against: Path, tests: Path | None) -> None:
    """Raises UsageError before minutes of work if there is nothing to run or to compare with."""
    if not spec.is_file():
        raise UsageError(
            "parity",
            f"needs {spec.parent.name}/{spec.name}, which an installed package does not have",
            fix="run it in a checkout of the repository (make parity), or in an image "
            "(docker run IMAGE parity --to -)",
        )
    if not any((against / f"parity-{kind}.json").is_file() for kind in KINDS):
        raise UsageError(
            "--against",
            "has no record to compare with: parity-cpu.json, parity-cuda.json or parity-rocm.json",
            value=against,
            fix="name a folder that has one, such as benchmarks/results of a checkout",
        )
    if tests is not None and not tests.is_dir():
        raise UsageError(
            "--tests", "is not a folder", value=tests, fix="name tests/gpu of a checkout"
        )
