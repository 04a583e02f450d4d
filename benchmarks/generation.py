"""Measures greedy generation: Transformers' `generate`, and the product's decoder.

    python -m benchmarks.generation                                 the tiny model, on this CPU
    python -m benchmarks.generation --model 28b                     the published one, on a GPU

The published model has random weights. Prompts have the sizes of real formulas, and a "way" is one
implementation of generation; all ways answer the same prompts, without an adapter and with one.
Answers of random weights have no end, so that every row gets `--tokens` tokens; slow ways get
`--few` of them. Their answers are compared with those of the first way, and each difference with
the margin by which the token was chosen.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch

from benchmarks import record
from benchmarks.training import _spec as training_spec
from benchmarks.training import formula_rows, random_model, tiny_family
from job import engines
from job.distributed.cores import cores
from job.engines.device import detect, release_memory
from job.evaluation.decoding import READ_EVERY_ON_GPU, decode_prompts
from job.families.batches import to_device
from job.families.encoded import Encoded
from job.families.ernie45_vl import Ernie45VL
from job.families.ernie45_vl.packed.decoder import PackedDecoder
from job.families.ernie45_vl.packed.model import packed_base
from job.planning.sizes import GIB

DYNAMIC, STATIC = "transformers", "transformers, static cache"
EAGER, CAPTURED = "decoder", "decoder, captured"
WAYS = (DYNAMIC, STATIC, EAGER, CAPTURED)

Answers = list[list[int]]


def main() -> None:
    arguments = _arguments()
    cuda = torch.cuda.is_available()
    spec = training_spec(argparse.Namespace(rows=1, steps=1, experts=arguments.experts))
    accelerator = detect(spec.runtime)
    family = tiny_family(spec)
    rows = list(formula_rows(arguments.rows))
    prompts = [family.encode_prompt(r.id, r.prompt, r.images) for r in rows]
    if arguments.model == "tiny":
        engine = engines.create(spec.model, spec.lora, accelerator)
        model: Any = engine.load(family)
    else:
        model = random_model("28b", arguments.layers, family, accelerator.device)
        engine = engines.create(spec.model, spec.lora, accelerator)
        engine.prepare(model, family)
    model.eval()
    layers = model.config.text_config.num_hidden_layers
    measured: dict[str, dict[str, Any]] = {}
    for kind in ("base", "adapter"):
        if kind == "adapter":
            targets = family.lora_targets(model, spec.lora)
            model = engine.attach_adapter(model, targets, spec.lora, seed=0).eval()
            _randomize_adapter(model)
        measured[kind] = _measure(model, family, prompts, arguments)
        for way, found in measured[kind].items():
            print(kind, way, json.dumps(found), flush=True)
    result = {
        **({} if cuda else {"cores": cores()}),
        "rows": arguments.rows,
        "layers": layers,
        "prompt_tokens": sum(len(prompt.input_ids) for prompt in prompts),
        "routed_experts_adapted": arguments.experts,
        **measured,
    }
    name = f"generation-{arguments.model}-{accelerator.device.type}"
    record.write(
        f"{name}{'-experts' if arguments.experts else ''}",
        "benchmarks.generation",
        accelerator.name,
        result,
        ("torch", "transformers", "peft"),
        arguments.results,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "28b"), default="tiny")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the model's")
    parser.add_argument("--rows", type=int, default=100, help="prompts, all answered at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--few", type=int, help="tokens of an answer in slow ways")
    here = WAYS if torch.cuda.is_available() else WAYS[:3]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=here)
    parser.add_argument("--experts", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--results", type=record.Path, default=record.RESULTS)
    arguments = parser.parse_args()
    arguments.few = arguments.few or (12 if arguments.model == "28b" else arguments.tokens)
    return arguments


def _randomize_adapter(model: Any) -> None:
    """A new adapter changes nothing: its second matrices are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.005)


def _measure(
    model: Any, family: Ernie45VL, prompts: Sequence[Encoded], arguments: argparse.Namespace
) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    reference: Answers = []
    for way in arguments.ways:
        tokens = arguments.tokens if way == CAPTURED else arguments.few
        answer = _way(way, model, family, prompts)
        try:
            _warm_up(answer, tokens)
            started, cpu_started = _now(), time.process_time()
            answers = answer(tokens)
            seconds, cpu_seconds = _now() - started, time.process_time() - cpu_started
            started = _now()
            answer(1)
            prefill = _now() - started
        except (RuntimeError, ValueError, NotImplementedError) as error:
            measured[way] = {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
            release_memory()
            continue
        longest = max(map(len, answers))
        step = (seconds - prefill) / max(longest - 1, 1)
        measured[way] = {
            "tokens_a_row": longest,
            "seconds": round(seconds, 3),
            "prefill_seconds": round(prefill, 3),
            "ms_a_token": round(1e3 * step, 2),
            "rows_per_second": round(len(prompts) / seconds, 2),
            "rows_per_second_at_all_tokens": round(
                len(prompts) / (prefill + step * (arguments.tokens - 1)), 2
            ),
        }
        # A CPU may be shared; the time that it spends on this process says more.
        if not torch.cuda.is_available():
            measured[way]["cpu_seconds"] = round(cpu_seconds, 2)
        else:
            measured[way]["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        if not reference:
            reference = answers
        elif way == arguments.ways[-1]:
            measured[way]["compared_with_the_first"] = _comparison(
                model, family, prompts, reference, answers
            )
        release_memory()
    return measured


def _warm_up(answer: Callable[[int], Answers], tokens: int) -> None:
    answer(min(3, tokens))
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _way(
    way: str, model: Any, family: Ernie45VL, prompts: Sequence[Encoded]
) -> Callable[[int], Answers]:
    """Answers all prompts with so many tokens each."""
    if way in (DYNAMIC, STATIC):
        cache = {"cache_implementation": "static"} if way == STATIC else {}
        return lambda tokens: _by_transformers(model, family, prompts, tokens, **cache)
    return lambda tokens: _by_decoder(model, family, prompts, tokens, captured=way == CAPTURED)


def _by_transformers(
    model: Any, family: Ernie45VL, prompts: Sequence[Encoded], tokens: int, **more: Any
) -> Answers:
    batch = to_device(family.collate_prompts(prompts), model.device)
    with torch.inference_mode():
        output = model.generate(
            **batch,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=family.processor.tokenizer.pad_token_id,
            eos_token_id=list(family.end_tokens),
            disable_compile=True,
            **more,
        )
    start = batch["input_ids"].shape[1]
    ends = {*family.end_tokens}
    return [[*takewhile(lambda t: t not in ends, row)] for row in output[:, start:].tolist()]


def _by_decoder(
    model: Any, family: Ernie45VL, prompts: Sequence[Encoded], tokens: int, *, captured: bool
) -> Answers:
    read_every = READ_EVERY_ON_GPU if torch.cuda.is_available() else 1
    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder = _decoder(model, family, len(prompts), longest + tokens + read_every)
    if not captured:
        decoder.graphs = None
    answers = decode_prompts(
        decoder,
        prompts,
        max_new_tokens=tokens,
        end_tokens=family.end_tokens,
        read_every=read_every,
    )
    if captured and tokens > 2 * read_every and not (decoder.graphs and decoder.graphs.captured):
        raise RuntimeError("no step was captured; the log says why")
    return answers


def _decoder(model: Any, family: Ernie45VL, slots: int, capacity: int) -> PackedDecoder:
    base = packed_base(model)
    if base is None:
        raise ValueError("the model's classes are not Transformers' own")
    return PackedDecoder(base, family.processor, slots=slots, capacity=capacity)


def _comparison(
    model: Any,
    family: Ernie45VL,
    prompts: Sequence[Encoded],
    reference: Answers,
    answers: Answers,
) -> dict[str, Any]:
    """How many answers are equal as far as both go, and how close the others' choices were."""
    differ: dict[int, int] = {}
    for row, both in enumerate(zip(reference, answers, strict=True)):
        unequal = [i for i, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]]
        if unequal:
            differ[row] = unequal[0]
    found: dict[str, Any] = {
        "rows": len(prompts),
        "tokens_compared": max(map(len, reference)),
        "equal_rows": len(prompts) - len(differ),
    }
    if differ:
        margins = _margins(model, family, prompts, max(differ.values()))
        at = torch.stack([margins[step][row] for row, step in differ.items()])  # (differ, 2)
        every = torch.stack(margins).flatten(0, 1)  # (steps · rows, 2)
        # A logit x is known to x / 256 in bf16, and so is the difference of two.
        found["largest_margin_at_a_difference"] = round(float(at[:, 0].max()), 4)
        found["median_margin_of_all"] = round(float(every[:, 0].median()), 4)
        found["largest_margin_in_bf16_steps_of_the_logit"] = round(
            float((at[:, 0] / (at[:, 1].abs() / 256)).max()), 2
        )
    return found


def _margins(
    model: Any, family: Ernie45VL, prompts: Sequence[Encoded], steps: int
) -> list[torch.Tensor]:
    """By step: each row's largest logit minus the second, and the largest, (rows, 2)."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder = _decoder(model, family, len(prompts), longest + steps + 1)
    margins = []
    with torch.inference_mode():
        # In the prompts' order: `decode_prompts` takes long ones first.
        logits = decoder.prefill(prompts)
        for step in range(steps + 1):
            top = logits.float().topk(2).values
            margins.append(torch.stack([top[:, 0] - top[:, 1], top[:, 0]], dim=1).cpu())
            if step < steps:
                logits = decoder.step()
    return margins


if __name__ == "__main__":
    main()
