"""The seam between the job and a model family: what a family has to know, and nothing else.

A family turns rows into tensors, names the modules that LoRA may adapt, and loads and writes its
checkpoints. Everything else (training, evaluation, proofs) is written once, against this seam.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from job.families.weight_files import Weights
from job.prep.rows import EncodedImage, Message, Row
from job.spec.types import DataSpec, LoraSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

IGNORED = -100
"""The label of a token that is not trained, as the cross-entropy of Transformers has it."""

Layout = Literal["vllm", "transformers"]
"""How a checkpoint's files are laid out: for vLLM, or for the classes of Transformers."""

SORTED_EXPERTS = "sorted_grouped_mm"
"""This project's own implementation of routed experts, by its name among those of Transformers."""

BY_BOUNDS = "by_bounds"
"""PyTorch's attention for sequences of unequal length, beside the names that a spec may choose."""

Batch = dict[str, "torch.Tensor"]


def host_keys(batch: Batch) -> tuple[str, ...]:
    """What the model reads in Python, value by value: on a GPU each look would wait for the device.

    Only where the batch brings the vision tower's indices too: other towers work them out where
    the grids are.
    """
    return ("image_grid_thw",) if "image_position_ids" in batch else ()


COUNTED = "counted_tokens"
"""In a training batch, beside what the model takes: how many supervised tokens count, a number."""
TOKENS = "tokens"
"""The same for all tokens of the rows that count, padding left out."""
FAILED = "failed"
"""In place of a training batch that cannot be made: the error, which is raised where it trains."""


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a training batch."""
    return {key: value for key, value in batch.items() if key not in (COUNTED, TOKENS)}


def to_device(batch: Batch, device: "torch.device") -> Batch:
    """A batch on the device, but for what belongs to the host."""
    host = host_keys(batch)
    return {k: v if k in host else v.to(device) for k, v in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as the job starts from it."""

    uri: str
    directory: Path
    config: dict[str, Any] = field(repr=False)
    """The checkpoint's `config.json`."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One row as tokens; images are still encoded bytes."""

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """`IGNORED` for every token that is not part of an answer; as long as `input_ids`."""
    images: tuple[EncodedImage, ...]

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, kw_only=True)
class RowSize:
    """What of a row decides how much memory it takes to train."""

    tokens: int
    image_tokens: int
    """Of them those of pictures, their brackets included."""
    trained: int
    patches: tuple[int, ...]
    """Of each picture, before they are merged."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """How a training step computes, as far as memory depends on it."""

    width: int
    """Bytes of an activation."""
    autocast: bool
    packed: bool
    checkpointing: bool
    attention: str
    experts: str
    rank: int
    """Of the adapter; 0 where the weights are trained themselves."""
    own_layers: bool
    """Whether the adapter's layers are this project's, which copy nothing; else PEFT's."""
    dropout: int = 0
    """Bytes that dropout notes for each element: 1 on a GPU, on a CPU an element's own."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that a step holds beside weights, gradients and optimizer."""

    activations: int
    attention: int
    log_probabilities: int
    """What of the logits the forward pass keeps."""
    logits: int
    """The logits with all that their backward pass adds."""
    made_again: int
    """The largest block that checkpointing computes again."""
    working: int
    """Temporary tensors of the widest layer."""

    @property
    def kept(self) -> int:
        """What there is when the forward pass is over."""
        return self.activations + self.attention + self.log_probabilities


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """One kind of what an adapter adapts, by full names."""

    name: str
    """For people: `language attention`."""
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.modules) + len(self.parameters)


@dataclass(frozen=True, kw_only=True)
class LoraTargets:
    """What an adapter will adapt."""

    groups: tuple[TargetGroup, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.modules)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.parameters)

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind: `{"language attention": 16, …}`."""
        return {group.name: len(group) for group in self.groups}


@dataclass(frozen=True, kw_only=True)
class AdapterServing:
    """What of an adapter vLLM serves as an adapter, beside the base."""

    servable: tuple[str, ...]
    """The kinds of targets that it does."""
    merged_only: tuple[str, ...]
    """The kinds, and settings, that only merged weights carry; any one of them is too many."""

    def __str__(self) -> str:
        if not self.merged_only:
            return "as adapter-vllm/ beside the base, or as merged/"
        served = (
            f"serves {', '.join(self.servable)}, and not" if self.servable else "does not serve"
        )
        return f"as merged/ only; of an adapter vLLM {served} {', '.join(self.merged_only)}"


class Family(Protocol):
    """A model family bound to one checkpoint's processor."""

    name: str
    processor: Any
    """The checkpoint's processor; its `tokenizer` decodes."""
    reads_images: bool
    packs: bool
    """Whether it trains without padding; else `pack` and `use_packed_step` are not called."""
    experts_on_gpu: str
    """The implementation of routed experts that is the fastest there, by its name in a spec."""
    served_with: tuple[str, ...]
    """What vLLM has to be told to read its merged weights."""
    adapter_served_with: tuple[str, ...]
    """The same for an adapter of `write_served_adapter`, besides `--enable-lora`."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens at which an answer ends, any of them."""

    @staticmethod
    def recognises(config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `config.json` is the family's; loads nothing heavy."""

    @staticmethod
    def known(uri: str) -> dict[str, Any] | None:
        """The `config.json` of a checkpoint that the family knows by name; None of any other."""

    @staticmethod
    def control_tokens(directory: Path) -> frozenset[str]:
        """What no text may hold, from the checkpoint's small files; loads nothing heavy.

        Raises InputError if they cannot be read.
        """

    @staticmethod
    def architecture(uri: str, config: dict[str, Any]) -> "PreTrainedModel":
        """The model of a `config.json` on the meta device: names and shapes, no weights.

        Raises InputError where the configuration cannot be read.
        """

    @classmethod
    def bind(cls, checkpoint: Checkpoint, data: DataSpec) -> "Family":
        """The family with the checkpoint's tokenizer and image processor."""

    def configuration(self) -> Any:
        """The checkpoint's configuration as Transformers has it; no model class is looked up."""

    def load(
        self, *, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        """The checkpoint's model, in evaluation mode."""

    def initialise(
        self, *, seed: int, dtype: "torch.dtype", device: "torch.device", **kwargs: Any
    ) -> "PreTrainedModel":
        """A model of the checkpoint's architecture with seeded random weights."""

    def skeleton(self) -> "PreTrainedModel":
        """The checkpoint's architecture on the meta device."""

    def encode(self, row: Row) -> Encoded:
        """The whole conversation, with the answers' tokens as labels.

        Raises DataError where the row cannot be told apart from the model's own control tokens.
        """

    def encode_prompt(
        self,
        row_id: str,
        messages: Sequence[Message],
        images: Sequence[EncodedImage],
        *,
        enable_thinking: bool = False,
    ) -> Encoded:
        """The conversation up to where the next answer begins; no labels."""

    def protects(self, token: int) -> bool:
        """Whether truncation must keep this token, as an image's tokens."""

    def row_size(self, encoded: Encoded) -> RowSize:
        """What of the row decides how much memory it takes; no image is decoded."""

    @staticmethod
    def saved(
        config: Any, trained: Collection[str], rows: Sequence[RowSize], step: Step
    ) -> Saved | None:
        """Bytes that a training step over the rows holds beside weights and optimizer.

        `trained` names the modules and parameters that are trained or adapted. None where the
        family cannot tell.
        """

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """A training batch: right-padded, with labels and every input that `forward` takes."""

    def pack(self, rows: Sequence[Encoded]) -> Batch:
        """A training batch without padding, for a model that `use_packed_step` was given."""

    @staticmethod
    def use_experts(model: "PreTrainedModel", name: str) -> None:
        """Lets an implementation of that name compute the routed experts.

        Raises ValueError where the model has none, or not so.
        """

    @staticmethod
    def use_packed_step(model: "PreTrainedModel", *, by_bounds: bool = True) -> None:
        """Lets the model take the batches of `pack` too; its weights and their names stay.

        `by_bounds`: attention by a kernel for sequences of unequal length, where there is one.
        """

    def collate_prompts(self, rows: Sequence[Encoded]) -> Batch:
        """A generation batch: left-padded, without labels."""

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """Whether the parameter of this name stays fp32 in every precision."""

    @staticmethod
    def lora_targets(model: "PreTrainedModel", lora: LoraSpec) -> LoraTargets:
        """The modules and parameters that the spec's toggles or names select in this model."""

    @staticmethod
    def adapter_serving(lora: LoraSpec) -> AdapterServing:
        """What of the spec's adapter vLLM can serve, from the spec alone."""

    @staticmethod
    def write_served_adapter(adapter: Path, directory: Path) -> None:
        """Writes a stored adapter, all of it servable, under the names that vLLM reads."""

    @staticmethod
    def set_router_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
        """Adds the router's auxiliary loss to the loss; None is the model's own weight, 0 off."""

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
        """Writes a checkpoint of the model's parameters, as they come, by their names in it.

        With what `save_settings` writes, after the weights; those are in the dtype to be stored.
        `finished` is told of each shard, see `shards.write`. Returns what of the base was repaired.
        """

    def save_settings(
        self, directory: Path, *, dtype: "torch.dtype", layout: Layout
    ) -> tuple[str, ...]:
        """Writes all of a checkpoint but its weights: configuration, processor and tokenizer.

        Returns what of the base's own settings was repaired. Raises InputError if they cannot be.
        """
