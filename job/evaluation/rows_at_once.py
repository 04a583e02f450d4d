"""How many answers are generated at once: as many as the memory allows, up to a limit.

Each step reads the weights once for all rows, so more rows are faster, until other costs grow with
them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from job import log
from job.engines.free_memory import free_memory
from job.families.encoded import Encoded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MOST_ON_GPU = 256
MOST_ON_CPU = 128
"""A token of a row takes 0.7 ms of the tiny model at 16 rows at once, 0.6 at 32 and 0.4 at 64."""
USED_SHARE = 0.7
"""The share of the free memory to plan with; the rest is for what is not estimated here."""
HIDDEN_STATES_A_TOKEN = 64
"""Values of a prompt's token that are in memory at once, as multiples of the hidden size."""
DECODED_PROMPT_TOKENS = 4096
"""The most prompt tokens that the family's decoder computes at once, unless one prompt has more."""


def rows_at_once(
    model: "PreTrainedModel | PeftModel",
    prompts: Sequence[Encoded],
    requested: int | Literal["auto"],
    *,
    new_tokens: int,
    by_decoder: bool,
) -> int:
    """The rows to generate at once, at most as many as requested and as there are prompts.

    `by_decoder` means by the family's decoder; Transformers computes all prompts of a batch at
    once, padded to the longest.
    """
    device = model.device
    most = MOST_ON_CPU if device.type == "cpu" else MOST_ON_GPU
    if requested != "auto":
        most = min(requested, MOST_ON_GPU)
    config = model.config.get_text_config(decoder=True)
    itemsize, hidden = model.dtype.itemsize, config.hidden_size
    longest = max(len(prompt.input_ids) for prompt in prompts)
    prompt_bytes = HIDDEN_STATES_A_TOKEN * hidden * itemsize
    row = (longest + new_tokens) * cache_bytes(model)
    memory = USED_SHARE * free_memory(device)
    if by_decoder:
        memory -= max(longest, DECODED_PROMPT_TOKENS) * prompt_bytes
    else:
        row += longest * prompt_bytes
    row += 3 * 4 * config.vocab_size  # logits, and copies of them in fp32
    fitting = max(1, int(memory // row))
    chosen = min(most, len(prompts), fitting)
    if fitting < min(most, len(prompts)):
        log.info("memory limits the answers that are generated at once", rows=chosen)
    return chosen


def cache_bytes(model: "PreTrainedModel | PeftModel") -> int:
    """Bytes of a token in the key-value cache."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    stored = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * stored * size * model.dtype.itemsize)
