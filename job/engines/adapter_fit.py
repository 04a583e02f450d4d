"""Compares a stored adapter with the spec's `lora`, which has to describe it to continue it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from job import log
from job.engines.stored_adapter import StoredAdapter
from job.errors import Problem, SpecError
from job.families.lora.patterns import rank_of, scaling_of
from job.families.lora.target_groups import LoraTargets
from job.families.weight_files import shortened
from job.spec.foreign_names import quoted
from job.spec.types import LoraSpec, ModelSpec

Resolve = Callable[[LoraSpec], LoraTargets]
"""The targets of a spec's `lora` in the model."""

TOGGLES = (
    "finetune_vision_layers",
    "finetune_language_layers",
    "finetune_attention_modules",
    "finetune_mlp_modules",
)


def require_fit(stored: StoredAdapter, lora: LoraSpec, resolve: Resolve) -> None:
    """Raises one SpecError for all settings of `lora` that do not describe the adapter.

    Each names the value of both, and the line to write.
    """
    targets = resolve(lora)
    problems = [*_target_problems(stored, lora, targets, resolve)]
    problems += _saved_problems(stored, targets)
    problems += _setting_problems(stored, lora)
    if not problems:
        problems += _rank_problems(stored, lora, targets)
    elif rank := next(_rank_problems(stored, lora, stored.targets), None):
        problems.append(rank)
    if problems:
        raise SpecError.from_problems(problems)


def warn_of_other_base(stored: StoredAdapter, model: ModelSpec) -> None:
    """Warns if the adapter fits the model, but names another."""
    base = stored.config.base
    if base is None or _plain(base) == _plain(model.model_name_or_path):
        return
    log.warn(
        "the adapter's tensors fit the model, but it names another as its base",
        adapter=stored.uri,
        names=base,
        model=model.model_name_or_path,
    )


def _plain(uri: str) -> str:
    """A model's name without scheme and revision; of a path, its last part."""
    name = uri.removeprefix("hf://").removeprefix("file://").partition("@")[0].rstrip("/")
    return name if name.count("/") == 1 else name.rpartition("/")[2]


def _target_problems(
    stored: StoredAdapter, lora: LoraSpec, targets: LoraTargets, resolve: Resolve
) -> Iterator[Problem]:
    wanted, chosen = _adapted(stored.targets), _adapted(targets)
    if wanted == chosen:
        return
    lines = _lines_for(stored, resolve)
    only_stored, only_spec = sorted(wanted - chosen), sorted(chosen - wanted)
    parts = [
        f"{what} {len(names)} modules: {shortened(names, 3)}"
        for what, names in (
            ("the adapter also adapts", only_stored),
            ("the spec also selects", only_spec),
        )
        if names
    ]
    yield Problem(
        "$.lora",
        f"selects other modules than the adapter at {stored.uri} adapts: {'; '.join(parts)}",
        fix=lines or "name the adapter's modules as lora.target_modules",
        key="lora.target_modules",
    )


def _adapted(targets: LoraTargets) -> set[str]:
    """What is adapted; where gate and up have an adapter each, another thing than with one."""
    names = (*targets.modules, *targets.parameters)
    return {f"{name} (gate and up each)" if name in targets.gate_up else name for name in names}


def _lines_for(stored: StoredAdapter, resolve: Resolve) -> str | None:
    """The lines of `lora` that select the adapter's modules, if there are short ones."""
    for values in _candidates(stored):
        lora = replace(
            stored.lora,
            **{"target_modules": None, "target_parameters": None, **values},  # type: ignore[arg-type]
            rank_pattern=(),
            alpha_pattern=(),
        )
        try:
            same = _adapted(resolve(lora)) == _adapted(stored.targets)
        except SpecError:
            continue
        if same:
            lines = ", ".join(f"{key}: {quoted(value)}" for key, value in values.items())
            others = "remove the other keys that select modules"
            return f"write {lines}; {others}" if lines else others.replace("other ", "")
    return None


def _candidates(stored: StoredAdapter) -> Iterator[dict[str, object]]:
    """Settings that may select the adapter's modules: toggles, then names."""
    off = itertools.chain.from_iterable(_subsets(TOGGLES))
    toggles = [dict.fromkeys(names, False) for names in off]
    for experts, chosen in itertools.product(({}, {"finetune_experts": True}), toggles):
        yield {**experts, **chosen}
    endings = _endings(stored.targets.modules)
    parameters = tuple(
        sorted({".".join(name.split(".")[-2:]) for name in stored.targets.parameters})
    )
    more = {"target_parameters": parameters} if parameters else {}
    for names in (stored.config.target_modules, endings):
        if names:
            yield {"target_modules": names, **more}
            yield {"target_modules": names}
            for value in (False, True):
                yield {"target_modules": names, "finetune_experts": value}


def _subsets(names: Sequence[str]) -> Iterator[Iterator[tuple[str, ...]]]:
    for count in range(len(names)):
        yield itertools.combinations(names, count)


def _endings(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def _saved_problems(stored: StoredAdapter, targets: LoraTargets) -> Iterator[Problem]:
    wanted, chosen = {*stored.targets.saved_modules}, {*targets.saved_modules}
    if wanted == chosen:
        return
    names = [_short(name) for name in stored.targets.saved_modules]
    yield Problem(
        "$.lora.modules_to_save",
        f"the adapter at {stored.uri} has "
        + (f"{', '.join(sorted(wanted))} in full" if wanted else "no modules in full"),
        value=quoted(sorted(chosen)) if chosen else "null",
        fix=f"write modules_to_save: [{', '.join(names)}]" if wanted else "remove the line",
        key="lora.modules_to_save",
    )


def _short(name: str) -> str:
    """The last part of a name, or its last three inside a numbered layer."""
    parts = name.split(".")
    return ".".join(parts[-3:]) if len(parts) > 3 and parts[-2].isdigit() else parts[-1]


def _setting_problems(stored: StoredAdapter, lora: LoraSpec) -> Iterator[Problem]:
    for key in ("use_dora", "use_rslora", "bias"):
        theirs, ours = getattr(stored.lora, key), getattr(lora, key)
        if theirs != ours:
            yield Problem(
                f"$.lora.{key}",
                f"must be {quoted(theirs)}, as in the adapter at {stored.uri}",
                value=quoted(ours),
                fix=f"write {key}: {quoted(theirs)}",
                key=f"lora.{key}",
            )


def _rank_problems(
    stored: StoredAdapter, lora: LoraSpec, targets: LoraTargets
) -> Iterator[Problem]:
    """The first module whose rank or scaling differs, with the lines for all of them."""
    names = (*targets.modules, *targets.parameters)
    for name in names:
        theirs, ours = rank_of(name, stored.lora), rank_of(name, lora)
        if theirs != ours:
            yield Problem(
                "$.lora.r",
                f"the adapter at {stored.uri} has rank {theirs} at {name}",
                value=str(ours),
                fix=f"write {_rank_lines(stored)}",
                key="lora.r",
            )
            return
    for name in names:
        if scaling_of(name, stored.lora) != scaling_of(name, lora):
            yield Problem(
                "$.lora.lora_alpha",
                f"the adapter at {stored.uri} is scaled by {scaling_of(name, stored.lora):g} at "
                f"{name}, the spec's by {scaling_of(name, lora):g}",
                value=str(lora.lora_alpha),
                fix=f"write {_rank_lines(stored)}",
                key="lora.lora_alpha",
            )
            return


def _rank_lines(stored: StoredAdapter) -> str:
    """The lines of `lora` for the adapter's ranks: its own patterns if they say the same."""
    config, lora = stored.config, stored.lora
    own = replace(
        lora,
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=tuple((pattern, int(alpha)) for pattern, alpha in config.alpha_pattern),
    )
    names = (*stored.targets.modules, *stored.targets.parameters)
    same = all(
        rank_of(name, own) == rank_of(name, lora)
        and scaling_of(name, own) == scaling_of(name, lora)
        for name in names
    )
    best = own if same else lora
    lines = [f"r: {best.r}", f"lora_alpha: {best.lora_alpha}"]
    lines += [
        f"{key}: {quoted(dict(patterns))}"
        for key in ("rank_pattern", "alpha_pattern")
        if (patterns := getattr(best, key))
    ]
    return ", ".join(lines)
