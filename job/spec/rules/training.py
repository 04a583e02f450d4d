"""Checks of the train, runtime and eval sections."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.answer_kinds import METRICS
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, finding

_PACKED = ("auto", "sdpa")
"""The attention implementations that compute rows without padding."""
_UNSHARDED_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
"""Optimizers that raise an error for sharded weights."""


def _training_has_steps(at: View) -> Iterator[Finding]:
    if at("train.max_steps") == 0 and at("reinforce") is None:
        yield finding(
            "train.max_steps", "must not be 0", "write -1 to leave it to train.num_train_epochs"
        )
    elif at("train.max_steps") == -1 and at("train.num_train_epochs") == 0:
        yield finding(
            "train.num_train_epochs",
            "must be greater than 0 if train.max_steps is -1: nothing would be trained",
            "set train.num_train_epochs: 1, or train.max_steps",
        )


def _warmup_ends(at: View) -> Iterator[Finding]:
    steps, warmup = at("train.max_steps"), at("train.warmup_steps")
    if warmup == keys.default("train.warmup_steps") or at("train.lr_scheduler_type") == "constant":
        return
    if at.from_command_line("train.max_steps") and not at.from_command_line("train.warmup_steps"):
        return  # a short trial of a longer training
    if 0 < steps < warmup:
        yield finding(
            "train.warmup_steps",
            f"must not be greater than train.max_steps, which is {steps}: the learning rate would "
            "never reach train.learning_rate",
            f"write {max(1, steps // 10)}, or raise train.max_steps",
        )


def _no_float16_training(at: View) -> Iterator[Finding]:
    if at("model.dtype") == "float16":
        yield finding(
            "model.dtype",
            "must not be float16: training diverges without loss scaling",
            "set model.dtype: bfloat16; export.merged.dtype: float16 still exports float16",
        )


def _cpu_supports_the_kernels(at: View) -> Iterator[Finding]:
    if at("runtime.accelerator") != "cpu":
        return
    if at("train.optim").endswith("8bit"):
        yield _cpu("train.optim", "adamw_torch")
    if at("model.attn_implementation") == "flash_attention_2":
        yield _cpu("model.attn_implementation", "sdpa")


def _cpu(dotted: str, substitute: str) -> Finding:
    return finding(
        dotted,
        "does not run on a CPU, which runtime.accelerator selects",
        f"write {substitute}, or auto",
    )


def _fsdp2_requires_padding_free(at: View) -> Iterator[Finding]:
    if at("runtime.distributed") == "fsdp2" and not at("train.padding_free"):
        yield finding(
            "train.padding_free",
            "must be true if runtime.distributed is fsdp2: without it, a process whose rows have "
            "no image would block the others",
            "remove the line, or set runtime.distributed: ddp",
        )
    if at("runtime.distributed") == "fsdp2" and at("model.attn_implementation") not in _PACKED:
        yield finding(
            "model.attn_implementation",
            "must be auto or sdpa if runtime.distributed is fsdp2, which requires rows without "
            "padding",
            "write auto, or set runtime.distributed: ddp",
        )


def _fsdp2_excludes_optimizers(at: View) -> Iterator[Finding]:
    if at("runtime.distributed") != "fsdp2":
        return
    if at("train.optim") in _UNSHARDED_OPTIMIZERS:
        yield finding(
            "train.optim",
            "does not update sharded weights, which runtime.distributed: fsdp2 trains",
            "write adamw_torch_fused (adamw_torch on a CPU), or auto; its states are divided among "
            "the processes",
        )
    if at("lora.method") == "full" and at("train.optim") == "adafactor":
        yield finding(
            "train.optim",
            "must not be adafactor if runtime.distributed is fsdp2 and lora.method is full: "
            "checkpoints cannot store its states in shards",
            "write adamw_torch_fused (adamw_torch on a CPU), or auto",
        )


def _fsdp2_shards_weights_of_one_dtype(at: View) -> Iterator[Finding]:
    sharded = at("runtime.distributed") == "fsdp2" and at("lora.method") == "full"
    if sharded and at("model.dtype") == "bfloat16":
        yield finding(
            "model.dtype",
            "must be auto or float32 if runtime.distributed is fsdp2 and lora.method is full: this "
            "version shards weights of one dtype, and some stay in fp32",
            "remove the line: it computes in bf16 anyway, and updates are often too small for "
            "bf16 weights",
        )


def _fsdp2_excludes_compile(at: View) -> Iterator[Finding]:
    if at("train.torch_compile") is True and at("runtime.distributed") == "fsdp2":
        yield finding(
            "train.torch_compile",
            "must be false if runtime.distributed is fsdp2: this version does not compile sharded "
            "blocks",
            "remove the line, or set runtime.distributed: ddp",
        )


def _compile_excludes_checkpointing(at: View) -> Iterator[Finding]:
    if at("train.torch_compile") is True and at("train.gradient_checkpointing") is True:
        yield finding(
            "train.torch_compile",
            "must be false if train.gradient_checkpointing is true: recomputation may run another "
            "compiled version of a block, which saves other tensors",
            "remove one of the lines: auto chooses",
        )


def _unsloth_trains_adapters_on_one_gpu(at: View) -> Iterator[Finding]:
    if at("model.engine") != "unsloth":
        return
    if at("runtime.accelerator") == "cpu":
        yield _cpu("model.engine", "transformers")
    if at("runtime.distributed") in ("ddp", "fsdp2"):
        yield _not_by_unsloth("runtime.distributed", "none", "which trains in one process")
    if at("lora.method") == "full":
        yield _not_by_unsloth("lora.method", "lora", "which trains only adapters in this version")
    if at("lora.use_dora"):
        yield _not_by_unsloth("lora.use_dora", "false", "which supports only plain adapters")
    if at("train.neftune_noise_alpha") is not None:
        yield finding(
            "train.neftune_noise_alpha",
            "must be null if model.engine is unsloth, whose forward passes add no noise",
            "remove the line, or set model.engine: transformers",
        )
    if at("model.init") == "random":
        yield _not_by_unsloth("model.init", "pretrained", "which does not initialize weights")


def _not_by_unsloth(dotted: str, wanted: str, why: str) -> Finding:
    return finding(
        dotted,
        f"must be {wanted} if model.engine is unsloth, {why}",
        f"write {wanted}, or set model.engine: transformers",
    )


def _learning_rates_have_weights(at: View) -> Iterator[Finding]:
    """Each learning rate applies to weights that are trained, as far as the spec alone can tell."""
    if at("train.vision_tower_lr") is None or at("lora.method") == "full":
        return
    if at("lora.target_modules") is None and not at("lora.finetune_vision_layers"):
        yield finding(
            "train.vision_tower_lr",
            "does not apply if lora.finetune_vision_layers is false: the vision tower is frozen",
            "remove the line, or set lora.finetune_vision_layers: true",
        )


def _loraplus_requires_adapters(at: View) -> Iterator[Finding]:
    if at("train.loraplus_lr_ratio") is not None and at("lora.method") == "full":
        yield finding(
            "train.loraplus_lr_ratio",
            "does not apply if lora.method is full, which trains no adapter",
            "remove the line, or set lora.method: lora",
        )


def _rates_below_one(at: View) -> Iterator[Finding]:
    ratio = at("train.loraplus_lr_ratio")
    for key in ("learning_rate", "vision_tower_lr"):
        rate = at(f"train.{key}")
        if ratio is not None and rate is not None and rate * ratio >= 1:
            yield finding(
                "train.loraplus_lr_ratio",
                f"times train.{key} must be below 1, but is {rate * ratio:g}: the learning rate of "
                "B matrices",
                "write 16 or less, and lower the learning rate",
            )


def _sampling_options_require_sampling(at: View) -> Iterator[Finding]:
    if at("eval.generation.do_sample"):
        return
    for name, neutral in (("temperature", 1.0), ("min_p", 0.0)):
        if at(f"eval.generation.{name}") != neutral:
            yield finding(
                f"eval.generation.{name}",
                "requires do_sample: true: greedy decoding ignores it",
                "remove the line, or set eval.generation.do_sample: true",
            )


def _metrics_apply_to_the_answers(at: View) -> Iterator[Finding]:
    answer = at("eval.answer")
    applicable = METRICS[answer]
    for number, name in enumerate(at("eval.metrics") or ()):
        if name not in applicable:
            others = [kind for kind, metrics in METRICS.items() if name in metrics]
            yield finding(
                f"eval.metrics[{number}]",
                f"does not apply to eval.answer: {answer}, whose metrics are "
                f"{', '.join(applicable)}",
                f"use one of these, or set eval.answer: {' or '.join(others)}",
            )


def _labels_are_compared_by_image(at: View) -> Iterator[Finding]:
    if at("eval.answer") == "label" and at("data.leakage_by") == "image_and_answer":
        yield finding(
            "data.leakage_by",
            "must be auto or image if eval.answer is label: otherwise rows of one class count as "
            "duplicates, and whole classes are held out",
            "remove the line",
        )


RULES: tuple[Rule, ...] = (
    _training_has_steps,
    _warmup_ends,
    _no_float16_training,
    _cpu_supports_the_kernels,
    _fsdp2_requires_padding_free,
    _fsdp2_excludes_optimizers,
    _fsdp2_shards_weights_of_one_dtype,
    _fsdp2_excludes_compile,
    _compile_excludes_checkpointing,
    _unsloth_trains_adapters_on_one_gpu,
    _learning_rates_have_weights,
    _loraplus_requires_adapters,
    _rates_below_one,
    _sampling_options_require_sampling,
    _metrics_apply_to_the_answers,
    _labels_are_compared_by_image,
)
