"""Builds `builtin://ernie-vl-tiny`: a miniature ERNIE-4.5-VL with the full architecture.

It has two modality-isolated sets of routed experts, shared experts, a dense first layer, M-RoPE,
the vision tower and the variable-resolution resampler: code for the 28B model is tested on it in
seconds on a CPU. The head dimension of 128 and the M-RoPE sections are the published ones, because
vLLM supports no others.

    python -m job.families.ernie45_vl.tiny DIRECTORY      writes config, tokenizer and processor

`job/families/builtin/ernie-vl-tiny` is this module's output; a test compares them.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from job.prep.formulas.grammar import VOCABULARY

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeProcessor

SPECIAL_TOKENS = {
    "pad_token": "<unk>",
    "bos_token": "<|begin_of_sentence|>",
    "eos_token": "<|end_of_sentence|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
}

# One token per command, so that generating a formula takes about as many steps as it has symbols.
COMMANDS = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi
varpi rho varrho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma
Upsilon Phi Psi Omega partial nabla infty hbar ell imath jmath Re Im wp forall exists emptyset
prime dagger dag star ast circ bullet cdot cdots ldots dots ddots vdots times div pm mp oplus
otimes wedge vee cap cup setminus sim simeq approx cong equiv propto neq ne leq le geq ge ll gg
subset supset subseteq supseteq in notin ni mid parallel perp to rightarrow leftarrow Rightarrow
Leftarrow leftrightarrow Leftrightarrow longrightarrow mapsto uparrow downarrow langle rangle
lbrace rbrace lbrack rbrack lfloor rfloor lceil rceil vert Vert triangle bot top
frac dfrac tfrac sqrt sum prod int oint iint bigoplus bigotimes bigcup bigcap lim sup inf max min
sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan exp log ln det dim ker tr deg gcd
hat bar tilde vec dot ddot check breve widehat widetilde overline underline overrightarrow
overleftarrow stackrel over choose atop left right big Big bigg Bigg bigl bigr Bigl Bigr biggl
biggr displaystyle textstyle scriptstyle limits nolimits
mathrm mathbf mathcal mathbb mathsf mathit mathfrak boldsymbol boldmath operatorname text textrm
textbf mbox hbox rm bf it cal tt begin end label tag nonumber quad qquad hspace vspace phantom
slash not sp sb
""".split()  # noqa: SIM905 - a list to read, not to quote

# The words of the chat template and of the default instruction.
WORDS = (
    *("User", "Assistant", "Picture"),
    *("Write", "the", "LaTeX", "representation", "for", "this", "image"),
)

VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_merge_size": 2,
}

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": [64, 64],
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,  # for short rows: loss 1.08 after 1,000 steps; with 500,000: 1.17
        "mrope_section": [22, 22, 20],
    },
}

# Most of a formula's image is white, so white is 0 and ink is -3.3. With the published mean and
# standard deviation, white would be the largest value, and a model with random weights would take
# several times as many steps: loss 2.43 after 600 steps of 512 rows, instead of 0.61.
IMAGE_MEAN, IMAGE_STD = (1.0, 1.0, 1.0), (0.3, 0.3, 0.3)

# Cheap on a laptop: an image of 56 × 336 pixels has 24 tokens, and none has more than 256.
MIN_PIXELS, MAX_PIXELS = 56 * 56, 256 * 28 * 28

CHAT_TEMPLATE = """\
{{- '<|begin_of_sentence|>' -}}
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- 'User: ' -}}
{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' -}}
{%- if message.reasoning_content is defined -%}
{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{- part.text -}}
{%- elif part.type in ('image', 'image_url') -%}
{%- set images.count = images.count + 1 -%}
{{- 'Picture ' ~ images.count ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|end_of_sentence|>' if message.role == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant: ' -}}
{%- if enable_thinking is defined and enable_thinking -%}{{- '<think>' -}}
{%- else -%}{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def build(directory: Path) -> None:
    """Writes the checkpoint's files, without weights."""
    tokenizer = _tokenizer()
    config, processor = _config(tokenizer), _processor(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(directory)
    config.save_pretrained(directory)
    ids = _special_ids(tokenizer)
    generation = {
        "bos_token_id": ids["bos_token"],
        "eos_token_id": ids["eos_token"],
        "pad_token_id": ids["pad_token"],
        "do_sample": False,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _tokenizer() -> "Tokenizer":
    """Byte-level, with a token for each special token, command and word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(dict.fromkeys(SPECIAL_TOKENS.values()))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*special, *alphabet])},
            merges=[],
            unk_token=SPECIAL_TOKENS["pad_token"],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    commands = [f"\\{command}" for command in COMMANDS]
    commands += [token for token in VOCABULARY if len(token) > 1]
    # The longest match wins, so `\infty` does not become `\in`; words match whole words only, so
    # that neighbouring variables never become one.
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, single_word=token in WORDS)
            for token in dict.fromkeys([*commands, *WORDS, "<think>", "</think>"])
        ]
    )
    return tokenizer


def _special_ids(tokenizer: "Tokenizer") -> dict[str, int | None]:
    return {name: tokenizer.token_to_id(token) for name, token in SPECIAL_TOKENS.items()}


def _config(tokenizer: "Tokenizer") -> "Ernie4_5_VLMoeConfig":
    import transformers

    ids = _special_ids(tokenizer)
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64
    return transformers.Ernie4_5_VLMoeConfig(
        architectures=["Ernie4_5_VLMoeForConditionalGeneration"],
        text_config={
            **TEXT,
            "vocab_size": vocabulary,
            "pad_token_id": ids["pad_token"],
            "bos_token_id": ids["bos_token"],
            "eos_token_id": ids["eos_token"],
        },
        vision_config=VISION,
        dtype="float32",
        **{
            f"{kind}_{part}": ids[f"{kind}_{part[:-3]}"]
            for kind in ("image", "video")
            for part in ("start_token_id", "end_token_id", "token_id")
        },
    )


def _processor(tokenizer: "Tokenizer") -> "Ernie4_5_VLMoeProcessor":
    import transformers

    is_media = {key: key[:5] in ("image", "video") for key in SPECIAL_TOKENS}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        model_max_length=TEXT["max_position_embeddings"],
        unk_token=SPECIAL_TOKENS["pad_token"],
        extra_special_tokens={k: v for k, v in SPECIAL_TOKENS.items() if is_media[k]},
        **{k: v for k, v in SPECIAL_TOKENS.items() if not is_media[k]},
    )
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return transformers.Ernie4_5_VLMoeProcessor(
        transformers.Ernie4_5_VLMoeImageProcessor(
            size=size, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
        ),
        wrapped,
        transformers.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
