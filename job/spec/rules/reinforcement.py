"""Checks of the reinforce section; all of them pass if it is absent."""

import math
from collections.abc import Iterator

from job.spec import keys
from job.spec.answer_kinds import LOSS, METRICS, REWARDS, bare_metric
from job.spec.foreign_names import nearest
from job.spec.problems import Finding
from job.spec.rules.validation import DEPENDENT as TRAIN_DEPENDENT
from job.spec.rules.validation import REINFORCE_STRATEGY as STRATEGY
from job.spec.rules.validation import STRATEGY as TRAIN_STRATEGY
from job.spec.rules.validation import and_rows
from job.spec.rules.view import Rule, View, finding


def _is_present(at: View) -> bool:
    return at("reinforce") is not None


def _rewards(at: View) -> Iterator[tuple[str, str]]:
    """The dotted key and the name of each reward."""
    given = at("reinforce.rewards")
    several = isinstance(given, list)
    for place in (f"[{number}]" for number in range(len(given))) if several else ("",):
        yield f"reinforce.rewards{place}.name", at(f"reinforce.rewards{place}.name")


def _rewards_are_known(at: View) -> Iterator[Finding]:
    if not _is_present(at):
        return
    answer = at("eval.answer")
    fitting = [name for name, kinds in REWARDS.items() if answer in kinds]
    for dotted, name in _rewards(at):
        if ":" in name:
            continue
        if name not in REWARDS:
            close = nearest(name, fitting)
            yield finding(
                dotted,
                f"is not a reward; those for eval.answer: {answer} are {', '.join(fitting)}",
                f"write {close}" if close else "use one of these, or module:function",
            )
        elif name not in fitting:
            yield finding(
                dotted,
                f"does not apply to eval.answer: {answer}, whose rewards are {', '.join(fitting)}",
                f"use one of these, or set eval.answer: {' or '.join(REWARDS[name])}",
            )


def _rewards_are_named_once(at: View) -> Iterator[Finding]:
    if not _is_present(at):
        return
    seen = set[str]()
    for dotted, name in _rewards(at):
        if name in seen:
            yield finding(dotted, "is named twice", "remove it, and add its weight to the first")
        seen.add(name)


def _code_is_allowed(at: View) -> Iterator[Finding]:
    if not _is_present(at) or at("reinforce.allow_code"):
        return
    for dotted, name in _rewards(at):
        if ":" in name:
            yield finding(
                dotted,
                "is code that the job would import and run, which this spec does not allow",
                "set reinforce.allow_code: true if you trust it, or use a reward that ships with "
                "the project",
            )


def _answers_fill_groups(at: View) -> Iterator[Finding]:
    if not _is_present(at):
        return
    group = at("reinforce.num_generations")
    passes = at("reinforce.gradient_accumulation_steps")
    batch = at("reinforce.per_device_train_batch_size")
    answers = batch * passes
    if answers % group:
        unit = group // math.gcd(group, passes)  # batches of its multiples fill groups
        yield finding(
            "reinforce.num_generations",
            "must divide per_device_train_batch_size × gradient_accumulation_steps, the answers "
            f"of a step, which are {answers}",
            f"set reinforce.per_device_train_batch_size: {_nearest_multiple(batch, unit)}",
        )


def _nearest_multiple(number: int, unit: int) -> int:
    """The lower one if two are as near, but never 0."""
    return max(1, (number + (unit - 1) // 2) // unit) * unit


def _warmup_ends(at: View) -> Iterator[Finding]:
    if not _is_present(at) or at("reinforce.lr_scheduler_type") == "constant":
        return
    steps, warmup = at("reinforce.max_steps"), at("reinforce.warmup_steps")
    short_trial = at.from_command_line("reinforce.max_steps")
    if steps < warmup and not (short_trial and not at.from_command_line("reinforce.warmup_steps")):
        yield finding(
            "reinforce.warmup_steps",
            f"must not be greater than reinforce.max_steps, which is {steps}: the learning rate "
            "would never reach reinforce.learning_rate",
            f"write {steps // 10}, or raise reinforce.max_steps",
        )


def _one_process_continues_an_adapter(at: View) -> Iterator[Finding]:
    """What this version cannot do, reported at the key that stands in the way."""
    if not _is_present(at):
        return
    if at("lora.method") == "full":
        yield finding(
            "reinforce",
            "requires lora.method: lora: it continues an adapter",
            "set lora.method: lora, or remove the section reinforce",
        )
    if at("runtime.distributed") in ("ddp", "fsdp2"):
        yield finding(
            "reinforce",
            "requires one process: this version does not spread its answers over several",
            "set runtime.distributed: none, or remove the section reinforce",
        )
    if at("model.engine") == "unsloth":
        yield finding(
            "reinforce",
            "is not run by model.engine: unsloth",
            "set model.engine: transformers, or remove the section reinforce",
        )
    if at("model.load_in_4bit"):
        yield finding(
            "reinforce",
            "is not supported with model.load_in_4bit: true in this version",
            "set model.load_in_4bit: false, or remove the section reinforce",
        )
    if at("data.streaming"):
        yield finding(
            "reinforce",
            "is not supported with data.streaming: true in this version: it takes rows in another "
            "order than training",
            "set data.streaming: false, or remove the section reinforce",
        )
    if at("eval.generation.enable_thinking"):
        yield finding(
            "reinforce",
            "is not supported with eval.generation.enable_thinking: true in this version: its "
            "answers are generated without thoughts",
            "set eval.generation.enable_thinking: false, or remove the section reinforce",
        )
    if at("runtime.accelerator") == "cpu" and at("reinforce.optim").endswith("8bit"):
        yield finding(
            "reinforce.optim",
            "does not run on a CPU, which runtime.accelerator selects",
            "write adamw_torch, or auto",
        )


def _validation_has_rows(at: View) -> Iterator[Finding]:
    if not _is_present(at) or at(STRATEGY) == "no":
        return
    if at("data.validation") is None and not at("data.validation_fraction"):
        yield finding(
            STRATEGY,
            "requires rows to validate on, other than those that are trained and evaluated on",
            "set data.validation_fraction: 0.05, or name them in data.validation.uri",
        )


def _settings_require_validation(at: View) -> Iterator[Finding]:
    if not _is_present(at) or at(STRATEGY) != "no":
        return
    for name in ("eval_steps", "metric_for_best_model", "load_best_model_at_end"):
        if at(f"reinforce.{name}"):
            yield finding(
                f"reinforce.{name}",
                f"requires {STRATEGY}: nothing is validated without it",
                f"set {STRATEGY}: steps{and_rows(at)}, or remove the line",
            )


def _metric_is_measured(at: View) -> Iterator[Finding]:
    if not _is_present(at) or at("reinforce.metric_for_best_model") is None:
        return
    answer, chosen = at("eval.answer"), at("eval.metrics")
    measured = (LOSS, *(METRICS[answer] if chosen is None else chosen))
    name = bare_metric(at("reinforce.metric_for_best_model"))
    if name not in measured:
        close = nearest(name, measured)
        yield finding(
            "reinforce.metric_for_best_model",
            f"is not measured; what is: {', '.join(f'eval_{each}' for each in measured)}",
            f"write eval_{close}" if close else "use one of these",
        )


def _training_may_be_left_out(at: View) -> Iterator[Finding]:
    """`train.max_steps: 0` trains nothing: `reinforce` starts from the adapter as it is."""
    if not _is_present(at) or at("train.max_steps") != 0:
        return
    for dotted in (TRAIN_STRATEGY, *TRAIN_DEPENDENT, "train.early_stopping_threshold"):
        if at(dotted) != keys.default(dotted):
            yield finding(
                dotted,
                "does not apply if train.max_steps is 0: nothing is trained before reinforce",
                f"remove the line; {STRATEGY}: steps validates while answers are reinforced",
            )


RULES: tuple[Rule, ...] = (
    _rewards_are_known,
    _rewards_are_named_once,
    _code_is_allowed,
    _answers_fill_groups,
    _warmup_ends,
    _one_process_continues_an_adapter,
    _validation_has_rows,
    _settings_require_validation,
    _metric_is_measured,
    _training_may_be_left_out,
)
