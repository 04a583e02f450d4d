"""Checks of the data section."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding, unknown_builtin
from job.spec.types import FORMULAS

BUILTIN_DATA = (FORMULAS,)
HELD_OUT = ("data.eval", "data.validation")
"""The sources of rows that are not trained on."""


def _evaluation_has_rows(at: View) -> Iterator[Finding]:
    if at("data.eval") is None and at("data.eval_fraction") == 0:
        yield finding(
            "data.eval_fraction",
            "must be greater than 0 if data.eval is null: there would be nothing to evaluate on",
            "set data.eval.uri, or data.eval_fraction: 0.1",
        )


def _validation_is_a_source_or_a_fraction(at: View) -> Iterator[Finding]:
    if at("data.validation") is not None and at("data.validation_fraction") > 0:
        yield finding(
            "data.validation_fraction",
            "cannot be combined with data.validation, which names the rows to validate on",
            "remove one of the two",
        )


def _fractions_leave_training_rows(at: View) -> Iterator[Finding]:
    if at("data.eval") is not None or at("data.validation") is not None:
        return
    held_out, validation = at("data.eval_fraction"), at("data.validation_fraction")
    if validation and held_out + validation >= 1:
        yield finding(
            "data.validation_fraction",
            "leaves no row to train on: all are held out, together with data.eval_fraction, which "
            f"is {held_out:g}",
            "lower them to less than 1 together, for example 0.1 each",
        )


def _min_pixels_below_max_pixels(at: View) -> Iterator[Finding]:
    least, most = at("data.min_pixels"), at("data.max_pixels")
    if least is not None and most is not None and least > most:
        yield finding(
            "data.min_pixels",
            f"must not be greater than data.max_pixels, which is {most}",
            f"write {most} or less",
        )


def _format_matches_source(at: View) -> Iterator[Finding]:
    for source in at.sources():
        uri, format_ = at(f"{source}.uri"), at(f"{source}.format")
        if uri.startswith("builtin://"):
            yield from unknown_builtin(f"{source}.uri", uri, BUILTIN_DATA)
            if format_ not in ("auto", "builtin"):
                yield finding(
                    f"{source}.format", "must be auto for a builtin:// source", "remove the line"
                )
            continue
        if format_ == "builtin":
            yield finding(
                f"{source}.format",
                "must not be builtin for a source that is not builtin://",
                f"write auto, or set {source}.uri: {BUILTIN_DATA[0]}",
            )
        for name, value in at(f"{source}.formulas").items():
            if value != keys.default(f"{source}.formulas.{name}"):
                yield finding(
                    f"{source}.formulas.{name}",
                    f"applies to {BUILTIN_DATA[0]} only",
                    "remove the line",
                )


def _formulas_have_a_limit(at: View) -> Iterator[Finding]:
    for source in at.sources():
        if at(f"{source}.uri") in BUILTIN_DATA and at(f"{source}.limit") is None:
            yield finding(
                f"{source}.limit",
                f"is required for {BUILTIN_DATA[0]}, which is endless",
                f"set {source}.limit: 400",
            )


def _evaluation_formulas_differ(at: View) -> Iterator[Finding]:
    """Nor may those of data.validation be the same as any others."""
    generated = [source for source in at.sources() if at(f"{source}.uri") in BUILTIN_DATA]
    seeds: dict[int, str] = {}
    for source in generated:
        seed = at(f"{source}.formulas.seed")
        if source in HELD_OUT and seed in seeds:
            highest = max(at(f"{each}.formulas.seed") for each in generated)
            yield finding(
                f"{source}.formulas.seed",
                f"must differ from {seeds[seed]}.formulas.seed, or the formulas are the same",
                f"set {source}.formulas.seed: {highest + 1}",
            )
        seeds[seed] = source


def _columns_do_not_overlap(at: View) -> Iterator[Finding]:
    for source in at.sources():
        columns = at(f"{source}.columns")
        for name in ("text", "question"):
            if columns["messages"] is not None and columns[name] is not None:
                yield finding(
                    f"{source}.columns.{name}",
                    f"cannot be combined with messages, which contain the {name}",
                    "remove one of the two",
                )


def _image_folders_have_an_instruction(at: View) -> Iterator[Finding]:
    for source in at.sources():
        if at(f"{source}.format") == "imagefolder" and at("data.instruction") is None:
            yield finding(
                "data.instruction",
                f"is required: rows of {source} are pairs of an image and its text, without a "
                "question",
                'for example data.instruction: "What does the image say?"',
            )
            return


def _prompts_have_no_image_tag(at: View) -> Iterator[Finding]:
    for key in ("data.instruction", "data.system"):
        if "<image>" in (at(key) or ""):
            yield finding(key, "must not contain <image>: images come before the question",
                       "remove <image>")  # fmt: skip


def _text_only_has_no_images(at: View) -> Iterator[Finding]:
    for source in at.sources() if at("data.text_only") else ():
        if at(f"{source}.columns.image") is not None:
            yield finding(
                f"{source}.columns.image",
                "cannot be combined with data.text_only: true, which ignores images",
                "remove one of the two",
            )
        if at(f"{source}.uri") in BUILTIN_DATA or at(f"{source}.format") == "imagefolder":
            yield finding("data.text_only", f"must be false: the rows of {source} are images",
                       "remove the line")  # fmt: skip
            return


def _weights_apply_to_all_sources(at: View) -> Iterator[Finding]:
    weights = {source: at(f"{source}.weight") for source in at.sources()}
    several = [source for source in weights if source not in HELD_OUT]
    mixed = several if len(several) > 1 else []
    for source, weight in weights.items():
        if weight is not None and source not in mixed:
            yield finding(
                f"{source}.weight",
                "applies only if data.train is a list of several sources",
                "remove the line",
            )
    given = [source for source in mixed if weights[source] is not None]
    if 0 < len(given) < len(mixed):
        missing = next(source for source in mixed if weights[source] is None)
        yield finding(
            f"{missing}.weight",
            f"is missing, but {given[0]} has one",
            "give every source of data.train a weight, or none",
        )
    if not given and at("data.stopping_strategy") != keys.default("data.stopping_strategy"):
        yield finding(
            "data.stopping_strategy",
            "applies only if the sources of data.train have weights",
            "give each source a weight, or remove the line",
        )


def _shuffle_buffer_requires_streaming(at: View) -> Iterator[Finding]:
    size = at("data.shuffle_buffer_size")
    if not at("data.streaming") and size != keys.default("data.shuffle_buffer_size"):
        yield finding(
            "data.shuffle_buffer_size",
            "applies only to streamed rows; otherwise all rows are shuffled together",
            "set data.streaming: true, or remove the line",
        )


RULES: tuple[Rule, ...] = (
    _evaluation_has_rows,
    _validation_is_a_source_or_a_fraction,
    _fractions_leave_training_rows,
    _min_pixels_below_max_pixels,
    _format_matches_source,
    _formulas_have_a_limit,
    _evaluation_formulas_differ,
    _columns_do_not_overlap,
    _image_folders_have_an_instruction,
    _prompts_have_no_image_tag,
    _text_only_has_no_images,
    _weights_apply_to_all_sources,
    _shuffle_buffer_requires_streaming,
)
