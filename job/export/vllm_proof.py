"""Verifies by serving: vLLM's answers to the probes have to equal the trained model's."""

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job import log
from job.errors import ProofError
from job.export.chat_client import ChatError, ChatMessage, ContentPart, image_part, text_part
from job.export.export_context import ExportContext
from job.export.proof import PROBE_TOKENS, TOLERANCE, Comparison, ProbeOutputs
from job.export.vllm_server import BASE, VllmServer, serve
from job.families.base import Family
from job.prep.images import decode
from job.prep.rows import EncodedImage, Message, Part, Row


@dataclass(frozen=True, kw_only=True)
class Served:
    """The comparison of vLLM's answers with the trained model's."""

    probes: int
    same_answers: int
    tokens: int
    """Number of equal greedy tokens, up to where answers diverge."""
    largest_logprob_difference: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """vLLM's prompt and answer, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The log-probability of each token of the answer."""


def prove_merged(context: ExportContext, expected: ProbeOutputs, reloaded: Comparison) -> Served:
    """Serves the merged weights and compares vLLM's answers with the trained model's."""
    # vLLM computes in the stored dtype; the reloaded model may have used fp32.
    spread = float(expected.logits.std())
    rounding = max(4 * reloaded.largest, TOLERANCE[context.dtype_name] * spread)
    log_file = context.target.with_name("vllm.log")
    with serve(
        context.target, context.family, dtype=context.dtype_name, log_file=log_file
    ) as server:
        served = prove(server, context.family, context.probes, expected, rounding)
    log_file.unlink()
    log.info(
        "served by vLLM",
        probes=served.probes,
        same_answers=served.same_answers,
        tokens=served.tokens,
        logprobs_within=f"{served.largest_logprob_difference:.2g}",
    )
    return served


def prove(
    server: VllmServer,
    family: Family,
    rows: Sequence[Row],
    expected: ProbeOutputs,
    rounding: float,
    model: str = BASE,
) -> Served:
    """Compares vLLM's prompts and greedy answers with the trained model's, token by token.

    Log-probabilities may differ by `rounding`, up to and including the token at which answers
    diverge. Answers may diverge only at a token where the trained model's margin (in logits) is at
    most `rounding`. Raises ProofError otherwise, or if vLLM's prompt differs from the trained one.
    """
    started, same, tokens, largest = time.monotonic(), 0, 0, 0.0
    for row, wanted, margins, logprobs in zip(
        rows, expected.answers, expected.margins, expected.logprobs, strict=True
    ):
        reply = _ask(server, family, row, model)
        _require_same_prompt(reply, family, row, model)
        answer = _until_end(wanted, family.end_tokens)
        divergence = _divergence(reply.answer, answer)
        tokens += divergence
        # Includes the diverging token: both chose their likeliest, with about equal probability.
        compared = zip(reply.logprobs[: divergence + 1], logprobs, strict=False)
        largest = max([largest, *(abs(one - other) for one, other in compared)])
        if not largest <= rounding:
            raise ProofError(
                f"served {model}: {row.id}",
                f"vLLM's log-probabilities differ from the trained model's by {largest:.2g}; "
                f"rounding explains {rounding:.2g}",
                fix="do not serve it; report this with the run's run.json and its log",
            )
        if divergence == max(len(answer), len(reply.answer)):
            same += 1
        elif divergence >= len(margins) or margins[divergence] > rounding:
            raise ProofError(
                f"served {model}: {row.id}",
                f"vLLM's greedy answer diverges from the trained model's at token {divergence}, "
                "which was not a close choice",
                fix="do not serve it; report this with the run's run.json and its log",
            )
    return Served(
        probes=len(rows),
        same_answers=same,
        tokens=tokens,
        largest_logprob_difference=largest,
        seconds=round(time.monotonic() - started, 3),
    )


def chat_message(
    message: Message, images: Sequence[EncodedImage], empty_thoughts: str = ""
) -> ChatMessage:
    """A row's message in OpenAI's format, an answer with the thoughts that training gives it."""
    thoughts = message.reasoning
    if message.role == "assistant" and thoughts is None:
        thoughts = empty_thoughts
    # vLLM renamed the key, and its versions each drop the name that they do not know.
    named = {"reasoning": thoughts, "reasoning_content": thoughts} if thoughts else {}
    return {
        "role": message.role,
        "content": [_part(part, images) for part in message.parts],
        **named,
    }


def _part(part: Part, images: Sequence[EncodedImage]) -> ContentPart:
    if part.image is None:
        return text_part(part.text or "")
    # Decoded as in training: vLLM would decode some files, such as 16-bit ones, differently.
    file = io.BytesIO()
    decode(images[part.image]).save(file, "PNG")
    return image_part(file.getvalue())


def _ask(server: VllmServer, family: Family, row: Row, model: str) -> Reply:
    """The greedy answer to a row's prompt. Raises ProofError if vLLM refuses or dies."""
    try:
        reply = server.client.complete(
            model,
            [
                chat_message(message, row.images, family.served_empty_thoughts)
                for message in row.prompt
            ],
            max_tokens=PROBE_TOKENS,
            enable_thinking=row.thinks,
            logprobs=True,
            return_token_ids=True,
        )
        choice = reply["choices"][0]
        return Reply(
            prompt=tuple(reply["prompt_token_ids"]),
            answer=tuple(choice["token_ids"]),
            logprobs=tuple(float(token["logprob"]) for token in choice["logprobs"]["content"]),
        )
    except ChatError as error:
        raise server.error(f"{row.id}: vLLM {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise server.error(f"{row.id}: vLLM's reply lacks token ids: {error}") from error


def _require_same_prompt(reply: Reply, family: Family, row: Row, model: str) -> None:
    prompt = family.encode_prompt(
        row.id, row.prompt, row.images, enable_thinking=row.thinks
    ).input_ids
    if reply.prompt != tuple(prompt):
        raise ProofError(
            f"served {model}: {row.id}",
            f"vLLM's prompt of {len(reply.prompt)} tokens is not the trained one of {len(prompt)}; "
            f"they diverge at token {_divergence(reply.prompt, prompt)}",
            fix="export again; the directory's processor or chat template is not the run's",
        )


def _divergence(one: Sequence[int], other: Sequence[int]) -> int:
    """The first index at which the sequences differ, or the shorter one's length."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _until_end(answer: Sequence[int], end_tokens: Sequence[int]) -> tuple[int, ...]:
    """The answer up to and including its first end token; the rest is padding."""
    last = next((i for i, token in enumerate(answer) if token in end_tokens), len(answer))
    return tuple(answer[: last + 1])
