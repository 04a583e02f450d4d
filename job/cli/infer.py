"""`job infer`: answers one question with the base, adapter or merged weights of a run."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts import reader
from job.artifacts.records import PREDICTIONS, STAGES, read_stage
from job.errors import DataError, InputError, MissingInputError, Problem, UsageError
from job.families import adapter_source
from job.families.base import Family
from job.pipeline.context import RunContext
from job.prep.images import ImageRefused, inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.prep.shards import Rows, order_file
from job.prep.turn_parts import IMAGE_PLACEHOLDER
from job.spec.foreign_names import nearest
from job.spec.load import LoadedSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Query:
    """The input of `job infer`: images and a question, or a held-out row."""

    images: tuple[Path, ...] = ()
    """In the order in which the model sees them."""
    question: str | None = None
    """Overrides the spec's instruction."""
    system: str | None = None
    row: str | None = None
    """The id of a held-out row, instead of all of the above."""


class AnswerStreamer:
    """Writes each token as it is generated, with the interface of Transformers' streamers.

    Those of Transformers hold text back until the next space, and a formula may have none.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode, self._write = decode, write
        self._tokens: list[int] | None = None  # None until the prompt, which comes first
        self._written = ""

    def put(self, tokens: "torch.Tensor") -> None:
        """Takes the prompt, of shape (1, T), then each new token, of shape (1,)."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.tolist()
        self._show(self._text().removesuffix("\ufffd"))  # an incomplete character

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self._decode(self._tokens or []).strip()

    def _show(self, text: str) -> None:
        self._write(text[len(self._written) :])
        self._written = text


def infer(
    loaded: LoadedSpec,
    query: Query,
    weights: str,
    adapter: str | None = None,
    *,
    seed: int | None,
    write: Callable[[str], object],
) -> None:
    """Answers the query; the label follows the answer to a held-out row.

    `adapter` is the URI of any adapter, to answer with instead of the output's weights. `write`
    gets the answer piece by piece as it is generated. Raises InputError if images, the row
    or the weights are missing, DataError if an image cannot be read, and UsageError if there is
    nothing to ask.
    """
    if weights not in ("base", "adapter", "merged"):
        raise UsageError("--weights", "must be base, adapter or merged", value=weights)
    if adapter is not None and weights != "adapter":
        raise UsageError(
            "--adapter",
            f"cannot be combined with --weights {weights}",
            value=adapter,
            fix="leave out one of the two",
        )
    stages = RunContext(loaded, "infer")
    if query.row is None:
        system = loaded.spec.data.system if query.system is None else query.system
        row = query_row(replace(query, system=system), loaded.spec.data.question)
        prompt, label = row.messages, None
    else:
        row = held_out_row(stages, query)
        prompt, label = row.prompt, row.answer
    model, family = _load_model(stages, weights, adapter)
    from transformers import set_seed

    from job.evaluation.generate import stream_answer

    if seed is not None:
        set_seed(seed)
    generation = loaded.spec.eval.generation
    if generation.max_new_tokens == "auto":
        generation = replace(generation, max_new_tokens=_max_new_tokens(stages))
    encoded = family.encode_prompt(
        row.id, prompt, row.images, enable_thinking=generation.enable_thinking
    )

    def decode(tokens: list[int]) -> str:
        return str(family.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    write("answer: " if label is not None else "")
    stream_answer(model, family, encoded, generation, AnswerStreamer(decode, write))
    write(f"\nlabel:  {label}" if label is not None else "")


def query_row(query: Query, instruction: str | None) -> Row:
    """The query as a row to answer, its images first or where `<image>` marks them.

    Raises InputError for missing images, DataError for unreadable ones, and UsageError if there is
    no question.
    """
    if not query.images and query.question is None:
        raise UsageError(
            "--image",
            "nothing is asked",
            fix="give an --image, a --question, or a held-out --row",
        )
    question = instruction if query.question is None else query.question
    if not question:
        raise UsageError(
            "--question",
            "is required: the spec has no data.instruction",
            fix='ask something about the image: --question "…"',
        )
    images = _read(query.images)
    turns = [Message(role="user", parts=_parts(question, len(images)))]
    if query.system is not None:
        turns.insert(0, Message(role="system", parts=(Part(text=query.system),)))
    row_id = ", ".join(map(str, query.images)) or "--question"
    return Row(id=row_id, messages=tuple(turns), images=images)


def _parts(question: str, images: int) -> tuple[Part, ...]:
    texts = question.split(IMAGE_PLACEHOLDER)
    if images == 0 or len(texts) == 1:
        return (*(Part(image=number) for number in range(images)), Part(text=question))
    if len(texts) - 1 != images:
        raise UsageError(
            "--question",
            f"has {len(texts) - 1} {IMAGE_PLACEHOLDER} for {images} images",
            fix=f"write {IMAGE_PLACEHOLDER} once per --image, or not at all",
        )
    parts: list[Part] = []
    for number, text in enumerate(texts):
        parts += [Part(image=number - 1)] if number else []
        parts += [Part(text=text)] if text.strip() else []
    return tuple(parts)


def _read(paths: tuple[Path, ...]) -> tuple[EncodedImage, ...]:
    """The images. Reports all that are missing or unreadable at once."""
    images: list[EncodedImage] = []
    missing: list[Problem] = []
    refused: list[Problem] = []
    for path in paths:
        try:
            images.append(inspect(path.read_bytes()))
        except FileNotFoundError:
            fix = "give the path of an image on this machine"
            missing.append(Problem("--image", "no such file", str(path), fix))
        except (ImageRefused, OSError) as error:
            refused.append(Problem("--image", str(error), str(path), "use a PNG or JPEG"))
    if missing:
        raise InputError.from_problems([*missing, *refused])
    if refused:
        raise DataError.from_problems(refused)
    return tuple(images)


def held_out_row(stages: RunContext, query: Query) -> Row:
    """The held-out row with the query's id, from the output of prep.

    Raises UsageError if the query has more than the id, and InputError if there is no such row.
    """
    assert query.row is not None
    if query.images or query.question is not None or query.system is not None:
        raise UsageError(
            "--row",
            "has its own images, system prompt and question",
            value=query.row,
            fix="leave out --image, --question and --system, or --row",
        )
    order = order_file(Path("data"), "eval").name
    folder = reader.fetch(
        stages.output.uri,
        "prep",
        "data",
        stages.cache_dir,
        stages.cache_limit,
        only=re.compile(rf"data/({re.escape(order)}|eval-.*\.arrow)"),
    )
    files = sorted(folder.glob("eval-*.arrow"))
    rows = Rows(files, folder / order if (folder / order).exists() else None)
    ids = rows.ids()
    matches = _matches(query.row, ids)
    if len(matches) != 1:
        close = nearest(query.row, ids)
        raise InputError(
            "--row",
            f"{len(matches)} held-out rows have this id"
            if matches
            else "no held-out row has this id",
            value=query.row,
            fix=f"{f'try {close!r}; ' if close else ''}"
            f"{stages.output.at(PREDICTIONS)} lists the ids",
        )
    row: Row = rows[matches[0]]
    return row


def _matches(wanted: str, ids: Sequence[str]) -> list[int]:
    """The numbers of the rows with this id; either part of `list.jsonl:7 (name)` matches too."""
    if exact := [number for number, row_id in enumerate(ids) if row_id == wanted]:
        return exact
    parts = [row_id.partition(" (") for row_id in ids]
    return [
        number
        for number, (position, _, name) in enumerate(parts)
        if wanted in (position, name.removesuffix(")"))
    ]


def _max_new_tokens(stages: RunContext) -> int:
    """The value of `max_new_tokens: auto` in the run's evaluation, or the default."""
    from job.evaluation.answer_lengths import DEFAULT

    with suppress(MissingInputError):
        record = read_stage(stages.output.at(STAGES, "eval.json"))
        return int(record.summary.get("max_new_tokens", DEFAULT))
    return DEFAULT


def _load_model(
    stages: RunContext, weights: str, adapter: str | None
) -> "tuple[PreTrainedModel | PeftModel, Family]":
    if adapter is not None:
        found = adapter_source.find_adapter(adapter, "--adapter")
        stored = stages.read_adapter(found, "answering with the adapter")
        return stages.models.initial(stored), stages.family
    if weights == "base":
        return stages.models.base(), stages.family
    stage = stages.inputs.trained_by if weights == "adapter" else "export"
    adapted = weights == "adapter" and stages.spec.lora.method == "lora"
    folder = (
        f"{stages.trained_folder}adapter"
        if adapted
        else "merged"
        if weights == "merged"
        else "weights"
    )
    path = reader.fetch(stages.output.uri, stage, folder, stages.cache_dir, stages.cache_limit)
    if adapted:
        return stages.engine.load_adapter(stages.models.base(), path), stages.family
    family = stages.bind(path)
    return stages.engine.load(family), family
