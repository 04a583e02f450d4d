"""Combinations that make no sense are refused by name, and their neighbours are not."""

from pathlib import Path

import pytest

from job.errors import Problem, SpecError
from job.spec import rules
from job.spec.load import load_spec
from job.spec.overrides import override
from job.spec.parse import parse
from job.spec.resolve import fill
from job.spec.rules.view import View
from job.spec.types import JobSpec

MINIMAL = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}}
output: {uri: outputs/sample}
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEPS = "train.eval_strategy=steps"
NOT_VALIDATED = "requires train.eval_strategy: nothing is validated without it"
FORMULAS = ("data.train.uri=builtin://formulas", "data.train.limit=9")
VALIDATED = ("train.eval_strategy=steps", "data.validation_fraction=0.05")


def _load(*overrides: str) -> JobSpec:
    return load_spec(MINIMAL, "job.yaml", overrides, {}).spec


def _problems(*overrides: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        _load(*overrides)
    return list(caught.value.problems)


REFUSED: list[tuple[tuple[str, ...], str, str, str | None]] = [
    (
        ("lora.method=full", f"lora.{key}"),
        f"lora.{key.split('=')[0]}",
        "does not apply if lora.method is full, which trains every weight",
        "remove the line, or set lora.method: lora",
    )
    for key in (
        "r=4",
        "lora_dropout=0.1",
        "bias=all",
        "target_modules=[q_proj]",
        "target_parameters=[experts.down_proj]",
        "use_rslora=true",
        "use_dora=true",
        "finetune_vision_layers=false",
        "finetune_experts=true",
    )
]
REFUSED += [
    (
        ("model.load_in_4bit=true", f"{key}={value}"),
        key,
        f"must not be {value} if model.load_in_4bit is true: {why}",
        f"write {wanted}, or set model.load_in_4bit: false",
    )
    for key, value, wanted, why in (
        ("lora.method", "full", "lora", "weights in 4 bits are frozen"),
        ("lora.bias", "all", "none", "the model's own weights are frozen"),
        ("model.init", "random", "pretrained", "the merge reads the original weights again"),
        ("model.engine", "unsloth", "transformers", "unsloth loads none in this version"),
        ("runtime.distributed", "fsdp2", "ddp", "they are not sharded in this version"),
        ("train.torch_compile", "true", "false", "they are unpacked outside of compiled code"),
    )
]
REFUSED += [
    (
        (f"model.{key}",),
        f"model.{key.partition('=')[0]}",
        "requires model.load_in_4bit: true",
        "remove the line, or set model.load_in_4bit: true",
    )
    for key in ("bnb_4bit_quant_type=fp4", "bnb_4bit_use_double_quant=false")
]
REFUSED += [
    (
        ("export.verify=vllm", "export.merged.layout=transformers"),
        "export.merged.layout",
        "must be vllm if export.verify is vllm, which serves it",
        "remove the line, or set export.verify: reload",
    ),
    (
        ("export.verify=vllm", "export.merged.enabled=false"),
        "export.merged.enabled",
        "must be true if export.verify is vllm, which serves it",
        "remove the line, or set export.verify: reload",
    ),
    (
        ("lora.method=full", "export.merged.enabled=false"),
        "export.merged.enabled",
        "must be true if lora.method is full: nothing else would be exported",
        "set export.merged.enabled: true",
    ),
    (
        ("lora.finetune_vision_layers=false", "lora.finetune_language_layers=false"),
        "lora.finetune_language_layers",
        "must be true if finetune_vision_layers is false: nothing would be trained",
        "set one of them to true",
    ),
    (
        ("lora.finetune_attention_modules=false", "lora.finetune_mlp_modules=false"),
        "lora.finetune_attention_modules",
        "must be true if finetune_mlp_modules is false: nothing would be trained",
        "set one of them to true",
    ),
    (
        ("lora.target_modules=[q_proj]", "lora.finetune_mlp_modules=false"),
        "lora.finetune_mlp_modules",
        "does not apply if lora.target_modules names the modules",
        "remove one of the two",
    ),
    (
        ("lora.target_parameters=[experts.down_proj]", "lora.finetune_experts=true"),
        "lora.target_parameters",
        "cannot be combined with finetune_experts, which selects the family's parameters",
        "remove one of the two",
    ),
    (
        ("lora.finetune_experts=true", "lora.use_dora=true"),
        "lora.use_dora",
        "must be false with finetune_experts: PEFT does not support it for parameters",
        "remove the line, or remove finetune_experts",
    ),
    (
        ("lora.target_parameters=[experts.down_proj]", "lora.lora_dropout=0.1"),
        "lora.lora_dropout",
        "must be 0 with target_parameters: PEFT does not support it for parameters",
        "remove the line, or remove target_parameters",
    ),
    (
        ("train.num_train_epochs=0",),
        "train.num_train_epochs",
        "must be greater than 0 if train.max_steps is -1: nothing would be trained",
        "set train.num_train_epochs: 1, or train.max_steps",
    ),
    (
        ("train.max_steps=0",),
        "train.max_steps",
        "must not be 0",
        "write -1 to leave it to train.num_train_epochs",
    ),
    (
        ("runtime.distributed=fsdp2", "train.padding_free=false"),
        "train.padding_free",
        "must be true if runtime.distributed is fsdp2: without it, a process whose rows "
        "have no image would block the others",
        "remove the line, or set runtime.distributed: ddp",
    ),
    (
        ("train.torch_compile=true", "train.gradient_checkpointing=true"),
        "train.torch_compile",
        "must be false if train.gradient_checkpointing is true: recomputation may run "
        "another compiled version of a block, which saves other tensors",
        "remove one of the lines: auto chooses",
    ),
    (
        (
            "runtime.distributed=fsdp2",
            "train.torch_compile=true",
            "train.gradient_checkpointing=false",
        ),
        "train.torch_compile",
        "must be false if runtime.distributed is fsdp2: this version does not compile "
        "sharded blocks",
        "remove the line, or set runtime.distributed: ddp",
    ),
    (
        ("runtime.distributed=fsdp2", "lora.method=full", "model.dtype=bfloat16"),
        "model.dtype",
        "must be auto or float32 if runtime.distributed is fsdp2 and lora.method is full: this "
        "version shards weights of one dtype, and some stay in fp32",
        "remove the line: it computes in bf16 anyway, and updates are often too small for bf16 "
        "weights",
    ),
    *(
        (
            ("runtime.distributed=fsdp2", f"train.optim={optim}"),
            "train.optim",
            "does not update sharded weights, which runtime.distributed: fsdp2 trains",
            "write adamw_torch_fused (adamw_torch on a CPU), or auto; its states are divided among "
            "the processes",
        )
        for optim in ("adamw_8bit", "paged_adamw_8bit")
    ),
    (
        ("runtime.distributed=fsdp2", "lora.method=full", "train.optim=adafactor"),
        "train.optim",
        "must not be adafactor if runtime.distributed is fsdp2 and lora.method is full: "
        "checkpoints cannot store its states in shards",
        "write adamw_torch_fused (adamw_torch on a CPU), or auto",
    ),
    (
        ("model.dtype=float16",),
        "model.dtype",
        "must not be float16: training diverges without loss scaling",
        "set model.dtype: bfloat16; export.merged.dtype: float16 still exports float16",
    ),
    *(
        (
            ("runtime.accelerator=cpu", f"{key}={value}"),
            key,
            "does not run on a CPU, which runtime.accelerator selects",
            f"write {substitute}, or auto",
        )
        for key, value, substitute in (
            ("train.optim", "adamw_8bit", "adamw_torch"),
            ("train.optim", "paged_adamw_8bit", "adamw_torch"),
        )
    ),
    (
        (
            "runtime.accelerator=cpu",
            "train.padding_free=false",
            "model.attn_implementation=flash_attention_2",
        ),
        "model.attn_implementation",
        "does not run on a CPU, which runtime.accelerator selects",
        "write sdpa, or auto",
    ),
    *(
        (
            ("runtime.distributed=fsdp2", f"model.attn_implementation={other}"),
            "model.attn_implementation",
            "must be auto or sdpa if runtime.distributed is fsdp2, which requires rows without "
            "padding",
            "write auto, or set runtime.distributed: ddp",
        )
        for other in ("eager", "flash_attention_2")
    ),
    *(
        (
            (f"eval.generation.{key}",),
            f"eval.generation.{key.split('=')[0]}",
            "requires do_sample: true: greedy decoding ignores it",
            "remove the line, or set eval.generation.do_sample: true",
        )
        for key in ("temperature=0.7", "min_p=0.1")
    ),
    (
        ("eval.answer=label", "eval.metrics=[accuracy, wer]"),
        "eval.metrics[1]",
        "does not apply to eval.answer: label, whose metrics are accuracy, macro_f1",
        "use one of these, or set eval.answer: text",
    ),
    (
        ("eval.answer=label", "data.leakage_by=image_and_answer"),
        "data.leakage_by",
        "must be auto or image if eval.answer is label: otherwise rows of one class "
        "count as duplicates, and whole classes are held out",
        "remove the line",
    ),
    (
        ("model.engine=unsloth", "runtime.accelerator=cpu"),
        "model.engine",
        "does not run on a CPU, which runtime.accelerator selects",
        "write transformers, or auto",
    ),
    *(
        (
            ("model.engine=unsloth", f"{key}={value}"),
            key,
            f"must be {wanted} if model.engine is unsloth, {why}",
            f"write {wanted}, or set model.engine: transformers",
        )
        for key, value, wanted, why in (
            ("runtime.distributed", "ddp", "none", "which trains in one process"),
            ("runtime.distributed", "fsdp2", "none", "which trains in one process"),
            ("lora.method", "full", "lora", "which trains only adapters in this version"),
            ("lora.use_dora", "true", "false", "which supports only plain adapters"),
            ("model.init", "random", "pretrained", "which does not initialize weights"),
        )
    ),
    (
        ("data.eval_fraction=0",),
        "data.eval_fraction",
        "must be greater than 0 if data.eval is null: there would be nothing to evaluate on",
        "set data.eval.uri, or data.eval_fraction: 0.1",
    ),
    (
        (
            "train.eval_strategy=steps",
            "data.validation={uri: v.jsonl}",
            "data.validation_fraction=0.1",
        ),
        "data.validation_fraction",
        "cannot be combined with data.validation, which names the rows to validate on",
        "remove one of the two",
    ),
    (
        ("train.eval_strategy=steps", "data.eval_fraction=0.6", "data.validation_fraction=0.4"),
        "data.validation_fraction",
        "leaves no row to train on: all are held out, together with data.eval_fraction, which is "
        "0.6",
        "lower them to less than 1 together, for example 0.1 each",
    ),
    (
        ("data.min_pixels=10", "data.max_pixels=9"),
        "data.min_pixels",
        "must not be greater than data.max_pixels, which is 9",
        "write 9 or less",
    ),
    (
        ("data.train.format=builtin",),
        "data.train.format",
        "must not be builtin for a source that is not builtin://",
        "write auto, or set data.train.uri: builtin://formulas",
    ),
    (
        (*FORMULAS, "data.train.format=jsonl"),
        "data.train.format",
        "must be auto for a builtin:// source",
        "remove the line",
    ),
    (
        ("data.train.uri=builtin://formula", "data.train.limit=9"),
        "data.train.uri",
        "does not ship with the project",
        "write builtin://formulas",
    ),
    (
        ("data.eval.uri=builtin://ernie-vl-tiny",),
        "data.eval.uri",
        "does not ship with the project",
        "write builtin://formulas",
    ),
    (
        ("model.model_name_or_path=builtin://ernie-tiny",),
        "model.model_name_or_path",
        "does not ship with the project",
        "write builtin://ernie-vl-tiny",
    ),
    (
        ("data.train.formulas.width=224",),
        "data.train.formulas.width",
        "applies to builtin://formulas only",
        "remove the line",
    ),
    (
        ("data.eval.uri=builtin://formulas",),
        "data.eval.limit",
        "is required for builtin://formulas, which is endless",
        "set data.eval.limit: 400",
    ),
    (
        (*FORMULAS, "data.eval.uri=builtin://formulas", "data.eval.limit=9"),
        "data.eval.formulas.seed",
        "must differ from data.train.formulas.seed, or the formulas are the same",
        "set data.eval.formulas.seed: 3408",
    ),
    (
        (
            *FORMULAS,
            "train.eval_strategy=steps",
            "data.eval={uri: 'builtin://formulas', limit: 1, formulas: {seed: 1}}",
            "data.validation={uri: 'builtin://formulas', limit: 1, formulas: {seed: 1}}",
        ),
        "data.validation.formulas.seed",
        "must differ from data.eval.formulas.seed, or the formulas are the same",
        "set data.validation.formulas.seed: 3408",
    ),
    (
        ("data.train=[{uri: a}, {uri: 'builtin://formulas'}]",),
        "data.train[1].limit",
        "is required for builtin://formulas, which is endless",
        "set data.train[1].limit: 400",
    ),
    (
        ("data.train=[{uri: a, weight: 1}, {uri: b}]",),
        "data.train[1].weight",
        "is missing, but data.train[0] has one",
        "give every source of data.train a weight, or none",
    ),
    *(
        (
            overrides,
            f"{source}.weight",
            "applies only if data.train is a list of several sources",
            "remove the line",
        )
        for source, overrides in {
            "data.train": ("data.train.weight=1",),
            "data.train[0]": ("data.train=[{uri: a, weight: 1}]",),
            "data.eval": ("data.train=[{uri: a}, {uri: b}]", "data.eval={uri: c, weight: 2}"),
        }.items()
    ),
    (
        ("data.train=[{uri: a}, {uri: b}]", "data.stopping_strategy=all_exhausted"),
        "data.stopping_strategy",
        "applies only if the sources of data.train have weights",
        "give each source a weight, or remove the line",
    ),
    (
        ("data.shuffle_buffer_size=500",),
        "data.shuffle_buffer_size",
        "applies only to streamed rows; otherwise all rows are shuffled together",
        "set data.streaming: true, or remove the line",
    ),
    *(
        (
            (f"data.train.columns={{messages: m, {name}: t}}",),
            f"data.train.columns.{name}",
            f"cannot be combined with messages, which contain the {name}",
            "remove one of the two",
        )
        for name in ("text", "question")
    ),
    (
        ("data.train.uri=a", "data.train.format=imagefolder"),
        "data.instruction",
        "is required: rows of data.train are pairs of an image and its text, without a question",
        'for example data.instruction: "What does the image say?"',
    ),
    *(
        (
            (f"data.{key}=<image>Read.",),
            f"data.{key}",
            "must not contain <image>: images come before the question",
            "remove <image>",
        )
        for key in ("instruction", "system")
    ),
    (
        ("data.text_only=true", "data.train.columns={image: a}"),
        "data.train.columns.image",
        "cannot be combined with data.text_only: true, which ignores images",
        "remove one of the two",
    ),
    (
        ("data.text_only=true", "data.train.uri=builtin://formulas", "data.train.limit=4"),
        "data.text_only",
        "must be false: the rows of data.train are images",
        "remove the line",
    ),
    (
        ("model.revision=main",),
        "model.revision",
        "applies to hf:// models only",
        "remove the line",
    ),
    (
        ("model.model_name_or_path=hf://a/b@v1", "model.revision=v2"),
        "model.revision",
        "differs from the revision in model_name_or_path",
        "remove one of the two",
    ),
    (
        ("model.model_name_or_path=s3://b/model", "model.trust_remote_code=true"),
        "model.trust_remote_code",
        "must be false for a model at s3://, where its code can change",
        "remove the line, or name a commit at hf:// or a local folder that you have read",
    ),
    *(
        (
            (*unpinned, "model.trust_remote_code=true"),
            "model.trust_remote_code",
            "requires model.revision to be a commit of 40 hexadecimal digits: code at "
            "any other revision can change",
            "set model.revision to a commit, or remove trust_remote_code",
        )
        for unpinned in (
            ("model.model_name_or_path=hf://a/b",),
            ("model.model_name_or_path=hf://a/b@main",),
            ("model.model_name_or_path=hf://a/b", f"model.revision={COMMIT[:12]}"),
        )
    ),
    (
        ("runtime.metrics_file=s3://a/b.prom",),
        "runtime.metrics_file",
        "must be a local file, for Prometheus' node exporter to read",
        "write a path, or use metrics_port",
    ),
    *(
        (
            (f"{key}={scheme}://a/b",),
            key,
            f"must be writable storage; {scheme}:// is read-only",
            "write a path or an s3:// URI",
        )
        for scheme in ("hf", "builtin", "https")
        for key in ("output.uri", "train.logging_dir")
        if (scheme, key) != ("hf", "output.uri")
    ),
    *(
        (
            (f"output.uri={uri}",),
            "output.uri",
            "must be a model repository, without a folder in it, to be pushed to",
            "write hf://org/name or hf://org/name@branch; other folders can be a path or s3://",
        )
        for uri in ("hf://datasets/org/rows", "hf://org/name/folder", "hf://name", "hf://org/a@b@c")
    ),
    (
        ("export.push_to_hub=true",),
        "export.hub_model_id",
        "must name the repository if export.push_to_hub is true",
        "set export.hub_model_id: org/name",
    ),
    (
        ("export.hub_revision=v2",),
        "export.hub_revision",
        "applies only if export.push_to_hub is true",
        "set export.push_to_hub: true, or remove the line",
    ),
    (
        ("output.uri=hf://org/name", "export.hub_model_id=org/other"),
        "export.hub_model_id",
        "differs from the repository in output.uri",
        "remove the line, or set output.uri to a path or an s3:// URI",
    ),
    (
        ("output.uri=hf://org/name", "model.model_name_or_path=hf://org/Name"),
        "output.uri",
        "must not be the repository and branch of model.model_name_or_path, which the push would "
        "replace",
        "write hf://org/name@fine-tuned, or name another repository",
    ),
    (
        (
            "export.push_to_hub=true",
            "export.hub_model_id=org/name",
            "model.adapter_name_or_path=hf://org/name/adapter",
        ),
        "export.hub_model_id",
        "must not be the repository and branch of model.adapter_name_or_path, which the push "
        "would replace",
        "set export.hub_revision: fine-tuned, or name another repository",
    ),
    (
        ("output.uri=hf://org/name", "lora.method=full", "export.hub_content=all"),
        "export.hub_content",
        "must be merged or auto if lora.method is full, which trains no adapter",
        "remove the line",
    ),
    (
        ("output.uri=hf://org/name", "export.merged.enabled=false", "export.hub_content=merged"),
        "export.hub_content",
        "needs export.merged.enabled: true",
        "set export.merged.enabled: true, or hub_content: adapter",
    ),
    *(
        (
            (f"output.uri={output}", f"{dotted}={source}"),
            "output.uri",
            f"must not be {dotted} or inside it",
            "write the URI of another folder",
        )
        for output, dotted, source in (
            ("models/base", "model.model_name_or_path", "models/base"),
            ("./models//base/", "model.model_name_or_path", "models/base"),
            ("models/base/x", "model.model_name_or_path", "models/base/"),
            ("file:///m/x", "model.model_name_or_path", "/m"),
            ("s3://b/data/out", "data.train.uri", "s3://b/data"),
            ("S3://b/data/../data", "data.eval.uri", "s3://b/data"),
            ("s3a://b/data/out", "data.train.uri", "s3://b//data/"),
            ("chat.jinja", "model.chat_template", "chat.jinja"),
        )
    ),
    *(
        (
            (f"output.uri={output}", f"{dotted}={source}"),
            "output.uri",
            f"must not contain {dotted}, which the run could overwrite",
            "write the URI of another folder",
        )
        for output, dotted, source in (
            ("models", "model.model_name_or_path", "models/base"),
            ("out", "model.model_name_or_path", "out/merged"),
            ("s3://b/out", "model.model_name_or_path", "s3a://b/out/merged/"),
            ("/data", "data.train.uri", "file:///data/rows/../data/*.jsonl"),
            ("s3://b/out", "data.eval.uri", "s3://b/out/data/*.parquet"),
            ("out", "model.chat_template", "out/merged/chat_template.jinja"),
        )
    ),
    *(
        (
            (f"output.uri={uri}",),
            "output.uri",
            message,
            f"write {fix}",
        )
        for uri, message, fix in (
            ("s3://b/o//c", "has an empty part: two consecutive slashes", "s3://b/o/c"),
            ("s3://b//c/", "has an empty part: two consecutive slashes", "s3://b/c"),
            (
                "gs://b/o/../c",
                "has the part '..', which object stores do not resolve",
                "gs://b/o/c",
            ),
        )
    ),
    (
        ("output.uri=out", "train.logging_dir=out/merged/logs"),
        "train.logging_dir",
        "must not be in the output's merged/: the run checks and removes files there",
        "remove the line: trackers write to logs/ there",
    ),
    *(
        (
            ("output.uri=out", f"runtime.{key}=out/{folder}"),
            f"runtime.{key}",
            f"must not be in the output's {folder.partition('/')[0]}/: the run checks and removes "
            "files there",
            "write a folder outside of the output",
        )
        for key, folder in (
            ("workdir", "merged/work"),
            ("workdir", "reinforced/work"),
            ("cache_dir", "data"),
        )
    ),
    (
        ("output.uri=out", "runtime.metrics_file=out/job.prom"),
        "runtime.metrics_file",
        "must not be in the output, where a run writes only under its lease",
        "write a path outside of it, in the folder that the node exporter reads",
    ),
]


REFUSED += [
    (
        (f"{key}={uri}",),
        key,
        f"must have two slashes after {right.partition(':')[0]}:, or it is a path",
        f"write {right}",
    )
    for key, uri, right in (
        ("output.uri", "s3:/bucket/x", "s3://bucket/x"),
        ("output.uri", "s3:bucket/x", "s3://bucket/x"),
        ("output.uri", "s3//bucket/x", "s3://bucket/x"),
        ("output.uri", "s3:///bucket/x", "s3://bucket/x"),
        ("output.uri", "S3:/bucket/x", "s3://bucket/x"),
        ("data.train.uri", "hf:/datasets/a/b", "hf://datasets/a/b"),
        ("data.train.image_folder", "http:/host/x", "http://host/x"),
        ("data.eval.uri", "gs:/bucket/x", "gs://bucket/x"),
        ("model.model_name_or_path", "hf:org/repo", "hf://org/repo"),
        ("model.model_name_or_path", "file:/models/base", "file:///models/base"),
        ("train.logging_dir", "s3:/bucket/logs", "s3://bucket/logs"),
        ("train.resume_from_checkpoint", "s3:/b/step-1", "s3://b/step-1"),
        ("model.chat_template", "s3:/b/chat.jinja", "s3://b/chat.jinja"),
    )
]
REFUSED += [
    (
        ("model.engine=unsloth", "train.neftune_noise_alpha=5"),
        "train.neftune_noise_alpha",
        "must be null if model.engine is unsloth, whose forward passes add no noise",
        "remove the line, or set model.engine: transformers",
    ),
    (
        ("lora.finetune_vision_layers=false", "train.vision_tower_lr=1e-5"),
        "train.vision_tower_lr",
        "does not apply if lora.finetune_vision_layers is false: the vision tower is frozen",
        "remove the line, or set lora.finetune_vision_layers: true",
    ),
    (
        ("lora.method=full", "train.loraplus_lr_ratio=16"),
        "train.loraplus_lr_ratio",
        "does not apply if lora.method is full, which trains no adapter",
        "remove the line, or set lora.method: lora",
    ),
    *(
        (
            (f"train.{key}=0.1", "train.loraplus_lr_ratio=16"),
            "train.loraplus_lr_ratio",
            f"times train.{key} must be below 1, but is 1.6: the learning rate of B matrices",
            "write 16 or less, and lower the learning rate",
        )
        for key in ("learning_rate", "vision_tower_lr")
    ),
    (
        ("model.adapter_name_or_path=s3://b/adapter", "lora.method=full"),
        "model.adapter_name_or_path",
        "requires lora.method: lora, which continues the adapter",
        "set lora.method: lora; or, to train every weight, merge the adapter first and name the "
        "merged/ of its run as model.model_name_or_path",
    ),
    (
        ("lora.layers_to_transform=[0]", "lora.target_modules=.*q_proj"),
        "lora.layers_to_transform",
        "cannot be combined with a regular expression in target_modules, as in PEFT",
        r"name the layers in the expression, like '.*\.layers\.(0|1)\..*q_proj', or write "
        "target_modules as a list of names",
    ),
    (
        ("lora.rank_pattern={'q_proj[': 4}",),
        "lora.rank_pattern",
        "'q_proj[' is not a regular expression: unterminated character set at position 6",
        r"for example {o_proj: 16}, or {'layers\.[0-3]\..*': 16}",
    ),
    (
        ("lora.modules_to_save=[lm_head]", "runtime.distributed=fsdp2"),
        "lora.modules_to_save",
        "does not apply if runtime.distributed is fsdp2: this version shards only layers with "
        "frozen weights",
        "remove the line, or set runtime.distributed: ddp",
    ),
    *(
        (
            (f"lora.{key}={value}", "model.engine=unsloth"),
            f"lora.{key}",
            "does not apply if model.engine is unsloth, which trains adapters of one rank only in "
            "this version",
            "remove the line, or set model.engine: transformers",
        )
        for key, value in (
            ("rank_pattern", "{q_proj: 4}"),
            ("modules_to_save", "[lm_head]"),
            ("finetune_experts", "true"),
        )
    ),
    (
        ("train.max_steps=50", "train.warmup_steps=60"),
        "train.warmup_steps",
        "must not be greater than train.max_steps, which is 50: the learning rate would never "
        "reach train.learning_rate",
        "write 5, or raise train.max_steps",
    ),
    (
        ("lora.target_modules=all",),
        "lora.target_modules",
        "is not PEFT's name for all linear modules",
        "write all-linear",
    ),
    (
        ("lora.target_modules=[q_proj, all-linear]",),
        "lora.target_modules",
        "all-linear must be the only target: it selects every linear module",
        "write target_modules: all-linear",
    ),
    (
        ("lora.target_modules=[q_proj, embed_tokens]",),
        "lora.target_modules",
        "embed_tokens is an embedding; this version adapts only linear modules",
        "leave embed_tokens out",
    ),
    (
        ("lora.target_modules='q_proj,v_proj'",),
        "lora.target_modules",
        "must be a list to name several modules",
        "write [q_proj, v_proj]",
    ),
    (
        ("lora.target_modules=q_proj",),
        "lora.target_modules",
        "is a regular expression for full names, and no module has this full name",
        "write [q_proj]",
    ),
    (
        ("lora.target_modules='*q_proj'",),
        "lora.target_modules",
        "is not a regular expression: nothing to repeat at position 0",
        r"for example '.*\.(q|v)_proj', or a list of names: [q_proj, v_proj]",
    ),
]


REFUSED += [
    (
        (f"train.{setting}",),
        f"train.{setting.split('=')[0]}",
        NOT_VALIDATED,
        "set train.eval_strategy: steps and data.validation_fraction: 0.05, or remove the line",
    )
    for setting in (
        "eval_steps=5",
        "predict_with_generate=true",
        "metric_for_best_model=cer",
        "load_best_model_at_end=true",
        "early_stopping_patience=3",
    )
]
REFUSED += [
    (
        (STEPS,),
        "train.eval_strategy",
        "requires rows to validate on, other than those that are trained and evaluated on",
        "set data.validation_fraction: 0.05, or name them in data.validation.uri",
    ),
    (
        ("data.validation_fraction=0.05",),
        "data.validation_fraction",
        "requires train.eval_strategy: without it these rows would neither be trained nor "
        "validated on",
        "set train.eval_strategy: steps, or remove the line",
    ),
    (
        ("eval.validation_samples=9",),
        "eval.validation_samples",
        NOT_VALIDATED,
        "set train.eval_strategy: steps and data.validation_fraction: 0.05, or remove the line; "
        "eval.max_samples limits the evaluation",
    ),
    (
        ("data.validation_fraction=0.4", "train.eval_strategy=epoch", "train.eval_steps=5"),
        "train.eval_steps",
        "does not apply if train.eval_strategy is epoch",
        "set train.eval_strategy: steps, or remove the line",
    ),
    (
        (*VALIDATED, "train.metric_for_best_model=eval_los"),
        "train.metric_for_best_model",
        "is not a metric; those measured are eval_loss, eval_exact_match, "
        "eval_exact_match_normalized, eval_cer, eval_wer, eval_bleu",
        "write eval_loss",
    ),
    (
        (*VALIDATED, "train.metric_for_best_model=accuracy"),
        "train.metric_for_best_model",
        "does not apply to eval.answer: text; those measured are eval_loss, eval_exact_match, "
        "eval_exact_match_normalized, eval_cer, eval_wer, eval_bleu",
        "use one of these, or set eval.answer: label",
    ),
    (
        (*VALIDATED, "train.metric_for_best_model=eval_bleu", "eval.metrics=[cer]"),
        "train.metric_for_best_model",
        "is not among eval.metrics",
        "add bleu to eval.metrics",
    ),
    (
        (*VALIDATED, "train.metric_for_best_model=cer", "train.predict_with_generate=false"),
        "train.predict_with_generate",
        "must not be false if train.metric_for_best_model is cer, which compares generated answers",
        "remove the line, or set train.metric_for_best_model: eval_loss",
    ),
    (
        (*VALIDATED, "train.metric_for_best_model=cer", "runtime.distributed=fsdp2"),
        "train.metric_for_best_model",
        "must be eval_loss if runtime.distributed is fsdp2: this version does not generate "
        "answers with a sharded model",
        "write eval_loss, or set runtime.distributed: ddp",
    ),
    (
        (*VALIDATED, "train.predict_with_generate=true", "runtime.distributed=fsdp2"),
        "train.predict_with_generate",
        "must not be true if runtime.distributed is fsdp2: this version does not generate "
        "with a sharded model",
        "remove the line, or set runtime.distributed: ddp",
    ),
    (
        (*VALIDATED, "train.early_stopping_threshold=0.1"),
        "train.early_stopping_threshold",
        "requires train.early_stopping_patience: training does not stop early without it",
        "set train.early_stopping_patience: 3, or remove the line",
    ),
]


GRPO = "reinforce.rewards.name=exact_match"
ONLY_ADAPTERS = "set lora.method: lora, or remove the section reinforce"
REFUSED += [
    (
        ("reinforce.rewards.name=exact_mach",),
        "reinforce.rewards.name",
        "is not a reward; those for eval.answer: text are exact_match, character_accuracy, length",
        "write exact_match",
    ),
    (
        ("reinforce.rewards=[{name: length}, {name: render_match}]",),
        "reinforce.rewards[1].name",
        "does not apply to eval.answer: text, whose rewards are exact_match, character_accuracy, "
        "length",
        "use one of these, or set eval.answer: latex",
    ),
    (
        ("reinforce.rewards=[{name: length}, {name: length, weight: 2}]",),
        "reinforce.rewards[1].name",
        "is named twice",
        "remove it, and add its weight to the first",
    ),
    (
        ("reinforce.rewards.name=rewards:closeness",),
        "reinforce.rewards.name",
        "is code that the job would import and run, which this spec does not allow",
        "set reinforce.allow_code: true if you trust it, or use a reward that ships with the "
        "project",
    ),
    (
        (GRPO, "reinforce.num_generations=3"),
        "reinforce.num_generations",
        "must divide per_device_train_batch_size × gradient_accumulation_steps, the answers of a "
        "step, which are 8",
        "set reinforce.per_device_train_batch_size: 9",
    ),
    *(
        (
            (
                GRPO,
                f"reinforce.num_generations={group}",
                f"reinforce.per_device_train_batch_size={batch}",
                f"reinforce.gradient_accumulation_steps={passes}",
            ),
            "reinforce.num_generations",
            "must divide per_device_train_batch_size × gradient_accumulation_steps, the answers of "
            f"a step, which are {batch * passes}",
            f"set reinforce.per_device_train_batch_size: {nearest}",
        )
        for group, batch, passes, nearest in (
            (7, 128, 1, 126),
            (8, 12, 1, 8),  # the lower one if two are as near
            (8, 1, 1, 8),
            (6, 5, 4, 6),  # any multiple of 3
        )
    ),
    (
        (GRPO, "reinforce.max_steps=20", "reinforce.warmup_steps=30"),
        "reinforce.warmup_steps",
        "must not be greater than reinforce.max_steps, which is 20: the learning rate would never "
        "reach reinforce.learning_rate",
        "write 2, or raise reinforce.max_steps",
    ),
    (
        (GRPO, "lora.method=full"),
        "reinforce",
        "requires lora.method: lora: it continues an adapter",
        ONLY_ADAPTERS,
    ),
    (
        (GRPO, "runtime.distributed=fsdp2"),
        "reinforce",
        "requires one process: this version does not spread its answers over several",
        "set runtime.distributed: none, or remove the section reinforce",
    ),
    (
        (GRPO, "model.load_in_4bit=true"),
        "reinforce",
        "is not supported with model.load_in_4bit: true in this version",
        "set model.load_in_4bit: false, or remove the section reinforce",
    ),
    (
        (GRPO, "data.streaming=true"),
        "reinforce",
        "is not supported with data.streaming: true in this version: it takes rows in another "
        "order than training",
        "set data.streaming: false, or remove the section reinforce",
    ),
    (
        (GRPO, "eval.generation.enable_thinking=true"),
        "reinforce",
        "is not supported with eval.generation.enable_thinking: true in this version: its answers "
        "are generated without thoughts",
        "set eval.generation.enable_thinking: false, or remove the section reinforce",
    ),
    (
        (GRPO, "model.engine=unsloth"),
        "reinforce",
        "is not run by model.engine: unsloth",
        "set model.engine: transformers, or remove the section reinforce",
    ),
    (
        (GRPO, "reinforce.eval_strategy=steps"),
        "reinforce.eval_strategy",
        "requires rows to validate on, other than those that are trained and evaluated on",
        "set data.validation_fraction: 0.05, or name them in data.validation.uri",
    ),
    (
        (GRPO, "reinforce.load_best_model_at_end=true"),
        "reinforce.load_best_model_at_end",
        "requires reinforce.eval_strategy: nothing is validated without it",
        "set reinforce.eval_strategy: steps and data.validation_fraction: 0.05, or remove the line",
    ),
    (
        (
            GRPO,
            "reinforce.eval_strategy=steps",
            "data.validation_fraction=0.1",
            "reinforce.metric_for_best_model=eval_exact_mach",
        ),
        "reinforce.metric_for_best_model",
        "is not measured; what is: eval_loss, eval_exact_match, eval_exact_match_normalized, "
        "eval_cer, eval_wer, eval_bleu",
        "write eval_exact_match",
    ),
    (
        (GRPO, "train.max_steps=0", *VALIDATED),
        "train.eval_strategy",
        "does not apply if train.max_steps is 0: nothing is trained before reinforce",
        "remove the line; reinforce.eval_strategy: steps validates while answers are reinforced",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "message", "fix"), REFUSED)
def test_refused(overrides: tuple[str, ...], key: str, message: str, fix: str | None) -> None:
    (problem,) = _problems(*overrides)
    assert problem.field.endswith(f" $.{key}")
    assert (problem.message, problem.fix) == (message, fix)


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.method=full",),
        ("lora.method=full", "lora.r=8"),
        ("lora.method=full", "lora.finetune_attention_modules=true"),  # resolved specs had it
        ("lora.target_modules=[q_proj]", "lora.finetune_attention_modules=true"),
        ("export.merged.enabled=false",),
        ("lora.finetune_vision_layers=false", "lora.finetune_mlp_modules=false"),
        (
            "lora.finetune_attention_modules=false",
            "lora.finetune_mlp_modules=false",
            "lora.finetune_experts=true",
        ),
        ("lora.target_modules=.*q_proj", "lora.finetune_experts=true"),
        ("lora.target_parameters=[experts.down_proj]", "lora.use_rslora=true"),
        ("lora.use_dora=true", "lora.lora_dropout=0.1"),
        ("lora.layers_to_transform=2", "lora.target_modules=all-linear", "lora.r=4"),
        ("lora.rank_pattern={'layers.[01].*': 4}", "lora.modules_to_save=[embed_tokens]"),
        ("model.adapter_name_or_path=hf://org/adapter",),
        ("train.num_train_epochs=0", "train.max_steps=5"),
        ("train.num_train_epochs=0.5",),
        ("train.max_steps=3",),
        ("train.max_steps=50", "train.warmup_steps=50"),
        ("train.max_steps=5", "train.warmup_steps=9", "train.lr_scheduler_type=constant"),
        ("lora.method=full", "train.vision_tower_lr=1e-5", "train.neftune_noise_alpha=5"),
        ("lora.target_modules=[fc1]", "train.vision_tower_lr=1e-5"),
        ("train.loraplus_lr_ratio=16", "train.neftune_noise_alpha=0.1"),
        ("model.chat_template='{{ messages }}'", "output.uri=out"),
        ("lora.target_modules=all-linear",),
        ("lora.target_modules=[lm_head]",),
        ("lora.target_modules=lm_head",),
        ("model.model_name_or_path=memory:///a", "output.uri=memory://b"),
        ("model.model_name_or_path=file:///a", "output.uri=s3-results/x"),
        ("model.model_name_or_path=https/x", "output.uri=results:1/x"),
        ("model.dtype=bfloat16", "export.merged.dtype=float16"),
        ("runtime.accelerator=cuda", "train.optim=adamw_8bit", "model.engine=transformers"),
        ("runtime.accelerator=cpu", "train.optim=adamw_torch_fused"),
        ("eval.generation.temperature=1", "eval.generation.min_p=0"),
        ("eval.generation.do_sample=true", "eval.generation.temperature=1.5"),
        ("eval.answer=json", "eval.metrics=[field_f1, cer]"),
        ("eval.answer=label", "data.leakage_by=image"),
        ("data.eval_fraction=0", "data.eval.uri=data/eval.jsonl"),
        (*VALIDATED, "data.eval.uri=data/eval.jsonl", "data.eval_fraction=0.97"),
        ("train.eval_strategy=steps", "data.validation={uri: v.jsonl}", "data.eval_fraction=0.99"),
        (*VALIDATED, "train.metric_for_best_model=eval_cer", "train.early_stopping_patience=2"),
        (*VALIDATED, "train.metric_for_best_model=bleu", "eval.metrics=[bleu]"),
        (*VALIDATED, "train.metric_for_best_model=loss", "train.predict_with_generate=false"),
        (*VALIDATED, "runtime.distributed=fsdp2", "train.load_best_model_at_end=true"),
        ("data.validation={uri: v.jsonl}", "train.eval_strategy=epoch"),
        ("data.min_pixels=9", "data.max_pixels=9"),
        (*FORMULAS, "data.train.format=builtin", "data.train.formulas.noise=0.1"),
        (*FORMULAS, "data.eval={uri: 'builtin://formulas', limit: 1, formulas: {seed: 1}}"),
        (*FORMULAS, "data.eval={uri: 'data/eval.jsonl'}"),
        ("data.train=[{uri: a, weight: 1}, {uri: b, weight: 0.1}]",),
        ("data.train=[{uri: a, limit: 1}, {uri: b}]", "data.eval={uri: c}"),
        ("data.streaming=true", "data.shuffle_buffer_size=500"),
        ("train.torch_compile=true", "train.gradient_checkpointing=false"),
        ("train.torch_compile=true", "train.gradient_checkpointing=auto"),
        ("train.torch_compile=auto", "train.gradient_checkpointing=true"),
        ("train.torch_compile=auto", "runtime.distributed=fsdp2"),
        ("model.model_name_or_path=hf://a/b", "model.revision=main"),
        ("model.model_name_or_path=hf://a/b@v1", "model.revision=v1"),
        (f"model.model_name_or_path=hf://a/b@{COMMIT}", "model.trust_remote_code=true"),
        ("model.trust_remote_code=true",),
        ("model.model_name_or_path=file:///models/base", "model.trust_remote_code=true"),
        ("output.uri=memory://a", "data.train.uri=memory://b"),
        ("output.uri=s3://b/data2", "data.train.uri=s3://b/data"),
        ("output.uri=models/base2",),
        ("train.logging_dir=s3://b/logs", "runtime.metrics_file=file:///var/job.prom"),
        ("output.uri=~nobody-of-this-name/x",),
        ("output.uri=runs/b", "model.model_name_or_path=runs/a/merged"),
        ("output.uri=data/out", "data.train.uri=data/*.jsonl"),
        ("output.uri=s3://b/o/c/",),
        ("output.uri=out", "train.logging_dir=out/logs/tensorboard"),
        ("output.uri=out", "runtime.workdir=out/work", "runtime.cache_dir=out/cache"),
        ("output.uri=outputs//x",),
        ("output.uri=hf://org/name@v2", "export.hub_private_repo=false"),
        ("output.uri=hf://org/name@v2", "model.model_name_or_path=hf://org/name"),
        (
            "output.uri=hf://org/name",
            "model.model_name_or_path=hf://org/name",
            f"model.revision={'a' * 40}",
        ),
        ("export.push_to_hub=true", "export.hub_model_id=org/name", "export.hub_revision=a/b"),
        (GRPO, "train.max_steps=0"),
        (GRPO, "reinforce.eval_strategy=steps", "data.validation_fraction=0.1"),
        ("reinforce={allow_code: true, rewards: [{name: length}, {name: 'a.b:c', weight: 2}]}",),
    ],
)
def test_allowed(overrides: tuple[str, ...]) -> None:
    assert _load(*overrides).name == "sample"


def test_without_training_all_that_validates_it_is_refused_at_once() -> None:
    problems = _problems(
        GRPO,
        "train.max_steps=0",
        *VALIDATED,
        "train.eval_steps=7",
        "train.load_best_model_at_end=true",
    )
    refused = ("eval_steps", "eval_strategy", "load_best_model_at_end")
    assert sorted(problem.field for problem in problems) == [
        f"--set $.train.{key}" for key in refused
    ]


@pytest.mark.parametrize(
    "override",
    [
        "train.eval_strategy=steps",
        "train.eval_strategy=epoch",
        "train.eval_steps=5",
        "train.predict_with_generate=true",
        "train.predict_with_generate=false",
        "train.metric_for_best_model=cer",
        "train.metric_for_best_model=eval_cerr",
        "train.load_best_model_at_end=true",
        "train.early_stopping_patience=3",
        "train.early_stopping_threshold=0.1",
    ],
)
def test_without_training_each_setting_of_its_validation_has_one_finding(override: str) -> None:
    [problem] = _problems(GRPO, "train.max_steps=0", override)
    assert problem.field == f"--set $.{override.partition('=')[0]}"
    assert str(problem.fix).startswith("remove the line")


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        (stage, overrides)
        for stage in ((), (GRPO,), (GRPO, "train.max_steps=0"))
        for overrides in (
            ("data.validation_fraction=0.1",),
            ("data.validation={uri: v.jsonl}",),
            ("eval.validation_samples=9",),
            ("eval.validation_samples=9", "data.validation_fraction=0.1"),
            ("train.eval_steps=5",),
            ("train.load_best_model_at_end=true",),
            ("reinforce.eval_steps=5",),
            ("reinforce.metric_for_best_model=eval_cer",),
            ("reinforce.eval_strategy=steps",),
        )
        if stage or not overrides[0].startswith("reinforce.")
    ],
)
def test_a_spec_that_obeys_what_is_said_of_validation_is_valid(
    stage: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    problems = _problems(*stage, *overrides)
    [fix] = {str(problem.fix).partition(",")[0].partition(";")[0] for problem in problems}
    if fix == "remove the line":
        assert _load(*stage)
        return
    if stage:
        keys = "train.eval_strategy" if "train." in overrides[0] else "reinforce.eval_strategy"
        assert keys in fix or "data." in fix
    settings = fix.removeprefix("set ").split(" and ")
    assert _load(*stage, *overrides, *(each.replace(": ", "=") for each in settings))


def test_a_few_steps_of_a_longer_training_need_no_shorter_warm_up() -> None:
    text = MINIMAL + "train: {max_steps: 500, warmup_steps: 20}\n"
    assert load_spec(text, "job.yaml", ["train.max_steps=5"], {}).spec.train.max_steps == 5
    with pytest.raises(SpecError):
        load_spec(text.replace("500", "15"), "job.yaml", (), {})


def test_every_rule_refuses_something_here() -> None:
    silent = set(rules.RULES)
    for overrides, *_ in REFUSED:
        document, _ = override(parse(MINIMAL, "job.yaml"), overrides)
        view = View(fill(document.values), ())
        silent -= {rule for rule in silent if any(rule(view))}
    assert silent == set()


def test_a_rule_leaves_alone_what_is_wrong_in_itself() -> None:
    problems = _problems("model.dtype=float16", "data.min_pixels=many", "data.max_pixels=1")
    assert [problem.field for problem in problems] == [
        "--set $.data.min_pixels",
        "--set $.model.dtype",
    ]


def test_a_broken_section_hides_no_other_problem() -> None:
    problems = _problems("lora=5", "model.dtype=float16", "train.max_steps=0")
    assert {problem.field for problem in problems} == {
        "--set $.lora",
        "--set $.model.dtype",
        "--set $.train.max_steps",
    }


def test_a_link_does_not_hide_that_the_output_is_an_input(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    (problem,) = _problems(f"model.model_name_or_path={model}", f"output.uri={tmp_path}/link/out")
    assert problem.message == "must not be model.model_name_or_path or inside it"
    output.mkdir()
    (output / "merged").symlink_to(model)
    (problem,) = _problems(f"model.model_name_or_path={model}", f"output.uri={output}")
    assert problem.message == (
        "its folder merged/ links to model.model_name_or_path, which the run would overwrite"
    )
