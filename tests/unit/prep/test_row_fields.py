"""Nothing that a row says is dropped in silence: it is read, refused, or told with a count."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job import log
from job.cli.infer import Query, infer
from job.errors import DataError, UsageError
from job.pipeline import runner
from job.prep import image_identity, sources
from job.prep.convert import to_results
from job.prep.discovery import find_source
from job.prep.rows import Reject, Row
from job.prep.source_check import check_source
from job.spec.load import load_spec
from job.spec.types import DataSpec
from tests.unit.prep.test_prep import data_spec, pair, png, rejects, run, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(13):
        (tmp_path / "data" / "images" / f"{number}.png").write_bytes(png(40 + number))
    return tmp_path / "data"


def read(path: Path, spec: DataSpec | None = None, **columns: str) -> list[Row | Reject]:
    """What becomes of a source's records."""
    spec = spec or data_spec(path)
    one = replace(spec.train[0], columns=replace(spec.train[0].columns, **columns))
    source = find_source(one, "$.data.train")
    options = check_source(source, one, spec, "$.data.train")
    return list(to_results(list(sources.read(source, one)), options))


def only(folder: Path, row: dict[str, Any], **settings: Any) -> Row | Reject:
    path = write_jsonl(folder, [row])
    [found] = read(path, data_spec(path, **settings))
    return found


def reason(folder: Path, row: dict[str, Any], **settings: Any) -> str:
    found = only(folder, row, **settings)
    assert isinstance(found, Reject), found
    return found.reason


def texts_of(found: Row | Reject) -> list[tuple[str, str]]:
    assert isinstance(found, Row), found
    return [(message.role, message.text) for message in found.messages]


def asks(question: Any, answer: Any = "x", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


A, B = "images/1.png", "images/2.png"
IMAGE = {"type": "image"}

# --- images --------------------------------------------------------------------------------


def test_images_are_read_in_rows_that_come_after_many_without_one(folder: Path) -> None:
    texts = [asks(f"What is {n} plus {n}?") for n in range(40)]
    shown = [asks("<image>\nRead.", images=[A]), {"image": B, "text": "pair"}]
    found = read(write_jsonl(folder, [*texts, *shown]))
    assert [len(row.images) for row in found if isinstance(row, Row)] == [0] * 40 + [1, 1]


def test_images_are_read_in_a_later_file_of_another_schema(folder: Path) -> None:
    for name, row in (("a", asks("1?")), ("b", asks("<image>2?", images=[A]))):
        pq.write_table(pa.Table.from_pylist([row] * 2), folder / f"{name}.parquet")
    found = read(folder / "*.parquet")
    assert [len(row.images) for row in found if isinstance(row, Row)] == [0, 0, 1, 1]


def test_a_changed_image_counts_where_only_late_rows_of_a_table_name_one(folder: Path) -> None:
    rows: list[dict[str, Any]] = [asks("1?", images=None)] * 40
    pq.write_table(pa.Table.from_pylist([*rows, asks("2?", images=[A])]), folder / "a.parquet")
    spec = data_spec(folder / "a.parquet").train[0]
    before = image_identity.digest(find_source(spec, "x"), spec)
    (folder / A).write_bytes(png(199))
    assert image_identity.digest(find_source(spec, "x"), spec) != before


@pytest.mark.parametrize("images", [{}, {"images": []}, {"images": None}, {"images": [None]}])
@pytest.mark.parametrize(
    "row",
    [
        asks("<image>Read"),
        asks([{"type": "text", "text": "<image>Read"}]),
        asks([IMAGE, {"type": "text", "text": "Read"}]),
        asks([{"type": "image", "image": None}]),
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
        {"question": "<image>Read", "answer": "x"},
        {"instruction": "<image>Read", "output": "x"},
    ],
)
def test_a_mark_without_its_image_is_refused(
    row: dict[str, Any], images: dict[str, Any], folder: Path
) -> None:
    assert "uses more images than the row has, which is 0" in reason(folder, row | images)


@pytest.mark.parametrize(
    "row",
    [asks("Read <image>"), asks([IMAGE, {"type": "text", "text": "?"}])],
)
def test_more_images_than_marks_are_refused(row: dict[str, Any], folder: Path) -> None:
    assert reason(folder, row | {"images": [A, B]}) == "has 2 images, but its messages use only 1"


@pytest.mark.parametrize(
    "row",
    [
        asks("Read"),
        asks([{"type": "text", "text": "Read"}]),
        {"question": "Read", "answer": "x"},
        {"instruction": "Read", "output": "x"},
        {"instruction": "Read", "response": "x"},
        {"prompt": "Read", "completion": "x"},
        {"text": "x"},
    ],
)
def test_images_that_no_turn_places_come_before_the_first_question(
    row: dict[str, Any], folder: Path
) -> None:
    found = only(folder, row | {"images": [A, B]}, instruction="Read")
    assert isinstance(found, Row)
    assert [part.image for part in found.messages[0].parts] == [0, 1, None]
    assert found.messages[0].text == "Read"


@pytest.mark.parametrize(
    "row",
    [asks("?", "an <image>"), {"image": A, "text": "an <image>"}, asks("?", [IMAGE], images=[A])],
)
def test_an_image_in_an_answer_is_refused(row: dict[str, Any], folder: Path) -> None:
    assert "answer" in reason(folder, row) or "allowed in questions only" in reason(folder, row)


def data_url(line: int = 0) -> str:
    packed = base64.encodebytes(png(90)).decode() if line else base64.b64encode(png(90)).decode()
    return f"data:image/png;base64,{packed}"


NAMED = {
    "a path": A,
    "a list": [A],
    "a struct": {"bytes": None, "path": A},
    "a data URL": data_url(),
    "bare base64": base64.b64encode(png(90)).decode(),
    "a URL": "https://example.com/a.JPG?size=1",
}


@pytest.mark.parametrize("value", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("column", ["pic", "img", "image_path"])
@pytest.mark.parametrize(
    "row", [asks("Read"), {"question": "Read", "answer": "x"}, {"instruction": "?", "output": "x"}]
)
def test_a_column_of_images_that_is_not_read_is_an_error_with_the_line_to_write(
    row: dict[str, Any], column: str, value: Any, folder: Path
) -> None:
    with pytest.raises(DataError) as caught:
        only(folder, row | {column: value})
    problem = caught.value.problems[0]
    assert problem.field == "$.data.train.columns.image"
    assert f"column `{column}` contains images but would be ignored" in problem.message
    assert str(problem.fix).startswith(f"write columns: {{image: {column}}}")
    if column == "pic" and not str(value).startswith("https"):
        [found] = read(folder / "rows.jsonl", None, image=column)
        assert isinstance(found, Row)
        assert len(found.images) == 1, "the fix is right to obey"


def test_a_late_column_of_images_that_is_not_read_is_refused(folder: Path) -> None:
    found = read(write_jsonl(folder, [asks("1?")] * 40 + [asks("2?", pic=A)]))
    last = found[-1]
    assert isinstance(last, Reject)
    assert last.reason.startswith(
        "`pic` contains an image but is not read: write columns: {image: pic}"
    )


def test_a_second_column_of_images_is_an_error_and_another_name_of_the_first_is_none(
    folder: Path,
) -> None:
    with pytest.raises(DataError, match="column `after` contains images"):
        only(folder, pair(1, after=B))
    assert isinstance(only(folder, pair(1, file_name="1.png")), Row)
    held = {"bytes": base64.b64encode(png()).decode(), "path": None}
    assert isinstance(only(folder, {"image": held["bytes"], "text": "x", "source": "a.png"}), Row)
    [chosen] = read(write_jsonl(folder, [pair(1, after=B)]), None, image="image")
    assert isinstance(chosen, Row)
    assert chosen.ignored == ("after",)


def test_rows_meant_to_have_no_image_are_read_without_and_their_images_told(folder: Path) -> None:
    found = only(folder, asks("?", pic=A, images=[B]), text_only=True)
    assert isinstance(found, Row)
    assert (found.images, set(found.ignored)) == ((), {"pic", "images"})
    assert "uses" not in reason(folder, asks("<image>?", images=[B]), text_only=True)


def test_prep_counts_the_images_of_rows(folder: Path, tmp_path: Path) -> None:
    rows = [asks("<image><image>?", f"{n}", images=[A, B]) for n in range(10)]
    rows += [asks(f"{n}?", f"t{n}") for n in range(20)]
    run(data_spec(write_jsonl(folder, rows), eval_fraction=0.2), tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    figures = [stats[split] for split in ("train", "eval")]
    assert sum(each["rows_without_image"] for each in figures) == 20
    assert stats["train"]["images_per_row"]["max"] == 2
    assert stats["train"]["images_per_row"]["min"] == 0
    assert 0 < stats["train"]["images_per_row"]["mean"] < 2


def test_wrapped_data_urls_and_files_by_their_whole_uri_are_read(folder: Path) -> None:
    (folder / "images" / "a b.png").write_bytes(png(77))
    uris = [f"file://{folder}/images/1.png", f"file://{folder}/images/a%20b.png", data_url(76)]
    found = read(write_jsonl(folder, [{"image": uri, "text": "x"} for uri in uris]))
    assert [row.images[0].width for row in found if isinstance(row, Row)] == [41, 77, 90]
    assert "must be relative to the folder" in reason(
        folder, {"image": "file:///etc/a.png", "text": "x"}
    )
    (folder / "lfs.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in reason(folder, {"image": "lfs.png", "text": "x"})


def prepared(path: Path, tmp_path: Path, *settings: str) -> dict[str, int]:
    text = f"""
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny", init: random}}
data: {{train: {{uri: "{path}"}}, eval_fraction: 0.3}}
output: {{uri: "{tmp_path}/out"}}
runtime: {{cache_dir: "{tmp_path}/cache"}}
"""
    return runner.run(load_spec(text, "spec", overrides=settings, environ={}), "prep").rows


def test_a_model_that_reads_images_does_not_train_on_rows_without_any(
    folder: Path, tmp_path: Path
) -> None:
    path = write_jsonl(folder, [asks(f"{n}?", f"{n}") for n in range(20)])
    with pytest.raises(DataError, match=r"none of the \d+ training rows has an image") as caught:
        prepared(path, tmp_path)
    assert caught.value.exit_code == 11
    assert "data.text_only: true" in str(caught.value.problems[0].fix)
    assert prepared(path, tmp_path, "data.text_only=true")["train"] > 0


# --- other fields --------------------------------------------------------------------------

SYSTEM = ("system", "Be brief.")
SHAPES: dict[str, dict[str, Any]] = {
    "messages": asks("Q"),
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "x"}]},
    "a question": {"question": "Q", "answer": "x"},
    "Alpaca": {"instruction": "Q", "output": "x"},
    "a pair": {"image": A, "text": "x"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_system_text_of_a_row_is_read_in_every_shape(shape: str, folder: Path) -> None:
    row = SHAPES[shape]
    expected = [SYSTEM, ("user", "Q"), ("assistant", "x")]
    assert texts_of(only(folder, row | {"system": "Be brief."}, instruction="Q")) == expected
    assert texts_of(only(folder, row, instruction="Q", system="Be brief.")) == expected
    own = only(folder, row | {"system": "Be brief."}, instruction="Q", system="Be long.")
    assert texts_of(own) == expected
    assert texts_of(only(folder, row | {"system": None}, instruction="Q")) == expected[1:]


def test_rows_that_get_the_system_prompt_of_the_spec_are_counted_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [asks(f"{n}?", f"t{n}", **({"system": "Mine."} if n % 4 else {})) for n in range(20)]
    spec = data_spec(write_jsonl(folder, rows), system="Ours.", eval_fraction=0.2)
    run(spec, tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    given = {split: stats[split]["rows_given_system"] for split in ("train", "eval")}
    assert sum(given.values()) == 5
    assert f"train_rows={given['train']}/{stats['train']['rows']}" in capsys.readouterr().err
    run(replace(spec, system=None), tmp_path / "without")
    stats = json.loads((tmp_path / "without" / "prepared" / "stats.json").read_text())
    assert stats["train"]["rows_given_system"] == stats["eval"]["rows_given_system"] == 0
    assert "system" not in capsys.readouterr().err


def test_two_system_texts_in_a_row_are_refused(folder: Path) -> None:
    turns = [{"role": "system", "content": "A"}, *asks("Q")["messages"]]
    assert "two system prompts" in reason(folder, {"messages": turns, "system": "B"})
    assert texts_of(only(folder, {"messages": turns, "system": "A"}))[0] == ("system", "A")


@pytest.mark.parametrize("shape", ["a question", "Alpaca", "a pair"])
def test_the_history_of_a_row_is_read_before_its_question(shape: str, folder: Path) -> None:
    row = SHAPES[shape] | {"history": [["a", "b"]], "system": "Be brief."}
    found = texts_of(only(folder, row, instruction="Q"))
    assert found == [SYSTEM, ("user", "a"), ("assistant", "b"), ("user", "Q"), ("assistant", "x")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asks("Q", history=[["a", "b"]]), "has both `history` and `messages`"),
        ({"question": "Q", "answer": "x", "history": ["a"]}, "[question, answer] pairs"),
        (asks("Q", tools=[{"name": "f"}]), "`tools` is not supported"),
        (asks("Q", videos=["a.mp4"]), "`videos` is not supported"),
        (
            {"question": "Q", "answer": "x", "reasoning_content": "hm"},
            "`reasoning_content` is not supported: it belongs to the assistant's turn",
        ),
        (
            asks("Q", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]),
            "a part of type thinking, which is not supported",
        ),
        (
            asks([{"type": "video", "video": "a.mp4"}]),
            "a part of type video, which is not supported",
        ),
        (asks([{"type": "text", "text": "Q", "image": A}]), "text and image in one part"),
        (asks("Q", ""), "the answer is empty"),
        (asks(" "), "messages[0] is empty"),
        (asks("Q", None), "messages[1] must be text, found NoneType"),
    ],
)
def test_what_is_not_understood_is_refused(row: dict[str, Any], message: str, folder: Path) -> None:
    assert message in reason(folder, row)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [{"function": {"name": "f"}}]),
        ("reasoning_content", 5),
        ("reasoning", "hm"),
        ("thinking", "hm"),
        ("images", [A]),
        ("weight", 0.5),
        ("loss", "no"),
    ],
)
def test_a_turn_with_more_than_it_says_is_refused(key: str, value: Any, folder: Path) -> None:
    row = asks("Q")
    row["messages"][1][key] = value
    told = reason(folder, row).replace("`", "")
    assert f"messages[1] has {key}" in told or f"messages[1].{key} must be text" in told
    row["messages"][1][key] = None
    assert isinstance(only(folder, row), Row), "null is as if it were not there"


@pytest.mark.parametrize(
    ("value", "thoughts"), [("hm", "hm"), ("\n", None), ("", None), (None, None)]
)
def test_thoughts_of_an_answer_are_read_and_blank_ones_are_none(
    value: str | None, thoughts: str | None, folder: Path
) -> None:
    row = asks("Q")
    row["messages"][1]["reasoning_content"] = value
    found = only(folder, row)
    assert isinstance(found, Row)
    assert found.messages[-1].reasoning == thoughts
    assert found.ignored == ()


def test_trained_answers_with_thoughts_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [asks(f"{n}?", f"t{n}") for n in range(20)]
    for row in rows[::2]:
        row["messages"][1]["reasoning_content"] = "hm"
    muted = {"role": "assistant", "content": "a", "reasoning_content": "hm", "train": False}
    rows[1]["messages"] = [{"role": "user", "content": "b"}, muted, *rows[1]["messages"]]
    run(data_spec(write_jsonl(folder, rows), eval_fraction=0.2), tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    both = [stats["train"], stats["eval"]]
    assert sum(each["trained_answers"] for each in both) == 20
    assert sum(each["trained_answers_with_thoughts"] for each in both) == 10


def test_thoughts_in_a_wrong_place_are_refused(folder: Path) -> None:
    row = asks("Q")
    row["messages"][0]["reasoning_content"] = "hm"
    assert "only answers have thoughts" in reason(folder, row)
    row = asks("Q")
    row["messages"][1]["reasoning_content"] = "<think>hm</think>"
    assert "messages[1].reasoning_content contains <think>" in reason(folder, row)
    row["messages"][1] = {"role": "assistant", "content": "x", "thinking": "hm"}
    assert "rename it to `reasoning_content`" in reason(folder, row)


@pytest.mark.parametrize(
    ("row", "location"),
    [
        (asks("Q", "<think>hm</think>x"), "messages[1] contains <think>"),
        (asks("Q", [{"type": "text", "text": "hm</think>x"}]), "messages[1] contains </think>"),
        ({"question": "Q", "answer": "<think>hm</think>x"}, "`answer` contains <think>"),
        (
            {"question": "Q", "answer": "x", "history": [["a", "<think>hm</think>b"]]},
            "history[0] contains <think>",
        ),
    ],
)
def test_thoughts_in_the_text_of_an_answer_are_refused(
    row: dict[str, Any], location: str, folder: Path
) -> None:
    told = reason(folder, row)
    assert location in told
    assert "move the thoughts, without it, to `reasoning_content`" in told


def test_a_question_may_speak_of_think(folder: Path) -> None:
    asked = asks("What does <think> do?")
    assert texts_of(only(folder, asked))[0] == ("user", "What does <think> do?")


def test_an_empty_answer_in_the_middle_is_refused(folder: Path) -> None:
    turns = [*asks("1?", " ")["messages"], *asks("2?")["messages"]]
    assert reason(folder, {"messages": turns}) == "answer messages[1] is empty"


def test_a_late_row_without_a_column_that_the_spec_names_says_which(folder: Path) -> None:
    rows = [{"scan": A, "latex": "x", "ask": "?"}] * 33
    path = write_jsonl(folder, [*rows, {"scan": A, "ask": "?"}, {"scan": A, "latex": "x"}])
    found = read(path, None, image="scan", text="latex", question="ask")
    assert [row.reason for row in found[33:] if isinstance(row, Reject)] == [
        "`latex` is missing",
        "`ask` is missing",
    ]


def test_a_role_that_is_not_known_is_named(folder: Path) -> None:
    row = {"messages": [{"role": "tool", "content": "1"}, *asks("Q")["messages"]]}
    assert reason(folder, row).endswith("system, user or assistant, found tool")


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0, "train": None}]
)
def test_a_turn_that_is_flagged_is_not_trained(flag: dict[str, Any], folder: Path) -> None:
    turns = [*asks("1?")["messages"], *asks("2?", "y")["messages"]]
    turns[1] |= flag
    found = only(folder, {"messages": turns})
    assert isinstance(found, Row)
    assert [m.train for m in found.messages if m.role == "assistant"] == [False, True]
    assert Row.from_record(found.to_record()).messages == found.messages, "it is kept in shards"
    turns[3] |= flag
    assert reason(folder, {"messages": turns}) == "no answer is trained: flags exclude them all"


def test_train_on_last_trains_the_last_answer_alone(folder: Path) -> None:
    turns = [*asks("1?")["messages"], *asks("2?", "y")["messages"]]
    found = only(folder, {"messages": turns}, train_on="last")
    assert isinstance(found, Row)
    assert [m.train for m in found.messages if m.role == "assistant"] == [False, True]


def test_parts_with_null_keys_as_arrow_writes_them_are_read(folder: Path) -> None:
    part = {"type": None, "text": None, "image": None, "image_url": None}
    empty = {"bytes": None, "path": None}
    rows = [
        asks([part | {"type": "image_url", "image_url": {"url": data_url()}}, part | {"text": "?"}],
             [part | {"type": "text", "text": "x"}], image=empty, system=None, history=None),
        asks([part | {"type": "text", "text": "?"}], [part | {"text": "x"}], image=empty),
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    found = read(folder / "rows.parquet")
    assert [len(row.images) for row in found if isinstance(row, Row)] == [1, 0]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"image": A, "text": "a", "label": "b"}, "text"),
        ({"question": "Q", "prompt": "R", "answer": "b"}, "question"),
    ],
)
def test_two_columns_that_could_be_the_same_thing_are_an_error(
    row: dict[str, Any], key: str, folder: Path
) -> None:
    with pytest.raises(DataError) as caught:
        only(folder, row)
    assert caught.value.problems[0].field == f"$.data.train.columns.{key}"
    name = next(name for name in row if name in ("text", "question"))
    assert str(caught.value.problems[0].fix).endswith(f"{key}: {name}")
    [found] = read(folder / "rows.jsonl", None, **{key: name})
    assert isinstance(found, Row)


def test_columns_that_are_not_read_are_told_with_their_number(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log.configure("text")
    rows = [pair(n, source="a" if n < 7 else None) for n in range(12)]
    rows += [asks(f"{n}?", f"{n}") for n in range(12)]
    for row in rows[12:]:
        row["messages"][0]["name"] = "Eve"
        row["messages"][1]["content"] = [{"text": row["messages"][1]["content"], "cited": 1}]
    run(data_spec(write_jsonl(folder, rows), eval_fraction=0.3), tmp_path)
    stats = json.loads((tmp_path / "prepared" / "stats.json").read_text())
    assert stats["not_read"] == {
        "train": {"source": 7, "messages[].name": 12, "messages[].content[].cited": 12}
    }
    assert "ignored columns" in capfd.readouterr().err
    assert rejects(tmp_path) == {}


# --- the question --------------------------------------------------------------------------


def test_pairs_without_an_instruction_are_an_error_that_shows_one(folder: Path) -> None:
    spec = data_spec(write_jsonl(folder, [pair(1)]), instruction=None)
    with pytest.raises(DataError, match="is required, as rows have no question") as caught:
        read(folder / "rows.jsonl", spec)
    problem = caught.value.problems[0]
    assert (problem.field, caught.value.exit_code) == ("$.data.instruction", 11)
    assert "rows.jsonl:1 is {image: images/1.png" in problem.message
    assert 'instruction: "' in str(problem.fix)


def test_a_late_pair_without_an_instruction_is_refused(folder: Path) -> None:
    spec = data_spec(write_jsonl(folder, [asks("?")] * 40 + [pair(1)]), instruction=None)
    last = read(folder / "rows.jsonl", spec)[-1]
    assert isinstance(last, Reject)
    assert "set data.instruction to what to ask" in last.reason


def test_rows_that_ask_themselves_need_no_instruction(folder: Path) -> None:
    for shape in ("messages", "ShareGPT", "a question", "Alpaca"):
        assert isinstance(only(folder, SHAPES[shape], instruction=None), Row)


def test_infer_asks_what_the_spec_says_or_wants_a_question(tmp_path: Path) -> None:
    text = f"""
version: 1
name: test
model: {{model_name_or_path: "builtin://ernie-vl-tiny"}}
data: {{train: {{uri: rows.jsonl}}}}
output: {{uri: "{tmp_path}/out"}}
"""
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (64, 40), "white").save(image)
    loaded = load_spec(text, "spec", environ={})
    with pytest.raises(UsageError, match=r"the spec has no data\.instruction"):
        infer(loaded, Query(images=(image,)), "base", seed=None, write=print)
    formulas = load_spec(text.replace("rows.jsonl", "builtin://formulas, limit: 4"), "", environ={})
    assert formulas.spec.data.question == "Write the LaTeX representation for this image."
    assert loaded.spec.data.question is None
