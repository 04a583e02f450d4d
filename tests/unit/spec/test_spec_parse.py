"""YAML is read as people expect it, and what is wrong is told with line and column."""

import pytest

from job.errors import SpecError
from job.spec.parse import MAX_BYTES, Document, decode, parse, read_at, read_value


def _value(text: str) -> object:
    return parse(f"key: {text}\n", "job.yaml").values["key"]


def _error(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, "job.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E+3", 2e3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-7", -7),
        ("+7", 7),
        ("012", 12),
        ("0o17", 15),
        ("0xFf", 255),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_yaml_1_2_scalars_have_their_values(text: str, value: object) -> None:
    assert _value(text) == value
    assert type(_value(text)) is type(value)
    assert read_value(text) == value


@pytest.mark.parametrize(
    "text",
    ["on", "off", "yes", "No", "2024-01-01", "1_000", "12:30:45", "0b11", "tRUE", "1e", "="],
)
def test_what_yaml_1_1_reads_as_something_else_is_text(text: str) -> None:
    assert _value(text) == text
    assert read_value(text) == text


def test_quoted_scalars_and_blocks_are_text() -> None:
    assert (_value("'2e-4'"), _value('"null"'), _value("|\n  1\n")) == ("2e-4", "null", "1\n")


def test_a_number_too_long_to_be_one_is_text() -> None:
    assert _value("9" * 5000) == "9" * 5000


def test_an_explicit_tag_of_the_core_schema_is_honoured() -> None:
    assert (_value("!!str 12"), _value("!!float 3")) == ("12", 3.0)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!local", "!!binary", "!!set"])
def test_other_tags_are_refused_and_nothing_is_run(tag: str) -> None:
    message = _error(f"a: 1\nkey: {tag} [ls]\n")
    assert message == f"job.yaml:2:6: the YAML tag {tag} is not supported here"


def test_a_scalar_that_its_tag_does_not_fit_is_refused() -> None:
    error = "job.yaml:1:6: the YAML tag !!int is not supported here"
    assert _error("key: !!int word\n") == error


def test_places_are_the_lines_of_the_keys_and_items() -> None:
    document = parse("a:\n  b: x\n  c:\n    - 'y'\n    - z\n", "job.yaml")
    lines = {path: place.line for path, place in document.locations.items() if path}
    assert lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
    }
    assert document.locations[("a", "b")].plain
    assert not document.locations[("a", "c", 0)].plain
    assert document.locations[("a", "c", 1)].plain


def test_an_alias_stands_for_a_copy_of_its_anchor() -> None:
    values = parse("a: &a {x: [1]}\nb: *a\n", "job.yaml").values
    assert values == {"a": {"x": [1]}, "b": {"x": [1]}}
    assert values["a"]["x"] is not values["b"]["x"]


@pytest.mark.parametrize("merge_first", [True, False])
def test_a_key_beside_a_merge_wins_with_its_own_place(merge_first: bool) -> None:
    lines = ["  <<: *a", "  x: '2'"]
    text = "a: &a {x: 1, y: {z: 1}}\nb:\n" + "\n".join(lines if merge_first else lines[::-1])
    document = parse(text, "job.yaml")
    assert document.values["b"] == {"x": "2", "y": {"z": 1}}
    assert document.locations[("b", "x")].line == (4 if merge_first else 3)
    assert not document.locations[("b", "x")].plain


def test_the_first_of_several_merged_mappings_wins() -> None:
    text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}\n"
    assert parse(text, "job.yaml").values["c"] == {"x": 1, "y": 2}


def test_a_merge_of_something_else_than_a_mapping_is_refused() -> None:
    assert _error("a: &a 1\nb: {<<: *a}\n") == (
        "job.yaml:1:4: `<<` takes a mapping, as in `<<: *name`"
    )


def test_every_duplicate_key_is_told_with_the_line_of_the_first() -> None:
    assert _error("a:\n  x: 1\n  'x': 2\nb: 1\nb: 1\n") == (
        "job.yaml:3:3: the key x is set twice, first on line 2\n    fix: remove one of "
        "the two\njob.yaml:5:1: the key b is set twice, first on line 4\n    fix: remove "
        "one of the two"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\tc\n", "job.yaml:2:3: contains a tab where YAML allows only spaces"),
        ("a:\n\tb: 1\n", "job.yaml:2:1: contains a tab where YAML allows only spaces"),
        ("a: 1\n---\nb: 1\n", "job.yaml:2:1: contains more than one YAML document"),
        ("", "job.yaml: is empty"),
        ("# only a comment\n", "job.yaml: is empty"),
        ("\n- a\n", 'job.yaml:2: must be a mapping of keys (found ["a"])'),
        ("word\n", "job.yaml:1: must be a mapping of keys (found word)"),
        ("a: x\x01\n", "job.yaml:1:5: contains the character U+0001, which YAML does not allow"),
        ("a: b: c\n", "job.yaml:1:5: is not valid YAML: mapping values are not allowed here"),
        ("a: *x\n", "job.yaml:1:4: is not valid YAML: found undefined alias 'x'"),
        ("a: [${X}]\n", "job.yaml:1:6: is not valid YAML: expected ',' or ']', but got '{'"),
        ('a: "\\U00110000"\n', "job.yaml: is not valid YAML: an escape is not a character"),
        ("[" * 5000, "job.yaml: is nested too deeply"),
        ("a: &a [*a]\n", "job.yaml:1: is nested deeper than 24 levels"),
        ("? [a]\n: 1\n", "job.yaml:1:3: a key must be a scalar"),
    ],
)
def test_what_is_no_spec_gives_one_clear_error(text: str, message: str) -> None:
    assert _error(text).startswith(message)
    assert _error(text).count("\njob.yaml") == 0


def test_variables_in_a_flow_list_are_to_be_quoted() -> None:
    assert _error("a: [${X}]\n").endswith("fix: put ${…} in quotes inside [ ] or { }")


def test_an_alias_bomb_is_refused_before_it_expands() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert _error("\n".join(levels)).startswith(
        "job.yaml: contains more than 10,000 values with its aliases expanded"
    )


def test_a_spec_larger_than_a_mebibyte_is_refused_as_text_and_as_bytes() -> None:
    comment = "#" + "x" * MAX_BYTES
    message = "job.yaml: is larger than 1,048,576 bytes (found 1,048,577 bytes)"
    assert _error(comment).startswith(message)
    assert _error("#" + "é" * (MAX_BYTES // 2)).startswith(message)
    with pytest.raises(SpecError, match="is larger than 1,048,576 bytes"):
        decode(comment.encode(), "job.yaml")


def test_bytes_that_are_not_utf_8_are_told_with_line_and_column() -> None:
    with pytest.raises(SpecError) as caught:
        decode("a: é\nb: x".encode() + b"\xff\n", "job.yaml")
    assert str(caught.value) == (
        "job.yaml:2:5: is not UTF-8 text: byte 0xff is invalid\n    fix: save the file as UTF-8"
    )


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    text = decode(b"\xef\xbb\xbfa: 1\r\nb: x\r\n", "job.yaml")
    assert parse(text, "job.yaml").values == {"a": 1, "b": "x"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{uri: x}", {"uri": "x"}),
        ("'12'", "12"),
        ("s3://a/b", "s3://a/b"),
        ("Write: this # too", "Write: this # too"),
        ("*x", "*x"),
        ("  5 ", 5),
    ],
)
def test_a_single_value_is_a_scalar_or_a_flow_collection(text: str, value: object) -> None:
    assert read_value(text) == value


@pytest.mark.parametrize("text", ["[a", "{a: 1", "'a", "[a] b", "[!x a]"])
def test_a_single_value_that_opens_wrongly_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="YAML"):
        read_value(text)


def test_where_only_text_can_stand_a_number_or_an_open_bracket_is_text() -> None:
    assert read_at(("model", "revision"), "1234567") == "1234567"
    assert read_at(("model", "revision"), "null") is None
    assert read_at(("data", "instruction"), "[INST] read") == "[INST] read"
    assert read_at(("name",), '"12"') == "12"
    assert read_at(("train", "seed"), "12") == 12


def test_a_document_does_not_print_its_values() -> None:
    assert "secret" not in repr(Document("job.yaml", {"a": "secret"}, {}))
