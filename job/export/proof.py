"""Compares two models on the probes: logits of the label tokens, and greedy answers.

Tolerances follow from the arithmetic: weights stored with an 11-bit (fp16) or 8-bit (bf16)
significand cannot reproduce logits exactly, but may change a greedy token only if the trained
model's choice was close.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from job.errors import ProofError
from job.families.base import Family
from job.families.batches import to_device
from job.families.encoded import IGNORED, Encoded
from job.prep.rows import Row

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBES = 4
PROBE_TOKENS = 24

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative RMS difference of logits that rounding the weights to the dtype may cause."""


@dataclass(frozen=True, kw_only=True)
class ProbeOutputs:
    """A model's outputs on the probes."""

    logits: "torch.Tensor"
    """(N, V): the logits of every label token, in fp32 on the CPU."""
    answers: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    """By answer and token: the largest logit minus the second largest."""
    logprobs: tuple[tuple[float, ...], ...]
    """By answer and token: the log-probability."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences of a model's outputs from a reference."""

    relative_rms: float
    largest: float
    same_top1: float
    same_answers: int
    decided_differently: int
    """Answers that diverge at a token where the reference's margin exceeds rounding."""
    probes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def probe_outputs(
    model: "PeftModel | PreTrainedModel", family: Family, rows: Sequence[Row]
) -> ProbeOutputs:
    """The model's outputs on the probes."""
    import torch

    logits = label_logits(model, family, rows)
    prompts = [
        family.encode_prompt(row.id, row.prompt, row.images, enable_thinking=row.thinks)
        for row in rows
    ]
    with torch.inference_mode():
        greedy = _by_decoder if family.has_decoder(model) else _by_transformers
        answers, steps = greedy(model, family, prompts)  # (B, steps), (B, steps, V)
    top = steps.topk(2).values  # (B, steps, 2)
    margins = top[..., 0] - top[..., 1]  # (B, steps)
    logprobs = top[..., 0] - steps.logsumexp(-1)  # (B, steps): greedy takes the largest
    return ProbeOutputs(
        logits=logits,
        answers=tuple(tuple(row) for row in answers.tolist()),
        margins=tuple(tuple(row) for row in margins.tolist()),
        logprobs=tuple(tuple(row) for row in logprobs.tolist()),
    )


def label_logits(
    model: "PeftModel | PreTrainedModel", family: Family, rows: Sequence[Row]
) -> "torch.Tensor":
    """The logits (N, V) of every label token, in fp32 on the CPU, from one forward pass."""
    import torch

    model.eval()
    encoded = [family.encode(row) for row in rows]
    batch = to_device(family.collate(encoded), model.device)
    labels = batch.pop("labels")[:, 1:]  # (B, T-1)
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    return logits[labels != IGNORED].float().cpu()


def without_answers(logits: "torch.Tensor") -> ProbeOutputs:
    """Outputs of a model that has not generated."""
    return ProbeOutputs(logits=logits, answers=(), margins=(), logprobs=())


def _by_transformers(
    model: "PeftModel | PreTrainedModel", family: Family, prompts: Sequence[Encoded]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Greedy tokens (B, steps), padded after an end token, and their fp32 logits (B, steps, V)."""
    import torch

    batch = to_device(family.collate_prompts(prompts), model.device)
    generated = model.generate(
        **batch,
        max_new_tokens=PROBE_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=family.processor.tokenizer.pad_token_id,
        eos_token_id=list(family.end_tokens),
    )
    start = batch["input_ids"].shape[1]
    return generated.sequences[:, start:], torch.stack(generated.logits, dim=1).float()


def _by_decoder(
    model: "PeftModel | PreTrainedModel", family: Family, prompts: Sequence[Encoded]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The same by the family's decoder, which has the logits of the tokens after an end too."""
    import torch

    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder = family.decoder(model, slots=len(prompts), capacity=longest + PROBE_TOKENS)
    logits = [decoder.prefill(prompts).float()]
    tokens = [decoder.tokens.clone()]
    for _ in range(PROBE_TOKENS - 1):
        # A copy: the decoder overwrites its logits, which fp32 would keep.
        logits.append(decoder.step().to(torch.float32, copy=True))
        tokens.append(decoder.tokens.clone())
    answers = torch.stack(tokens, dim=1)  # (B, steps)
    ends = torch.isin(answers, answers.new_tensor(family.end_tokens)).long()
    pad = int(family.processor.tokenizer.pad_token_id)
    return answers.masked_fill(ends.cumsum(1) > ends, pad), torch.stack(logits, dim=1)


def compare(reference: ProbeOutputs, other: ProbeOutputs) -> Comparison:
    """Compares `other` with `reference`, both on the same probes."""
    difference = other.logits - reference.logits  # (N, V)
    scale = float(reference.logits.std()) or 1.0
    largest = float(difference.abs().max())
    same, decided = 0, 0
    for expected, answer, margins in zip(
        reference.answers, other.answers, reference.margins, strict=True
    ):
        steps = min(len(expected), len(answer))
        divergence = next((i for i in range(steps) if expected[i] != answer[i]), None)
        if divergence is None:
            same += 1
        elif margins[divergence] > 2 * largest:
            decided += 1
    return Comparison(
        relative_rms=float(difference.pow(2).mean().sqrt()) / scale,
        largest=largest,
        same_top1=float((other.logits.argmax(-1) == reference.logits.argmax(-1)).float().mean()),
        same_answers=same,
        decided_differently=decided,
        probes=len(reference.answers),
    )


def require_equal(what: str, comparison: Comparison, *dtypes: str) -> None:
    """Raises ProofError if they differ by more than rounding to the coarsest dtype explains."""
    dtype = max(dtypes, key=TOLERANCE.__getitem__)
    limit = TOLERANCE[dtype]
    fix = "do not serve it; export again, and report this with the run's run.json and its log"
    if not comparison.relative_rms <= limit:
        raise ProofError(
            what,
            f"its logits differ from the trained model's by {comparison.relative_rms:.2g} of their "
            f"standard deviation; rounding to {dtype} explains {limit:g}",
            fix=fix,
        )
    if comparison.decided_differently:
        raise ProofError(
            what,
            f"{comparison.decided_differently} of {comparison.probes} greedy answers differ from "
            "the trained model's at a token that was not a close choice",
            fix=fix,
        )
