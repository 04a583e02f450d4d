"""How a run trains and answers: what of `train`, `runtime` and `eval` makes no sense together."""

from collections.abc import Iterator

from job.spec import keys
from job.spec.answer_kinds import METRICS
from job.spec.problems import Finding
from job.spec.rules.view import Rule, View, find


def _training_has_a_length(at: View) -> Iterator[Finding]:
    if at("train.max_steps") == 0:
        yield find(
            "train.max_steps", "must not be 0", "write -1 to leave it to train.num_train_epochs"
        )
    elif at("train.max_steps") == -1 and at("train.num_train_epochs") == 0:
        yield find(
            "train.num_train_epochs",
            "must be greater than 0 where train.max_steps is -1: nothing would be trained",
            "set train.num_train_epochs: 1, or train.max_steps",
        )


def _warm_up_ends(at: View) -> Iterator[Finding]:
    steps, warmup = at("train.max_steps"), at("train.warmup_steps")
    if warmup == keys.default("train.warmup_steps") or at("train.lr_scheduler_type") == "constant":
        return
    if at.by_option("train.max_steps") and not at.by_option("train.warmup_steps"):
        return  # a few steps of a longer training, to try it
    if 0 < steps < warmup:
        yield find(
            "train.warmup_steps",
            f"must not be greater than train.max_steps, which is {steps}: the learning rate would "
            "never reach train.learning_rate",
            f"write {max(1, steps // 10)}, or raise train.max_steps",
        )


def _float16_does_not_train(at: View) -> Iterator[Finding]:
    if at("model.dtype") == "float16":
        yield find(
            "model.dtype",
            "must not be float16: training in it without loss scaling diverges",
            "set model.dtype: bfloat16; export.merged.dtype: float16 still stores float16",
        )


def _cpu_has_what_it_needs(at: View) -> Iterator[Finding]:
    if at("runtime.accelerator") != "cpu":
        return
    if at("train.optim").endswith("8bit"):
        yield _cpu("train.optim", "adamw_torch")
    if at("model.attn_implementation") == "flash_attention_2":
        yield _cpu("model.attn_implementation", "sdpa")


def _cpu(dotted: str, substitute: str) -> Finding:
    return find(
        dotted,
        "does not run on a CPU, which runtime.accelerator asks for",
        f"write {substitute}, or auto",
    )


def _padding_free_has_its_attention(at: View) -> Iterator[Finding]:
    if at("train.padding_free") and at("model.attn_implementation") not in ("auto", "sdpa"):
        yield find(
            "model.attn_implementation",
            "must be auto or sdpa where train.padding_free is true: its step calls no other",
            "set train.padding_free: false, or write auto",
        )


def _shares_are_gathered_by_all(at: View) -> Iterator[Finding]:
    if at("runtime.distributed") == "fsdp2" and not at("train.padding_free"):
        yield find(
            "train.padding_free",
            "must be true where runtime.distributed is fsdp2: without it a process whose rows have "
            "no picture would leave the others waiting",
            "remove the line, or set runtime.distributed: ddp",
        )
    if at("runtime.distributed") == "fsdp2" and at("lora.method") == "full":
        yield find(
            "runtime.distributed",
            "must not be fsdp2 where lora.method is full: this version shares layers of frozen "
            "weights alone",
            "write ddp, or set lora.method: lora",
        )


def _shares_are_not_compiled(at: View) -> Iterator[Finding]:
    if at("train.torch_compile") and at("runtime.distributed") == "fsdp2":
        yield find(
            "train.torch_compile",
            "must be false where runtime.distributed is fsdp2: this version does not compile "
            "blocks that are in shares",
            "remove the line, or set runtime.distributed: ddp",
        )


def _activations_of_compiled_blocks_are_kept(at: View) -> Iterator[Finding]:
    if at("train.torch_compile") and at("train.gradient_checkpointing"):
        yield find(
            "train.torch_compile",
            "must be false where train.gradient_checkpointing is true: a block that is computed "
            "again may meet another of its compiled forms, and keeps other tensors then",
            "set train.gradient_checkpointing: false, or remove the line",
        )


def _unsloth_trains_adapters_on_one_gpu(at: View) -> Iterator[Finding]:
    if at("model.engine") != "unsloth":
        return
    if at("runtime.accelerator") == "cpu":
        yield _cpu("model.engine", "transformers")
    if at("runtime.distributed") in ("ddp", "fsdp2"):
        yield _not_by_unsloth("runtime.distributed", "none", "which trains in one process")
    if at("lora.method") == "full":
        yield _not_by_unsloth("lora.method", "lora", "which this version lets train adapters alone")
    if at("lora.use_dora"):
        yield _not_by_unsloth("lora.use_dora", "false", "whose layers compute plain adapters")
    if at("model.init") == "random":
        yield _not_by_unsloth("model.init", "pretrained", "which reads weights and draws none")


def _not_by_unsloth(dotted: str, wanted: str, why: str) -> Finding:
    return find(
        dotted,
        f"must be {wanted} where model.engine is unsloth, {why}",
        f"write {wanted}, or set model.engine: transformers",
    )


def _greedy_does_not_sample(at: View) -> Iterator[Finding]:
    if at("eval.generation.do_sample"):
        return
    for name, neutral in (("temperature", 1.0), ("min_p", 0.0)):
        if at(f"eval.generation.{name}") != neutral:
            yield find(
                f"eval.generation.{name}",
                "is not read where do_sample is false: greedy decoding always takes the likeliest",
                "remove the line, or set eval.generation.do_sample: true",
            )


def _metrics_fit_the_answers(at: View) -> Iterator[Finding]:
    answer = at("eval.answer")
    fit = METRICS[answer]
    for number, name in enumerate(at("eval.metrics") or ()):
        if name not in fit:
            others = [kind for kind, metrics in METRICS.items() if name in metrics]
            yield find(
                f"eval.metrics[{number}]",
                f"does not fit eval.answer: {answer}, whose metrics are {', '.join(fit)}",
                f"take one of these, or set eval.answer: {' or '.join(others)}",
            )


def _classes_are_not_held_out_whole(at: View) -> Iterator[Finding]:
    if at("eval.answer") == "label" and at("data.leakage_by") == "image_and_answer":
        yield find(
            "data.leakage_by",
            "must be auto or image where eval.answer is label: a class in both splits would count "
            "as leaked, and classes be held out whole",
            "remove the line",
        )


RULES: tuple[Rule, ...] = (
    _training_has_a_length,
    _warm_up_ends,
    _float16_does_not_train,
    _cpu_has_what_it_needs,
    _padding_free_has_its_attention,
    _shares_are_gathered_by_all,
    _shares_are_not_compiled,
    _activations_of_compiled_blocks_are_kept,
    _unsloth_trains_adapters_on_one_gpu,
    _greedy_does_not_sample,
    _metrics_fit_the_answers,
    _classes_are_not_held_out_whole,
)
