"""What an adapter adapts, in groups, and which of it vLLM can serve."""

from dataclasses import dataclass

SAVED = "modules in full"
"""The name under which `LoraTargets.counts` counts the saved modules."""


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """LoRA targets of one kind, by full name."""

    name: str
    """As reports show it, for example `language attention`."""
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    gate_up: tuple[str, ...] = ()
    """Those of the parameters in which gate and up have an adapter each; see `lora.gate_up`."""

    def __len__(self) -> int:
        return len(self.modules) + len(self.parameters)


@dataclass(frozen=True, kw_only=True)
class LoraTargets:
    """All modules and parameters that an adapter adapts, and modules that train beside it."""

    groups: tuple[TargetGroup, ...]
    saved_modules: tuple[str, ...] = ()
    """Modules that are trained in full and stored with the adapter, by full name."""
    ties_embeddings: bool = False
    """Whether the output layer trains with the embeddings, which `saved_modules` has, as one."""

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.modules)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.parameters)

    @property
    def gate_up(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.gate_up)

    @property
    def counts(self) -> dict[str, int]:
        """The size of each group: `{"language attention": 16, …}`."""
        groups = {group.name: len(group) for group in self.groups}
        return groups | ({SAVED: len(self.saved_modules)} if self.saved_modules else {})


@dataclass(frozen=True, kw_only=True)
class AdapterServing:
    """Which parts of an adapter vLLM can serve without merging."""

    servable: tuple[str, ...]
    """Names of target groups."""
    merged_only: tuple[str, ...]
    """Target groups and settings that require merged weights; if any, the whole adapter does."""

    def __str__(self) -> str:
        if not self.merged_only:
            return "as adapter-vllm/ beside the base, or as merged/"
        served = (
            f"serves {', '.join(self.servable)}, and not" if self.servable else "does not serve"
        )
        return f"as merged/ only; of an adapter vLLM {served} {', '.join(self.merged_only)}"
