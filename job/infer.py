"""`job infer`: one question, one answer, from what a run left at its output."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from job import storage
from job.errors import DataError, InputError, MissingInputError, UsageError
from job.manifest import StageRecord
from job.outputs import STAGES
from job.prep.images import ImageRefused, inspect
from job.prep.records import Message, Part, Row
from job.spec.load import LoadedSpec
from job.stages import Stages

Weights = Literal["base", "adapter", "merged"]


class Stream:
    """What `generate` calls with each token, as a streamer of Transformers.

    Theirs holds text back up to the next space, which a formula may not have at all.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode, self._write = decode, write
        self._tokens: list[int] | None = None  # none before the prompt, which comes first
        self._written = ""

    def put(self, tokens: Any) -> None:
        """Takes the prompt, of shape (1, T), then each new token, of shape (1,)."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.tolist()
        self._show(self._text().removesuffix("\ufffd"))  # half a character may become a whole one

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self._decode(self._tokens or []).strip()

    def _show(self, text: str) -> None:
        self._write(text[len(self._written) :])
        self._written = text


def infer(
    loaded: LoadedSpec,
    image: Path | None,
    question: str | None,
    weights: str,
    *,
    seed: int | None,
    write: Callable[[str], object],
) -> None:
    """Answers the question, or the spec's instruction, about the image if any.

    `write` is given the answer piece by piece as it is made; `seed` decides what is sampled. Raises
    InputError where the image or the weights are missing, DataError for an image that cannot be
    read, and UsageError where nothing is asked.
    """
    if weights not in ("base", "adapter", "merged"):
        raise UsageError("--weights", "must be base, adapter or merged", value=weights)
    if image is None and question is None:
        raise UsageError(
            "--image", "nothing is asked", fix="name an image, or write --question for text alone"
        )
    row = _row(image, question or loaded.spec.data.instruction)
    stages = Stages(loaded, "infer")
    model, family = _model(stages, weights)
    from transformers import set_seed

    from job.evaluation.generate import generate

    if seed is not None:
        set_seed(seed)
    generation = loaded.spec.eval.generation
    if generation.max_new_tokens == "auto":
        generation = replace(generation, max_new_tokens=_longest(stages))
    prompt = family.encode_prompt(
        row.id, row.messages, row.images, enable_thinking=generation.enable_thinking
    )

    def decode(tokens: list[int]) -> str:
        return str(family.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    generate(model, family, [prompt], generation, Stream(decode, write))


def _longest(stages: Stages) -> int:
    """What `max_new_tokens: auto` came to when the run was evaluated, if it was."""
    from job.evaluation.lengths import UNKNOWN

    marker = stages.output.at(STAGES, "eval.json")
    with suppress(MissingInputError):
        record = StageRecord.from_json(json.loads(storage.read_bytes(marker)))
        return int(record.summary.get("max_new_tokens", UNKNOWN))
    return UNKNOWN


def _row(path: Path | None, question: str) -> Row:
    if path is None:
        asked = Message(role="user", parts=(Part(text=question),))
        return Row(id="--question", messages=(asked,), images=())
    try:
        image = inspect(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            "--image", "there is no such file", value=path, fix="name a picture on this machine"
        ) from error
    except (ImageRefused, OSError) as error:
        raise DataError("--image", str(error), value=path, fix="use a PNG or JPEG") from error
    asked = Message(role="user", parts=(Part(image=0), Part(text=question)))
    return Row(id=str(path), messages=(asked,), images=(image,))


def _model(stages: Stages, weights: str) -> tuple[Any, Any]:
    if weights == "base":
        return stages.models.base(), stages.family
    stage = "train" if weights == "adapter" else "export"
    marker = stages.output.at(STAGES, f"{stage}.json")
    try:
        record = StageRecord.from_json(json.loads(storage.read_bytes(marker)))
    except MissingInputError as error:
        raise InputError(
            stages.output.uri,
            f"holds no finished {stage} stage",
            fix=f"python -m job {stage} SPEC first, or --weights base",
        ) from error
    if weights == "adapter" and stages.spec.lora.method == "lora":
        return (
            stages.engine.load_adapter(
                stages.models.base(), stages.output.fetch(record) / "adapter"
            ),
            stages.family,
        )
    folder = "merged" if weights == "merged" else "weights"
    if not any(file.path.startswith(f"{folder}/") for file in record.files):
        raise InputError(stages.output.uri, f"holds no {folder}/", fix="--weights adapter")
    family = stages.bind(stages.output.fetch(record) / folder)
    return stages.engine.load(family), family
