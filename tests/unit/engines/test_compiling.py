"""Compiled blocks compute what eager ones do, and are recompiled a bounded number of times."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from job import families
from job.cli.app import app
from job.engines.compiling import MAX_RECOMPILES, compile_blocks, require
from job.errors import SpecError
from job.families.base import SORTED_EXPERTS
from job.families.encoded import Encoded
from job.families.ernie45_vl.packed.experts import routed_experts
from job.families.lora.linear import use_lora_linear
from job.prep.rows import Row
from job.spec.load import load_spec
from tests.jobs import ROOT, sets, small_run
from tests.models import BUILDERS
from tests.unit.families.test_packed_step import image, row

TINY = ROOT / "job" / "families" / "builtin" / "ernie-vl-tiny"
SPEC = load_spec((ROOT / "specs/latex.yaml").read_text(), "latex.yaml", environ={}).spec
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(count: int, *, images: bool) -> list[list[Row]]:
    """Of one row and of several, of many lengths, with images of many sizes."""
    return [
        [
            row(
                "x+" * (1 + (5 * n + 3 * k) % 11),
                *([image(56 + 28 * (n % 4), 56 + 28 * (k % 3))] if images else []),
            )
            for k in range(1 + n % 4)
        ]
        for n in range(count)
    ]


class Pair:
    """A family's model with an adapter, eager and compiled."""

    def __init__(self, name: str, place: Path, *, backend: str = "inductor") -> None:
        family = self._family(name, place)
        model = family.initialize(seed=3, dtype=torch.float32, device=CPU)
        self._collate: Callable[[list[Encoded]], Any] = family.collate
        if family.supports_packing:
            family.use_packed_step(model)
            self._collate = family.pack
        self.family = family
        self.plain = self._adapted(model)
        self.compiled = copy.deepcopy(self.plain)
        self.blocks = compile_blocks(self.compiled, backend)
        assert len(self.blocks) > 1

    def losses(self, rows: list[Row]) -> tuple[float, float]:
        """Of both, after a backward pass each; compares the gradients too."""
        batch = self._collate([self.family.encode(each) for each in rows])
        found, grads = [], []
        for model in (self.plain, self.compiled):
            model.zero_grad()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            found.append(float(loss.detach()))
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)
        return found[0], found[1]

    @staticmethod
    def _family(name: str, place: Path) -> families.Family:
        if name == "ernie":
            checkpoint = families.read_checkpoint("builtin://ernie-vl-tiny", TINY)
        else:
            BUILDERS[name](place)
            checkpoint = families.read_checkpoint(str(place), place)
        return families.bind(checkpoint, SPEC.model, SPEC.data)

    def _adapted(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(5)
        targets = self.family.lora_targets(model, replace(SPEC.lora, target_modules=None))
        lora = LoraConfig(r=4, target_modules=list(targets.modules), init_lora_weights=False)
        adapted = get_peft_model(model.requires_grad_(False), lora).train()
        assert use_lora_linear(adapted)
        return adapted


def same(pair: Pair, rows: list[Row]) -> None:
    plain, compiled = pair.losses(rows)
    assert compiled == pytest.approx(plain, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "ernie", "qwen_vl"])
def test_new_sizes_are_compiled_a_bounded_number_of_times(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path, backend="eager")
    many = batches(20, images=name != "llama")
    for rows in many[:12]:
        same(pair, rows)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled <= MAX_RECOMPILES
    for rows in many[12:]:
        same(pair, [*rows, *rows])
    # Qwen's tower computes images one by one: each number of them is a graph of its own. So is
    # ERNIE's last layer, which continues with supervised tokens only.
    more = {"llama": 4, "ernie": 5, "qwen_vl": 8}[name]
    assert counters["stats"]["unique_graphs"] - compiled <= more


def test_sizes_that_are_equal_by_chance_are_not_taken_for_one(tmp_path: Path) -> None:
    pair = Pair("ernie", tmp_path, backend="eager")
    many = [row("x+" * (1 + n % 9), image(56, 56)) for n in range(70)]
    half_a_head = pair.plain.config.text_config.head_dim // 2
    same(pair, many[:half_a_head])
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    same(pair, many[: half_a_head + 3])
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(
    "adapted",
    [
        pytest.param(False, marks=pytest.mark.slow, id="frozen"),
        pytest.param(True, id="with an adapter"),
    ],
)
def test_sorted_experts_are_compiled_in_fp32_too(adapted: bool) -> None:
    checkpoint = families.read_checkpoint("builtin://ernie-vl-tiny", TINY)
    family = families.bind(checkpoint, SPEC.model, SPEC.data)
    model: Any = family.initialize(seed=3, dtype=torch.float32, device=CPU).requires_grad_(False)
    family.set_experts_implementation(model, SORTED_EXPERTS)
    if adapted:
        from peft import LoraConfig, get_peft_model

        names = [f"experts.{each}_proj" for each in ("gate_up", "down")]
        lora = LoraConfig(r=4, target_parameters=names, target_modules=[], init_lora_weights=False)
        model = get_peft_model(model, lora).get_base_model()
    sparse = model.model.language_model.layers[1].mlp.text_moe
    trained = [p for p in sparse.parameters() if p.requires_grad]
    assert len(trained) == (4 if adapted else 0)
    tokens = torch.randn(9, model.config.text_config.hidden_size)
    _, weights, chosen = sparse.gate(tokens)
    found = []
    for compute in (routed_experts, torch.compile(routed_experts, backend="aot_eager")):
        given = tokens.clone().requires_grad_()
        sparse.zero_grad()
        output = compute(sparse.experts, given, chosen, weights)
        output.square().sum().backward()
        grads = [each.grad for each in trained]
        assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads)
        found.append((output, given.grad, *grads))
    torch.testing.assert_close(*found)


def test_names_stay_and_released_blocks_run_eagerly_again(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path, backend="eager")
    same(pair, [row("a")])
    assert list(pair.compiled.state_dict()) == list(pair.plain.state_dict())
    compiled = counters["stats"]["unique_graphs"]
    pair.blocks.release()
    torch._dynamo.reset()
    same(pair, [row("b+c")])
    assert counters["stats"]["unique_graphs"] == compiled > 0


def test_an_evaluation_between_steps_compiles_nothing(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path, backend="eager")
    same(pair, [row("a")])
    compiled = counters["stats"]["unique_graphs"]
    batch = pair.family.collate([pair.family.encode(row("b+c"))])
    pair.compiled.eval()
    with torch.no_grad(), pair.blocks.eager():
        pair.compiled(**batch, use_cache=False)
    pair.compiled.train()
    assert counters["stats"]["unique_graphs"] == compiled > 0
    assert all(block._compiled_call_impl is not None for block in pair.blocks.blocks)


@pytest.mark.slow(minutes=2)
@pytest.mark.parametrize("name", ["ernie", "llama", "qwen_vl"])
def test_losses_and_gradients_are_those_of_eager_blocks(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    many = batches(5, images=name != "llama")
    for rows in (many[1], many[2], many[4]):  # of two rows, three and one
        same(pair, rows)


# Torch restores its settings itself; pytest would leave this one unset for all later tests.
@config.patch("cpp.cxx", (None, "no-compiler-of-this-name"))
def test_a_missing_compiler_is_reported_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"\$\.train\.torch_compile: is not possible") as refused:
        require(CPU)
    [problem] = refused.value.problems
    assert "No working C++ compiler found" in problem.message
    assert "set train.torch_compile: auto or false" in str(problem.fix)
    given = small_run(
        str(tmp_path / "out"),
        *sets({"train.torch_compile": "true", "train.gradient_checkpointing": "false"}),
        cache=tmp_path / "cache",
    )
    with pytest.raises(SpecError, match=r"\$\.train\.torch_compile"):
        app(given, standalone_mode=False)
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.slow
def test_the_trial_is_compiled_where_the_blocks_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container /tmp is often mounted noexec (docker's --tmpfs): nothing loads from there."""
    log, compiler = tmp_path / "log", tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch("cpp.cxx", (None, str(compiler))):
        require(CPU)
    built = re.findall(r"-o (\S+\.so)", log.read_text())
    assert built
    assert all(file.startswith(f"{tmp_path}/cache/") for file in built), built
    assert list((tmp_path / "cache").iterdir()) == []
