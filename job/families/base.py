"""The interface between the job and a model family.

A family recognizes its checkpoints, builds their models, turns rows into batches, selects LoRA
targets, and writes checkpoints. Training, evaluation, export and planning use only `Family`. It
combines ten protocols; their docstrings name their callers.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from job.families.activation_memory import ActivationMemory, StepSettings
from job.families.batches import PackedBatch, PaddedBatch
from job.families.encoded import Encoded, RowSize
from job.families.four_bit import FourBit
from job.families.lora.target_groups import AdapterServing, LoraTargets
from job.families.packed_shape import PackedShape
from job.families.step_flops import ForwardFlops
from job.families.weight_files import Weights
from job.prep.rows import EncodedImage, Message, Row
from job.spec.types import DataSpec, LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from job.families.stored_weights import StoredWeights

Layout = Literal["vllm", "transformers"]
"""The file layout of a written checkpoint: as vLLM or as Transformers reads it."""

SORTED_EXPERTS = "sorted_grouped_mm"
"""This project's implementation of routed experts, as registered with Transformers."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The checkpoint that a job starts from."""

    uri: str
    directory: Path
    config: dict[str, Any] = field(repr=False)
    """Its `config.json`."""
    chat_template: str | None = field(default=None, repr=False)
    """The spec's template, which replaces the checkpoint's own."""


class Processor(Protocol):
    """The part of a checkpoint's processor that the rest of the job uses."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...


class Recognition(Protocol):
    """Recognizes the family's checkpoints. Called by `job.families` and prep; imports are light."""

    name: str
    """The value of `model.family` in the spec."""

    @staticmethod
    def recognizes(config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `config.json` belongs to the family."""

    @staticmethod
    def known_config(uri: str) -> dict[str, Any] | None:
        """The `config.json` of a checkpoint that the family knows by URI; None for others."""

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        """The control tokens, which no row may contain, from the checkpoint's small files.

        Raises InputError if they cannot be read.
        """

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Family":
        """The family bound to the checkpoint's tokenizer and image processor."""


class ModelBuilding(Protocol):
    """Builds and loads models. Called by the engines and planning."""

    experts_on_gpu: str
    """The fastest implementation of routed experts on GPUs, by its name in the spec."""

    @staticmethod
    def architecture(uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        """The model of a `config.json` on the meta device: names and shapes, no weights.

        Raises InputError if the configuration cannot be read.
        """

    def meta_model(self) -> "PreTrainedModel":
        """`architecture` of the bound checkpoint."""

    def configuration(self) -> "PreTrainedConfig":
        """The checkpoint's configuration, as Transformers' class."""

    def load(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
        four_bit: FourBit | None = None,
    ) -> "PreTrainedModel":
        """The checkpoint's model, in evaluation mode; with `four_bit`, the weights of
        `four_bit.packed_weights` are packed."""

    def without_weights(
        self,
        *,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        """What `load` returns, with placeholders of the weights (`job.families.placeholders`), to
        be sharded before `stored_weights` are read. Raises what `load` raises."""

    def stored_weights(self) -> "StoredWeights":
        """The checkpoint's weights, to be read one by one; a context manager."""

    def initialize(
        self,
        *,
        seed: int,
        dtype: "torch.dtype",
        device: "torch.device",
        attn_implementation: str | None = None,
    ) -> "PreTrainedModel":
        """The checkpoint's architecture with seeded random weights."""

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """Whether the parameter stays fp32 whatever the model's dtype."""

    @staticmethod
    def set_experts_implementation(model: "PreTrainedModel", name: str) -> None:
        """Selects the implementation of routed experts.

        Raises ValueError if the model has no routed experts, or not this implementation.
        """

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        """Sets the weight of the router auxiliary loss; None keeps the model's, 0 turns it off."""


class RowEncoding(Protocol):
    """Rows to tokens, tokens to tensors. Called by training, evaluation and the export proof."""

    reads_images: bool

    @property
    def processor(self) -> Processor:
        """The checkpoint's processor."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer."""

    def require_chat_template(self) -> None:
        """Raises DataError if the chat template cannot show, cut or end a conversation."""

    def require_system_role(self, system: str) -> None:
        """Raises DataError if the chat template does not show this system prompt."""

    def encode(self, row: Row) -> Encoded:
        """Tokenizes the whole conversation; answers are supervised.

        Raises DataError if the row contains control tokens, or if its answers cannot be located.
        """

    def encode_prompt(
        self,
        row_id: str,
        messages: Sequence[Message],
        images: Sequence[EncodedImage],
        *,
        enable_thinking: bool = False,
    ) -> Encoded:
        """Tokenizes the conversation up to the next answer; nothing is supervised."""

    def is_image_token(self, token: int) -> bool:
        """Whether the token belongs to an image, or starts or ends one: truncation keeps those."""

    def row_size(self, encoded: Encoded) -> RowSize:
        """The row's sizes; decodes no image."""

    def collate(self, rows: Sequence[Encoded]) -> PaddedBatch:
        """A training batch: right-padded, with labels and all inputs of `forward`."""

    def collate_prompts(self, rows: Sequence[Encoded]) -> PaddedBatch:
        """A generation batch: left-padded, without labels."""


class PackedTraining(Protocol):
    """Computing without padding. Called by training and reinforcement if the spec sets
    `train.padding_free`, and by evaluation."""

    supports_packing: bool
    """Whether the family has a packed step; if not, nothing else of this protocol is called."""

    def pack(
        self,
        rows: Sequence[Encoded],
        bucket: PackedShape | None = None,
        *,
        images_once: bool = False,
    ) -> PackedBatch:
        """A training batch without padding, or padded to a bucket, for a model on which
        `use_packed_step` was called.

        Without a bucket, `images_once` lets rows share an image that is the same object: the vision
        tower computes it once, and the gradient of its weights is the sum over its uses. Not by
        default: a batch of one row several times also measures what different rows would take.
        """

    def bucket(self, shapes: Sequence[PackedShape]) -> PackedShape:
        """The smallest shape that batches of all these shapes can be padded to."""

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, varlen: bool = True) -> None:
        """Makes the model accept packed batches too; weights and their names do not change.

        It returns their loss or, with `returns_logits=True`, the logits (1, S, V) of the supervised
        tokens, from which answers are scored.
        `varlen` allows PyTorch's variable-length attention, if the device supports it.
        """

    @staticmethod
    def try_packed_step(model: "PreTrainedModel | PeftModel") -> bool:
        """Calls `use_packed_step` on a model, or the one inside an adapter, and returns True.

        Returns False, and changes nothing, if the family has no packed step, or none for a model
        that is changed or sharded like this one.
        """


class Decoder(Protocol):
    """Generates for B rows at once, one token of each per step; B changes as rows come and go.

    The tokens are the most likely ones. They are chosen on the device, so that the host need not
    read them before the next step.
    """

    slots: int
    """The most rows at once."""

    @property
    def tokens(self) -> "torch.Tensor":
        """(B,): each row's next token, the most likely one; the next call overwrites it.

        A caller may write another token into it, which the next step then appends.
        """

    def prefill(self, prompts: "Sequence[Encoded]") -> "torch.Tensor":
        """Adds a row for each of N prompts; returns the logits (N, V) of their next tokens."""

    def step(self) -> "torch.Tensor":
        """Appends its token to each row; returns the logits (B, V) of the next ones, which the
        next call overwrites."""

    def drop(self, row: int) -> None:
        """Removes a row; the last one takes its number."""


class Generation(Protocol):
    """Generation faster than Transformers' `generate`. Called by evaluation, reinforcement and the
    export proof."""

    @staticmethod
    def has_decoder(model: "PreTrainedModel | PeftModel") -> bool:
        """Whether `decoder` may be called: not if the family has none, or none for a model that is
        changed or sharded like this one."""

    def decoder(
        self, model: "PreTrainedModel | PeftModel", *, slots: int, capacity: int
    ) -> Decoder:
        """A decoder for at most `slots` rows of at most `capacity` tokens, prompts included.

        The model must not change while the decoder is used.
        """


class LoraSupport(Protocol):
    """Selects LoRA targets. Called by training and planning."""

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        """The modules and parameters that the spec's toggles or names select in the model."""


class MemoryEstimate(Protocol):
    """Estimates the memory of a training step. Called by planning."""

    @staticmethod
    def activation_memory(
        config: "PreTrainedConfig",
        trained: Collection[str],
        rows: Sequence[RowSize],
        step: StepSettings,
    ) -> ActivationMemory | None:
        """The memory of a training step on these rows; None if the family cannot estimate it.

        `trained` names the modules and parameters that are trained or adapted.
        """


class ComputeEstimate(Protocol):
    """Counts the floating-point operations of a training. Called by training and planning."""

    @staticmethod
    def forward_flops(model: "PreTrainedModel", rows: Sequence[RowSize]) -> ForwardFlops:
        """The operations of a forward pass over the rows.

        `model` may have adapters, which do not count, and be on the meta device.
        """


class CheckpointWriting(Protocol):
    """Writes checkpoints. Called by training (full fine-tuning) and export."""

    def save(
        self,
        model: "PreTrainedModel",
        weights: Weights,
        directory: Path,
        *,
        dtype: "torch.dtype",
        max_shard_size: str,
        layout: Layout,
        finished: Callable[[Path], None] | None = None,
    ) -> tuple[str, ...]:
        """Writes a checkpoint: the weights, then the files of `save_settings`.

        `weights` have the model's names and the dtype to store. `finished` is called for every
        shard, see `weight_writing.write`. Returns what was repaired.
        """

    def save_processor(self, directory: Path) -> None:
        """Writes the processor, for `AutoProcessor` or `AutoTokenizer`: the tokenizer, the chat
        template and the settings of images."""

    def write_chat_template(self, directory: Path, *, layout: Layout) -> None:
        """Writes the chat template alone, as `chat_template.jinja`."""

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        """Writes a checkpoint without weights: configuration, processor and tokenizer.

        Returns descriptions of the repairs to the base's settings. Raises InputError if they cannot
        be repaired.
        """

    @staticmethod
    def own_layout(config: dict[str, Any]) -> Layout | None:
        """The layout of a checkpoint with this `config.json`; None if the two are the same.

        If they differ, vLLM reads only `vllm`, and the classes of Transformers `transformers`.
        """


class Serving(Protocol):
    """Serving with vLLM. Called by export, its proof, and the Kubernetes manifests."""

    vllm_arguments: tuple[str, ...]
    """Arguments that `vllm serve` needs for the family's merged weights."""
    vllm_adapter_arguments: tuple[str, ...]
    """Further arguments that it needs for an adapter, besides `--enable-lora`."""
    served_empty_thoughts: str
    """What requests have to give as the thoughts of earlier answers without any, so that the chat
    template renders them as in training; empty if nothing."""

    @staticmethod
    def adapter_serving(lora: LoraSpec) -> AdapterServing:
        """Which parts of the spec's adapter vLLM can serve; needs no model."""

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        """Writes a stored adapter, all of it servable, with the tensor names that vLLM reads."""


class Family(
    Recognition,
    ModelBuilding,
    RowEncoding,
    PackedTraining,
    Generation,
    LoraSupport,
    MemoryEstimate,
    ComputeEstimate,
    CheckpointWriting,
    Serving,
    Protocol,
):
    """A model family. An instance is bound to one checkpoint's processor."""
