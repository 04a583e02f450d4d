"""The command `parity`. The docstring is the command's help."""

import json
from pathlib import Path
from typing import Annotated

import typer

from job import log
from job.errors import ProofError
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

    Writes losses by step, logits, digests of the export, the ways to compute with their speed,
    and versions. Exits with 30 if anything differs by more than rounding explains, with a line
    for each difference.
    """
    from job import storage
    from job.parity import compare, measure

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
