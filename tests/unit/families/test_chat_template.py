"""A chat template of the spec: read, checked, used and written in place of the checkpoint's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job import families
from job.errors import JobError, SpecError
from job.families import chat_template
from job.pipeline.fingerprints import StageInputs
from job.prep.rows import Message, Part, Row
from job.spec.load import load_spec
from job.train.label_proof import label_proof
from tests.models import BUILDERS, LLAMA_TEMPLATE, QWEN_VL_TEMPLATE
from tests.unit.families.test_packed_step import TINY, image

SPEC = load_spec(Path("specs/latex.yaml").read_text(), "specs/latex.yaml", environ={}).spec
ERNIE_TEMPLATE = (TINY / "chat_template.jinja").read_text()
TEMPLATES = {
    "ernie": ERNIE_TEMPLATE.replace("'User: '", "'Human: '"),
    "qwen_vl": QWEN_VL_TEMPLATE.replace("a helpful assistant", "a pirate"),
    "llama": LLAMA_TEMPLATE.replace("\\n\\n", "\\n"),
}
CHANGED = {"ernie": "Human: ", "qwen_vl": "a pirate", "llama": "user<|end_header_id|>\nRead"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"ernie": TINY}
    for name in ("qwen_vl", "llama"):
        made[name] = tmp_path_factory.mktemp(name)
        BUILDERS[name](made[name])
    return made


def bound(checkpoint: Path, template: str | None, **data: Any) -> Any:
    return families.bind(
        families.read_checkpoint(str(checkpoint), checkpoint),
        replace(SPEC.model, chat_template=template),
        replace(SPEC.data, **data),
    )


def row(*, images: int, system: str | None = None) -> Row:
    parts = (*(Part(image=number) for number in range(images)), Part(text="Read."))
    first = () if system is None else (Message(role="system", parts=(Part(text=system),)),)
    turns = (
        Message(role="user", parts=parts),
        Message(role="assistant", parts=(Part(text="one"),), train=False),
        Message(role="user", parts=(Part(text="And?"),)),
        Message(role="assistant", parts=(Part(text="two"),)),
    )
    return Row(id="r:1", messages=(*first, *turns), images=(image(60, 60),) * images)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_and_prompts_are_rendered_with_it_and_the_answer_alone_is_trained(
    name: str, checkpoints: dict[str, Path]
) -> None:
    family = bound(checkpoints[name], TEMPLATES[name])
    made = row(images=1 if family.reads_images else 0)
    encoded = family.encode(made)
    proof = label_proof(encoded, family)
    assert CHANGED[name] in proof["marked"]
    assert CHANGED[name] not in label_proof(bound(checkpoints[name], None).encode(made), family)
    trained = [piece["text"] for piece in proof["pieces"] if piece["trained"]]
    assert len(trained) == 1, "the first answer is flagged"
    assert trained[0].startswith("two")
    prompt = family.encode_prompt("r:1", made.prompt, made.images)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids


@pytest.mark.parametrize("layout", ["vllm", "transformers"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_written_with_exported_weights_and_beside_adapters_and_reads_back_the_same(
    name: str, layout: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    family = bound(checkpoints[name], TEMPLATES[name])
    family.save_settings(tmp_path, dtype=torch.float16, layout=layout)
    made = row(images=1 if family.reads_images else 0)
    again = bound(tmp_path, None)
    assert again.encode(made).input_ids == family.encode(made).input_ids
    beside = tmp_path / "beside"
    beside.mkdir()
    family.write_chat_template(beside, layout=layout)
    written = (beside / chat_template.FILE).read_text()
    assert written == (tmp_path / chat_template.FILE).read_text()
    published = "<|image@placeholder|>" in written
    assert published == (name == "ernie" and layout == "vllm"), "as servers of that layout expect"
    from_published = bound(checkpoints[name], written).encode(made)
    assert from_published.input_ids == family.encode(made).input_ids


IMAGE = "{{- 'Picture ' ~ images.count ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}"
ENDS = "{{- '<|end_of_sentence|>' if message.role == 'assistant' else '\\n' -}}"
PROMPT = "{%- if add_generation_prompt -%}\n{{- 'Assistant: ' -}}"
BAD = {
    "a tag that is not closed": (
        ERNIE_TEMPLATE.replace("{%- endfor -%}", "", 1), r"no Jinja template: line \d+: ", 10,
    ),
    "no Jinja at all": ("templates/none.jinja", "no such file|does not exist|not found", 12),
    "a function that does not exist": (
        ERNIE_TEMPLATE.replace("{%- set images", "{{ nothing() }}\n{%- set images"),
        "line 2: 'nothing' is undefined", 10,
    ),
    "refuses": (
        ERNIE_TEMPLATE.replace(ENDS, "{{ raise_exception('no') }}"), r"line \d+: no", 10,
    ),
    "leaves images out": (ERNIE_TEMPLATE.replace(IMAGE, ""), "shows 0 of 2 images", 10),
    "shows images twice": (ERNIE_TEMPLATE.replace(IMAGE, IMAGE * 2), "shows 4 of 2 images", 10),
    "no end token": (
        ERNIE_TEMPLATE.replace(ENDS, ""), "ends an answer without a control token", 10,
    ),
    "another generation prompt": (
        ERNIE_TEMPLATE.replace(PROMPT, PROMPT.replace("Assistant", "Bot")),
        "does not render an answer after its generation prompt", 10,
    ),
    "prints parts": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end_of_sentence|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "prints the parts of the user turn", 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_one_that_cannot_be_used_is_refused_by_its_key_before_any_work(kind: str) -> None:
    template, reason, code = BAD[kind]
    with pytest.raises(JobError, match=reason) as refused:
        bound(TINY, template)
    assert refused.value.exit_code == code
    assert refused.value.problems[0].field == "$.model.chat_template"
    assert refused.value.problems[0].fix


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{{ messages }}" + b" " * 2**20, "more than 1,048,576"),
        (b"{{ '\xff' }}", "is not UTF-8"),
        (b"Write what you see.", "shows no message"),
    ],
)
def test_a_file_that_is_no_template_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=reason):
        chat_template.text_of(replace(SPEC.model, chat_template=str(path)))


def test_a_system_prompt_that_the_template_does_not_show_is_refused(
    checkpoints: dict[str, Path],
) -> None:
    drops = ERNIE_TEMPLATE.replace(
        "{%- for message in messages -%}",
        "{%- for message in messages if message.role != 'system' -%}",
    )
    with pytest.raises(SpecError, match="does not show the system prompt") as refused:
        bound(TINY, drops, system="Be brief.")
    assert refused.value.problems[0].field == "$.data.system"
    raises = LLAMA_TEMPLATE.replace("message.role == 'assistant'", "message.role == 'system'")
    with pytest.raises(SpecError, match="line 4: a conversation begins") as refused:
        bound(checkpoints["llama"], raises, system="Be brief.")
    assert "set model.chat_template" in (refused.value.problems[0].fix or "")
    own = bound(TINY, drops)
    with pytest.raises(JobError, match="does not show the system prompt") as row_refused:
        own.encode(row(images=0, system="Be brief."))
    assert row_refused.value.exit_code == 11


def test_its_content_decides_what_runs_again_and_its_place_does_not(tmp_path: Path) -> None:
    def fingerprints(template: str | None) -> list[str]:
        spec = replace(SPEC, model=replace(SPEC.model, chat_template=template))
        inputs = StageInputs(spec, processes=1)
        stages: Any = ("prep", "baseline", "train", "eval", "export")
        return [
            *(inputs.fingerprint(stage, {}) for stage in stages),
            inputs.checkpoint_identity().fingerprint,
        ]

    places = [tmp_path / "a.jinja", tmp_path / "b.jinja"]
    for place in places:
        place.write_text(TEMPLATES["ernie"])
    inline, first, second = (fingerprints(str(t)) for t in (TEMPLATES["ernie"], *places))
    assert inline == first == second
    places[0].write_text(ERNIE_TEMPLATE)
    changed = fingerprints(str(places[0]))
    assert changed[0] == first[0] == fingerprints(None)[0], "rows do not depend on it"
    assert all(a != b for a, b in zip(changed[1:], first[1:], strict=True))
