"""Checkpoints of other makers' architectures, tiny and with random weights, built on the spot.

The tokenizers are byte-level, so that any text has tokens; the chat templates are shortened from
the published ones, with what they do to conversations: default system prompts, trimmed turns,
thinking blocks that only the last answer has.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

QWEN_VL_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}<|im_end|>
{% else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

# No space after the colon of the prompt; one before the answer.
SMOLVLM_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{ message.role | capitalize }}\
{% if message.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}\
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}\
{% elif part.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# Trims every turn, and refuses turns out of order as published ones do.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.first -%}
{{- raise_exception('a conversation begins with the user') }}
{%- endif %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# The last answer follows a thinking block, earlier ones do not.
QWEN_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

# Heads of 32: the smallest that vLLM computes on a CPU.
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def tokenizer(
    special: tuple[str, ...], *, eos: str, pad: str | None, bos: str | None = None, **more: Any
) -> Any:
    """A byte-level tokenizer with the control tokens first."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*special, *alphabet])}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, pad_token=pad, bos_token=bos, **more
    )


def llama(directory: Path) -> None:
    """Llama 3: embeddings of its own at the head, no padding token."""
    import transformers

    special = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    words = tokenizer(special, eos="<|eot_id|>", pad=None, bos="<|begin_of_text|>")
    words.chat_template = LLAMA_TEMPLATE
    config = transformers.LlamaConfig(
        **_TEXT, vocab_size=320, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False
    )
    _write(directory, transformers.LlamaForCausalLM(config), words)


def qwen3(directory: Path) -> None:
    """Qwen 3: tied embeddings, a thinking block before the last answer."""
    import transformers

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    words = tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    words.chat_template = QWEN_TEMPLATE
    config = transformers.Qwen3Config(
        **_TEXT, head_dim=32, vocab_size=320, eos_token_id=2, tie_word_embeddings=True
    )
    _write(directory, transformers.Qwen3ForCausalLM(config), words)


def qwen_vl(directory: Path) -> None:
    """Qwen 2.5-VL: images of any size, 3-D positions, a default system prompt."""
    import transformers

    special = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    )
    words = tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    ids = {token: words.convert_tokens_to_ids(token) for token in special}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            "vocab_size": 320,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size={"shortest_edge": 784, "longest_edge": 50176}),
        words,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=QWEN_VL_TEMPLATE,
    )
    _write(directory, transformers.Qwen2_5_VLForConditionalGeneration(config), processor)


def idefics3(directory: Path) -> None:
    """Idefics 3, which SmolVLM is: images cut into squares that stand in rows and columns."""
    import transformers

    squares = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    special = (
        *("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>"),
        *("<image>", "<global-img>", *squares),
    )
    words = tokenizer(special, eos="<end_of_utterance>", pad="<|endoftext|>")
    config = transformers.Idefics3Config(
        text_config={
            **_TEXT,
            "model_type": "llama",
            "vocab_size": 320,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ),
        words,
        image_seq_len=4,
        chat_template=SMOLVLM_TEMPLATE,
    )
    _write(directory, transformers.Idefics3ForConditionalGeneration(config), processor)


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen_vl": qwen_vl,
    "idefics3": idefics3,
}


def add_noise(adapted: Any, std: float) -> None:
    """Gives a new adapter, which changes nothing yet, weights that do; the same each time."""
    import torch

    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            noise = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter.data.copy_(noise.normal_(std=std, generator=generator))


def _write(directory: Path, model: Any, processor: Any) -> None:
    import torch

    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                generator = torch.Generator().manual_seed(number)
                parameter.normal_(std=0.05, generator=generator)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
