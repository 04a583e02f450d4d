"""The inputs of the whole job's benchmark: a base checkpoint, and parquet files of formulas.

    python -m benchmarks.reference_inputs FOLDER --model 28b

Run as a process of its own, which leaves no memory of the device in use.
"""

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.noise_formulas import noise_formulas

TRAIN_ROWS, EVAL_ROWS = 998, 100
"""As the im2latex sample has."""


def write_data(folder: Path, formulas: Path | None, rows: int, held_out: int) -> dict[str, Path]:
    """Writes `train.parquet` and `eval.parquet` with the columns `image` and `text`.

    `formulas` is a folder with `train.jsonl` and `validation.jsonl`, whose lines name an image and
    its LaTeX; without it, rows are noise with the sizes of real formulas.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"train": (rows, "train.jsonl"), "eval": (held_out, "validation.jsonl")}
    noise = noise_formulas(rows + held_out, "abcxyz+-=()")
    files = {}
    for split, (count, lines) in wanted.items():
        source = noise if formulas is None else _read(formulas, lines)
        files[split] = folder / f"{split}.parquet"
        _write_parquet(files[split], itertools.islice(source, count))
    return files


def _read(folder: Path, name: str) -> Iterator[tuple[bytes, str]]:
    with (folder / name).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield (folder / row["image"]).read_bytes(), row["text"]


def _write_parquet(path: Path, rows: Iterable[tuple[bytes, str]]) -> None:
    """The columns are those of the hub's image datasets: an image is its bytes and a path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(rows)
    images = [{"bytes": image, "path": None} for image, _ in columns]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(images, kind), "text": pa.array([text for _, text in columns])}
    )
    pq.write_table(table, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder for the checkpoint")
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    arguments = parser.parse_args()

    from benchmarks.full_size import write_base
    from benchmarks.training import SPEC
    from job.engines.device import detect
    from job.spec.load import load_spec

    runtime = load_spec(SPEC.read_text(), str(SPEC), environ={}).spec.runtime
    # Renamed once it is complete, so that a base whose writing was ended is not taken for one.
    part = arguments.base.with_name(arguments.base.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_base(arguments.model, arguments.layers, detect(runtime).device, part)
    part.replace(arguments.base)


if __name__ == "__main__":
    main()
