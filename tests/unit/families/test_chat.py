"""Cutting conversations where answers begin and end, by any chat template."""

import functools
from dataclasses import replace
from typing import Any

import jinja2
import pytest

from job.errors import DataError
from job.families import chat
from job.prep.rows import Message, Part
from tests.models import LLAMA_TEMPLATE, QWEN_TEMPLATE, tokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>")
CONTROL = chat.ControlTokens.of(tokenizer(SPECIAL, eos="</s>", pad=None, bos="<s>"))

# No white space kept around turns, a space before the answer, and the end token after another.
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% else %}\
{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
CHATML = """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THINKS_ALOUD = CHATML.replace(
    "assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTS = CHATML.replace("m.content", "m.content | upper")


def template(source: str) -> Any:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - no HTML

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def render(
        turns: chat.Turns, *, add_generation_prompt: bool, enable_thinking: bool = False
    ) -> str:
        return environment.from_string(source).render(
            messages=turns,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            bos_token="<s>",
            eos_token="</s>",
            raise_exception=refuse,
        )

    return render


def said(*texts: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    found = [Message(role=roles[i % 2], parts=(Part(text=t),)) for i, t in enumerate(texts)]  # type: ignore[arg-type]
    first = [Message(role="system", parts=(Part(text=system),))] if system else []
    return [*first, *found]


def cut(source: str, messages: list[Message]) -> tuple[chat.Segment, ...]:
    turns = chat.turns(messages, as_text=True)
    return chat.segments("row", template(source), turns, CONTROL)


def answers(source: str, messages: list[Message]) -> list[str]:
    return [segment.text for segment in cut(source, messages) if segment.supervised]


@pytest.mark.parametrize(
    ("source", "end", "before"),
    [
        (CHATML, "<|im_end|>", ""),
        (LLAMA_TEMPLATE, "<|eot_id|>", ""),
        (MISTRAL, " </s>", " "),
        (QWEN_TEMPLATE, "<|im_end|>", ""),
    ],
    ids=["chatml", "llama", "mistral", "qwen"],
)
def test_every_answer_with_its_end_token_is_cut_out_whole(
    source: str, end: str, before: str
) -> None:
    assert answers(source, said("1?", "one")) == [f"{before}one{end}"]
    many = said("1?", "one", "2?", "two two", "1?", "one")
    last = [f"{before}one{end}", f"{before}two two{end}", f"{before}one{end}"]
    assert answers(source, many) == last


@pytest.mark.parametrize("source", [CHATML, LLAMA_TEMPLATE, MISTRAL, QWEN_TEMPLATE])
def test_the_last_answer_begins_where_its_prompt_ends(source: str) -> None:
    messages = said("1?", "one", "2?", "two")
    segments = cut(source, messages)
    asked = chat.prompt("row", template(source), chat.turns(messages[:-1], as_text=True))
    assert "".join(segment.text for segment in segments[:-1]) == asked


@pytest.mark.parametrize("source", [CHATML, LLAMA_TEMPLATE, MISTRAL, QWEN_TEMPLATE])
def test_the_pieces_are_the_conversation_up_to_its_last_end_token(source: str) -> None:
    messages = said("1?", " one \n", "2?", "two")
    whole = template(source)(chat.turns(messages, as_text=True), add_generation_prompt=False)
    text = "".join(segment.text for segment in cut(source, messages))
    assert whole.startswith(text)
    assert not whole[len(text) :].strip()


def test_a_trimmed_answer_is_trained_as_the_template_writes_it() -> None:
    assert answers(LLAMA_TEMPLATE, said("?", "\n a b \n")) == ["a b<|eot_id|>"]
    assert answers(CHATML, said("?", "\n a b \n")) == ["\n a b \n<|im_end|>"]


def test_a_default_system_prompt_is_asked_and_not_answered() -> None:
    first = cut(CHATML, said("?", "a"))[0]
    assert (first.supervised, "Be kind." in first.text) == (False, True)
    own = cut(CHATML, said("?", "a", system="Be brief."))[0]
    assert "Be brief." in own.text
    assert "Be kind." not in own.text


def test_a_thinking_block_before_the_last_answer_alone_is_asked() -> None:
    segments = cut(QWEN_TEMPLATE, said("1?", "one", "2?", "two"))
    assert [s.text for s in segments if s.supervised] == ["one<|im_end|>", "two<|im_end|>"]
    assert segments[2].text.endswith("<think>\n\n</think>\n\n")


# Qwen 3's way: thoughts are shown before the last answer only, and the prompt opens no block.
THINKS = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (m.reasoning_content or '') | trim + '\\n</think>\\n\\n' }}
{%- endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
OPENS_BLOCK = THINKS.replace(
    "{%- if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "{{- '<think>\\n' }}{%- if not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}",
)


def thought(source: str, messages: list[Message]) -> tuple[chat.Segment, ...]:
    turns, render = chat.turns(messages, as_text=True), template(source)
    thinking = functools.partial(render, enable_thinking=True)
    return chat.segments("row", render, turns, CONTROL, messages, thinking=thinking)


@pytest.mark.parametrize(("source", "block"), [(THINKS, "<think>\n"), (OPENS_BLOCK, "")])
def test_thoughts_are_trained_from_where_a_model_that_thinks_begins(
    source: str, block: str
) -> None:
    question, answer = said("1?", "one")
    thoughtful = [question, replace(answer, reasoning="  count\n")]
    asked, replied = thought(source, thoughtful)
    prompt = functools.partial(template(source), enable_thinking=True)
    assert asked.text == chat.prompt("row", prompt, chat.turns([question], as_text=True))
    assert (replied.text, replied.supervised) == (
        f"{block}count\n</think>\n\none<|im_end|>",
        True,
    )
    plain = thought(source, [question, answer])
    assert plain[1].text == "one<|im_end|>"


def test_thoughts_that_the_template_does_not_show_are_refused_and_never_dropped() -> None:
    messages = said("1?", "one", "2?", "two")
    earlier = [messages[0], replace(messages[1], reasoning="hm"), *messages[2:]]
    with pytest.raises(DataError, match="thoughts before an earlier answer") as caught:
        thought(THINKS, earlier)
    assert "data.train_on: last" in str(caught.value.problems[0].fix)
    muted = [earlier[0], replace(earlier[1], train=False), *earlier[2:]]
    assert [s.text for s in thought(THINKS, muted) if s.supervised] == ["two<|im_end|>"]
    last = [*messages[:3], replace(messages[3], reasoning="hm")]
    with pytest.raises(DataError, match="thoughts before the last answer") as caught:
        thought(CHATML, last)
    assert caught.value.problems[0].value == "messages[3].reasoning_content"
    assert "model.chat_template" in str(caught.value.problems[0].fix)


@pytest.mark.parametrize(
    ("source", "texts", "reason"),
    [
        (THINKS_ALOUD, ("?", "a"), "does not render an answer after its generation prompt"),
        (NO_END, ("?", "a"), "ends an answer without a control token"),
        (SHOUTS, ("?", "a"), "changes an answer"),
        (QWEN_TEMPLATE, ("?", "<think>b</think>a"), "changes an answer"),
        (LLAMA_TEMPLATE, (), "begins with the user"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    source: str, texts: tuple[str, ...], reason: str
) -> None:
    messages = said(*texts) or [Message(role="assistant", parts=(Part(text="a"),))]
    with pytest.raises(DataError, match=reason) as caught:
        cut(source, messages)
    assert caught.value.problems[0].field == "row"
    assert caught.value.problems[0].fix


def test_an_answer_begins_after_the_white_space_that_ends_its_prompt() -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert answers(source, said("?", "  a")) == ["a</s>"]
    untrimmed = source.replace(" | trim", "").replace("': ' + m", "':' + m")
    assert answers(untrimmed, said("?", " a")) == ["a</s>"]


@pytest.mark.parametrize("source", [CHATML, LLAMA_TEMPLATE, MISTRAL, QWEN_TEMPLATE])
def test_an_answer_that_is_not_trained_is_cut_out_all_the_same(source: str) -> None:
    messages = said("1?", "one", "2?", "two")
    muted = [replace(m, train=m.text != "one") for m in messages]
    turns = chat.turns(muted, as_text=True)
    found = chat.segments("row", template(source), turns, CONTROL, muted)
    assert [s.text for s in found] == [s.text for s in cut(source, messages)]
    assert [s.supervised for s in found] == [False, False, False, True]


def test_digits_that_a_tokenizer_marks_special_are_text() -> None:
    control = chat.ControlTokens.of(tokenizer((*SPECIAL, "7"), eos="</s>", pad=None))
    control.reject("row", said("7 + 7?", "14"))


def test_an_answer_that_looks_like_a_mark_is_refused_or_cut_right() -> None:
    for text in ("[[answer>>", "<<answer]]", "x[[answer>>y<<answer]]z"):
        try:
            found: Any = answers(CHATML, said("?", text))
        except DataError:
            continue
        assert found == [f"{text}<|im_end|>"]
