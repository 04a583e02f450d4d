"""Checks of validation during training: its rows, its metric, and what depends on it."""

import functools
from collections.abc import Iterator

from job.spec import keys
from job.spec.answer_kinds import LOSS, METRICS, bare_metric
from job.spec.foreign_names import nearest
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding

STRATEGY, REINFORCE_STRATEGY = "train.eval_strategy", "reinforce.eval_strategy"
DEPENDENT = (
    "train.eval_steps",
    "train.predict_with_generate",
    "train.metric_for_best_model",
    "train.load_best_model_at_end",
    "train.early_stopping_patience",
)
"""Keys that do something only if there is validation."""


def _validates(at: View) -> bool:
    return bool(at(STRATEGY) != "no")


def _is_left_out(at: View) -> bool:
    """Whether `reinforce` starts without training, so that no setting of its validation applies."""
    return bool(at("train.max_steps") == 0 and at("reinforce") is not None)


def _of_training(rule: Rule) -> Rule:
    """The rule, unless training is left out.

    The rules of `reinforce` then refuse each setting of its validation: another finding would
    advise what they refuse.
    """

    @functools.wraps(rule)
    def checked(at: View) -> Iterator[Finding]:
        if not _is_left_out(at):
            yield from rule(at)

    return checked


@_of_training
def _validation_has_rows(at: View) -> Iterator[Finding]:
    if _validates(at) and at("data.validation") is None and not at("data.validation_fraction"):
        yield finding(
            STRATEGY,
            "requires rows to validate on, other than those that are trained and evaluated on",
            "set data.validation_fraction: 0.05, or name them in data.validation.uri",
        )


def _reinforce_validates(at: View) -> bool:
    return at("reinforce") is not None and bool(at(REINFORCE_STRATEGY) != "no")


def _validation_rows_are_used(at: View) -> Iterator[Finding]:
    if _validates(at) or _reinforce_validates(at):
        return
    stages = [STRATEGY] if at("reinforce") is None else [REINFORCE_STRATEGY]
    if stages == [REINFORCE_STRATEGY] and not _is_left_out(at):
        stages.append(STRATEGY)
    required = " or ".join(stages)
    for dotted, none in (("data.validation", None), ("data.validation_fraction", 0)):
        if at(dotted) != none:
            yield finding(
                dotted,
                f"requires {required}: without it these rows would neither be trained nor "
                "validated on",
                f"set {stages[0]}: steps, or remove the line",
            )
    if at("eval.validation_samples") != keys.default("eval.validation_samples"):
        yield finding(
            "eval.validation_samples",
            f"requires {required}: nothing is validated without it",
            f"set {stages[0]}: steps{and_rows(at)}, or remove the line; eval.max_samples limits "
            "the evaluation",
        )


def and_rows(at: View) -> str:
    """What a fix that turns validation on has to add for there to be rows to validate on."""
    rows = at("data.validation") is not None or at("data.validation_fraction")
    return "" if rows else " and data.validation_fraction: 0.05"


@_of_training
def _settings_require_validation(at: View) -> Iterator[Finding]:
    if _validates(at):
        return
    for dotted in DEPENDENT:
        if at(dotted):
            yield finding(
                dotted,
                f"requires {STRATEGY}: nothing is validated without it",
                f"set {STRATEGY}: steps{and_rows(at)}, or remove the line",
            )


@_of_training
def _eval_steps_count_steps(at: View) -> Iterator[Finding]:
    if at(STRATEGY) == "epoch" and at("train.eval_steps") is not None:
        yield finding(
            "train.eval_steps",
            f"does not apply if {STRATEGY} is epoch",
            f"set {STRATEGY}: steps, or remove the line",
        )


@_of_training
def _metric_is_measured(at: View) -> Iterator[Finding]:
    dotted, answer = "train.metric_for_best_model", at("eval.answer")
    named = at(dotted)
    measured = (LOSS, *(METRICS[answer] if at("eval.metrics") is None else at("eval.metrics")))
    if named is None or bare_metric(named) in measured:
        return
    name = bare_metric(named)
    if name in METRICS[answer]:
        yield finding(dotted, "is not among eval.metrics", f"add {name} to eval.metrics")
        return
    others = [kind for kind, metrics in METRICS.items() if name in metrics]
    reason = f"does not apply to eval.answer: {answer}" if others else "is not a metric"
    close = nearest(name, measured)
    yield finding(
        dotted,
        f"{reason}; those measured are {', '.join(f'eval_{each}' for each in measured)}",
        (f"write eval_{close}" if close else "use one of these")
        + (f", or set eval.answer: {' or '.join(others)}" if others else ""),
    )


@_of_training
def _metric_is_generated(at: View) -> Iterator[Finding]:
    named, generate = at("train.metric_for_best_model"), at("train.predict_with_generate")
    if bare_metric(named) != LOSS and generate is False:
        yield finding(
            "train.predict_with_generate",
            f"must not be false if train.metric_for_best_model is {named}, which compares "
            "generated answers",
            "remove the line, or set train.metric_for_best_model: eval_loss",
        )


def _sharded_models_do_not_generate(at: View) -> Iterator[Finding]:
    if at("runtime.distributed") != "fsdp2":
        return
    if at("train.predict_with_generate"):
        yield finding(
            "train.predict_with_generate",
            "must not be true if runtime.distributed is fsdp2: this version does not generate "
            "with a sharded model",
            "remove the line, or set runtime.distributed: ddp",
        )
    elif bare_metric(at("train.metric_for_best_model")) != LOSS:
        yield finding(
            "train.metric_for_best_model",
            "must be eval_loss if runtime.distributed is fsdp2: this version does not generate "
            "answers with a sharded model",
            "write eval_loss, or set runtime.distributed: ddp",
        )


@_of_training
def _threshold_requires_patience(at: View) -> Iterator[Finding]:
    if at("train.early_stopping_threshold") and at("train.early_stopping_patience") is None:
        yield finding(
            "train.early_stopping_threshold",
            "requires train.early_stopping_patience: training does not stop early without it",
            "set train.early_stopping_patience: 3, or remove the line",
        )


RULES: tuple[Rule, ...] = (
    _validation_has_rows,
    _validation_rows_are_used,
    _settings_require_validation,
    _eval_steps_count_steps,
    _metric_is_measured,
    _metric_is_generated,
    _sharded_models_do_not_generate,
    _threshold_requires_patience,
)
