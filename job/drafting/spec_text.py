"""The drafted spec as YAML, with comments that say what was found and why."""

from collections.abc import Iterator

from job.drafting.draft import Draft
from job.drafting.shares import TOY_STEPS
from job.families.model_source import BUILTIN
from job.redaction import printable, redact
from job.spec.load import dump_scalar, load_spec

_WIDTH = 100
_TOY_RATE = "2e-3"
_REAL_MODEL = "hf://baidu/ERNIE-4.5-VL-28B-A3B-PT"


def spec_text(draft: Draft, path: str) -> str:
    """The spec that is to be written to `path`. It is valid: SpecError is raised otherwise."""
    lines = [
        *_header(draft, path),
        *_model(draft),
        *_data(draft),
        *_train(draft),
        *_eval(draft),
        "output:",
        f"  uri: {dump_scalar(draft.options.output_uri)}",
    ]
    text = "\n".join(lines) + "\n"
    load_spec(text, path, environ={})
    return text


def _header(draft: Draft, path: str) -> Iterator[str]:
    yield from _comment(f"Drafted from {draft.options.uri}; the reasons are in the comments.")
    yield from _comment("Check it, look at the prepared rows, then run it:")
    yield "#"
    for command in ("validate", "prep", "run"):
        yield f"#   python -m job {command} {printable(path)}"
    yield "#"
    yield from _comment("Keys that are not here have defaults: python -m job reference KEY")
    yield ""
    yield "version: 1"
    yield f"name: {draft.options.name}"
    yield ""


def _model(draft: Draft) -> Iterator[str]:
    yield "model:"
    if draft.options.model.startswith(BUILTIN):
        yield from _comment(
            "A toy that ships with the project, to try the spec in minutes on any machine. For "
            f"results, name a real model, such as {_REAL_MODEL}, and remove train.learning_rate.",
            2,
        )
    yield f"  model_name_or_path: {dump_scalar(draft.options.model)}"
    yield ""


def _data(draft: Draft) -> Iterator[str]:
    yield "data:"
    about = "" if draft.exact else "about "
    yield from _source(draft, "train", f"{about}{draft.rows:,} rows")
    for key, purpose in (("eval", "evaluated at the end"), ("validation", "validated on")):
        if key in draft.splits:
            yield from _source(draft, key, f"{purpose}, never trained on")
    if draft.text_only:
        yield "  text_only: true # no sampled row has an image"
    elif draft.without_image:
        yield from _comment(f"{draft.without_image} of the sampled rows have no image.", 2)
    if draft.instruction is not None:
        yield f"  instruction: {dump_scalar(draft.instruction)}"
    else:
        yield from _comment("No instruction: rows have their own questions.", 2)
    if draft.rejects:
        first, count = draft.rejects[0], len(draft.rejects)
        yield from _comment(
            f"{count} of the first {draft.sampled} rows cannot be used, as {first.id}: "
            f"{first.reason}. Correct such rows, or leave them out with max_bad_rows; prep lists "
            "all of them.",
            2,
        )
    yield from _fractions(draft)
    yield ""


def _source(draft: Draft, key: str, remark: str) -> Iterator[str]:
    yield f"  {key}:"
    yield f"    uri: {dump_scalar(draft.options.uri)} # {remark}"
    if key in draft.splits:
        yield f"    split: {dump_scalar(draft.splits[key])}"
    if draft.columns:
        yield "    columns:"
        for name, column in draft.columns.items():
            remark = " # the answer" if name == "text" else ""
            yield f"      {name}: {dump_scalar(column)}{remark}"


def _fractions(draft: Draft) -> Iterator[str]:
    shares = draft.shares
    about = "" if shares.exact else "about "
    if shares.exact:
        yield from _comment(
            "Rows are held out by a digest of their content, so that rows added later move none "
            "of them. Of few rows it takes more or fewer than the fraction; these are counted.",
            2,
        )
    rest = f"; {about}{shares.train_rows:,} are trained on"
    if shares.evaluation:
        rows = f"{about}{shares.evaluation_rows:,} rows, evaluated before and after"
        yield f"  eval_fraction: {shares.evaluation:g} # {rows}{'' if shares.validation else rest}"
    if shares.validation:
        rows = f"{about}{shares.validation_rows:,} others, to choose a step by"
        yield f"  validation_fraction: {shares.validation:g} # {rows}{rest}"
    if shares.unseen:
        shown = ", ".join(shares.unseen[:5]) + (", …" if len(shares.unseen) > 5 else "")
        yield from _comment(
            f"These classes have too few rows to be in every split: {shown}. Add rows of them.", 2
        )
    if not shares.validation and "validation" not in draft.splits:
        yield from _comment(
            f"No validation_fraction: {draft.rows} rows are too few to spare some.", 2
        )


def _train(draft: Draft) -> Iterator[str]:
    shares, lengths = draft.shares, draft.lengths
    yield "train:"
    if draft.options.model.startswith(BUILTIN):
        yield f"  learning_rate: {_TOY_RATE} # for the toy; the default, 2e-4, suits billions"
    if shares.few_steps:
        toy = draft.options.model.startswith(BUILTIN)
        why = f"The toy learns little in fewer than {TOY_STEPS} steps. " if toy else ""
        yield from _comment(
            f"{why}If answers are not right yet, raise this first: few rows are few steps. A "
            "changed number trains from the start.",
            2,
        )
    steps = f"{'' if shares.exact else 'about '}{shares.steps:,} steps"
    yield f"  num_train_epochs: {shares.epochs} # {steps}"
    if shares.validation or "validation" in draft.splits:
        if shares.epochs > 1:
            yield "  eval_strategy: epoch # validate after each epoch"
        else:
            yield "  eval_strategy: steps"
            yield "  eval_steps: 500"
        yield "  load_best_model_at_end: true # export the best step, by the validation loss"
    images = f", {lengths.images:,} of them for its images" if lengths.images else ""
    by = f"the tokenizer of {lengths.tokenizer}" if lengths.tokenizer else "characters"
    guessed = "" if lengths.tokenizer else "; `plan` counts with the model's tokenizer"
    yield from _comment(
        f"The longest of {draft.sampled} sampled rows has about {lengths.row:,} tokens{images}, "
        f"estimated by {by}{guessed}. Longer rows than this are left out and reported.",
        2,
    )
    yield f"  max_length: {lengths.max_length}"
    yield ""


def _eval(draft: Draft) -> Iterator[str]:
    kind, lengths = draft.answer, draft.lengths
    yield "eval:"
    reason = " ".join(redact(printable(kind.reason)).split())
    yield from _comment(f"The kind of answer, of text, latex, json and label: {reason}.", 2)
    yield f"  answer: {kind.kind}"
    yield "  generation:"
    unit = "tokens" if lengths.tokenizer else "characters"
    yield (
        f"    max_new_tokens: auto # from the labels; the longest sampled one has "
        f"{lengths.answer:,} {unit}"
    )
    yield ""


def _comment(text: str, indent: int = 0) -> Iterator[str]:
    """Comment lines; the text may come from the data."""
    from textwrap import wrap

    start = f"{' ' * indent}# "
    shown = " ".join(redact(printable(text)).split())
    yield from wrap(
        shown, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )
