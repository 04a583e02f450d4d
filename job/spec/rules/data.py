"""What is read to train and to evaluate on."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, builtin, find
from job.spec.types import FORMULAS

BUILTIN_DATA = (FORMULAS,)


def _something_is_evaluated(at: View) -> Iterator[Finding]:
    if at("data.eval") is None and at("data.eval_fraction") == 0:
        yield find(
            "data.eval_fraction",
            "must be greater than 0 where data.eval is null: nothing would be evaluated",
            "set data.eval.uri, or data.eval_fraction: 0.1",
        )


def _pixels_have_a_range(at: View) -> Iterator[Finding]:
    least, most = at("data.min_pixels"), at("data.max_pixels")
    if least is not None and most is not None and least > most:
        yield find(
            "data.min_pixels",
            f"must not be greater than data.max_pixels, which is {most}",
            f"write {most} or less",
        )


def _sources_are_read_by_their_format(at: View) -> Iterator[Finding]:
    for source in at.sources():
        uri, format_ = at(f"{source}.uri"), at(f"{source}.format")
        if uri.startswith("builtin://"):
            yield from builtin(f"{source}.uri", uri, BUILTIN_DATA)
            if format_ not in ("auto", "builtin"):
                yield find(
                    f"{source}.format", "must be auto for a builtin:// source", "remove the line"
                )
            continue
        if format_ == "builtin":
            yield find(
                f"{source}.format",
                "must not be builtin for a source that is not builtin://",
                f"write auto, or set {source}.uri: {BUILTIN_DATA[0]}",
            )
        for name, value in at(f"{source}.formulas").items():
            if value != keys.default(f"{source}.formulas.{name}"):
                yield find(
                    f"{source}.formulas.{name}",
                    f"is read for {BUILTIN_DATA[0]} only",
                    "remove the line",
                )


def _formulas_end(at: View) -> Iterator[Finding]:
    for source in at.sources():
        if at(f"{source}.uri") in BUILTIN_DATA and at(f"{source}.limit") is None:
            yield find(
                f"{source}.limit",
                f"must be given for {BUILTIN_DATA[0]}, which has no end",
                f"set {source}.limit: 400",
            )


def _evaluation_is_unseen(at: View) -> Iterator[Finding]:
    if at("data.eval") is None or at("data.eval.uri") not in BUILTIN_DATA:
        return
    *train, _ = at.sources()
    seeds = {at(f"{s}.formulas.seed"): s for s in train if at(f"{s}.uri") in BUILTIN_DATA}
    if (seed := at("data.eval.formulas.seed")) in seeds:
        yield find(
            "data.eval.formulas.seed",
            f"must differ from {seeds[seed]}.formulas.seed: the formulas would be the same",
            f"set data.eval.formulas.seed: {max(seeds) + 1}",
        )


def _columns_say_one_thing(at: View) -> Iterator[Finding]:
    for source in at.sources():
        columns = at(f"{source}.columns")
        for name in ("text", "question"):
            if columns["messages"] is not None and columns[name] is not None:
                yield find(
                    f"{source}.columns.{name}",
                    f"cannot stand beside messages, which hold the {name}",
                    "remove one of the two",
                )


def _rows_of_images_ask_something(at: View) -> Iterator[Finding]:
    for source in at.sources():
        if at(f"{source}.format") == "imagefolder" and at("data.instruction") is None:
            yield find(
                "data.instruction",
                f"must say what is asked: rows of {source}, pairs of an image and its text, have "
                f"no question of their own",
                'for example data.instruction: "What does the image say?"',
            )
            return


def _questions_stand_behind_their_images(at: View) -> Iterator[Finding]:
    for key in ("data.instruction", "data.system"):
        if "<image>" in (at(key) or ""):
            yield find(key, "must not hold <image>: images come before the question",
                       "remove <image>")  # fmt: skip


def _text_alone_has_no_images(at: View) -> Iterator[Finding]:
    for source in at.sources() if at("data.text_only") else ():
        if at(f"{source}.columns.image") is not None:
            yield find(
                f"{source}.columns.image",
                "cannot stand beside data.text_only: true, which reads no image",
                "remove one of the two",
            )
        if at(f"{source}.uri") in BUILTIN_DATA or at(f"{source}.format") == "imagefolder":
            yield find("data.text_only", f"must be false: the rows of {source} are images",
                       "remove the line")  # fmt: skip
            return


def _weights_mix_sources(at: View) -> Iterator[Finding]:
    weights = {source: at(f"{source}.weight") for source in at.sources()}
    several = [source for source in weights if source != "data.eval"]
    mixed = several if len(several) > 1 else []
    for source, weight in weights.items():
        if weight is not None and source not in mixed:
            yield find(
                f"{source}.weight",
                "is read only where data.train is a list of several sources",
                "remove the line",
            )
    given = [source for source in mixed if weights[source] is not None]
    if 0 < len(given) < len(mixed):
        missing = next(source for source in mixed if weights[source] is None)
        yield find(
            f"{missing}.weight",
            f"is missing, while {given[0]} has one",
            "give every source of data.train a weight, or none",
        )
    if not given and at("data.stopping_strategy") != keys.default("data.stopping_strategy"):
        yield find(
            "data.stopping_strategy",
            "is read only where the sources of data.train have weights",
            "give each source a weight, or remove the line",
        )


def _buffers_are_for_streams(at: View) -> Iterator[Finding]:
    size = at("data.shuffle_buffer_size")
    if not at("data.streaming") and size != keys.default("data.shuffle_buffer_size"):
        yield find(
            "data.shuffle_buffer_size",
            "is read only where rows are streamed; else all of them are shuffled together",
            "set data.streaming: true, or remove the line",
        )


RULES: tuple[Rule, ...] = (
    _something_is_evaluated,
    _pixels_have_a_range,
    _sources_are_read_by_their_format,
    _formulas_end,
    _evaluation_is_unseen,
    _columns_say_one_thing,
    _rows_of_images_ask_something,
    _questions_stand_behind_their_images,
    _text_alone_has_no_images,
    _weights_mix_sources,
    _buffers_are_for_streams,
)
