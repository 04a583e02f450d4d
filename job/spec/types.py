"""The spec as frozen dataclasses: a class per section, a field per key of the JSON Schema.

Defaults are defined in the schema only; every field is set when these are built. A test checks that
names and types agree with the schema. Names follow Transformers, TRL and PEFT.
"""

from dataclasses import dataclass
from typing import Literal

from job.spec.answer_kinds import LOSS, METRICS, Answer, bare_metric

FORMULAS = "builtin://formulas"
FORMULAS_QUESTION = "Write the LaTeX representation for this image."
"""The question of rows of `builtin://formulas`; other sources need their own."""


Patterns = tuple[tuple[str, int], ...]
"""Numbers by pattern of module names, in the spec's order; `job.families.lora.patterns` matches."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    model_name_or_path: str
    adapter_name_or_path: str | None
    """None starts with a new adapter."""
    revision: str | None
    family: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"]
    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    experts_implementation: Literal[
        "auto", "sorted_grouped_mm", "grouped_mm", "batched_mm", "eager"
    ]
    chat_template: str | None
    """A Jinja template, or the URI of a file with one; None uses the checkpoint's."""
    trust_remote_code: bool
    init: Literal["pretrained", "random"]
    engine: Literal["auto", "transformers", "unsloth"]


@dataclass(frozen=True, kw_only=True)
class ColumnsSpec:
    """The columns of a source; None looks for commonly used names."""

    image: str | None
    text: str | None
    question: str | None
    messages: str | None
    system: str | None
    id: str | None


@dataclass(frozen=True, kw_only=True)
class FormulasSpec:
    """How `builtin://formulas` generates formulas. Does not apply to other sources."""

    seed: int
    math_fontfamily: Literal["cm", "dejavusans", "dejavuserif", "stix", "stixsans"]
    font_size: float
    dpi: int
    width: int
    height: int
    max_tokens: int
    noise: float
    """Standard deviation of gray noise, as a fraction of full scale, 0 to 1."""
    rotation: float
    """Largest rotation in either direction, in degrees."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    uri: str
    format: Literal[
        "auto",
        "jsonl",
        "json",
        "csv",
        "tsv",
        "parquet",
        "arrow",
        "imagefolder",
        "webdataset",
        "save_to_disk",
        "builtin",
    ]
    split: str | None
    columns: ColumnsSpec
    image_folder: str | None
    """None uses the folder of the file that names the images."""
    limit: int | None
    shuffle_seed: int | None
    weight: float | None
    formulas: FormulasSpec


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    train: tuple[SourceSpec, ...]
    """At least one source; a single one in the spec becomes a tuple of one."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"]
    eval: SourceSpec | None
    validation: SourceSpec | None
    instruction: str | None
    """The question for rows that have none; see `question_of`."""
    system: str | None
    train_on: Literal["all", "last"]
    text_only: bool
    allow_image_urls: bool
    min_pixels: int | None
    max_pixels: int | None
    truncation_strategy: Literal["delete", "left", "right"]
    max_bad_rows: int
    eval_fraction: float
    validation_fraction: float
    leakage: Literal["remove", "refuse"]
    leakage_by: Literal["auto", "image_and_answer", "image"]
    streaming: bool
    shuffle_buffer_size: int
    """Number of streamed rows that are shuffled together."""
    num_proc: int | None
    """None uses the cores available to the job."""

    def sources(self) -> dict[str, SourceSpec]:
        """Every source by its JSON path: `$.data.train`, or `$.data.train[0]` etc. if several;
        then `$.data.eval` and `$.data.validation`, if set."""
        one = len(self.train) == 1
        train = {f"$.data.train{'' if one else f'[{n}]'}": s for n, s in enumerate(self.train)}
        held_out = {"$.data.eval": self.eval, "$.data.validation": self.validation}
        return train | {path: source for path, source in held_out.items() if source is not None}

    @property
    def has_validation(self) -> bool:
        """Whether some rows are for validation during training."""
        return self.validation is not None or self.validation_fraction > 0

    def question_of(self, source: SourceSpec) -> str | None:
        """The question for rows of `source` that have none, if any."""
        own = FORMULAS_QUESTION if source.uri == FORMULAS else None
        return self.instruction or own

    @property
    def question(self) -> str | None:
        """The question to ask the trained model; None if each row has its own."""
        return self.question_of(self.train[0])


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    method: Literal["lora", "full"]
    r: int
    lora_alpha: int
    lora_dropout: float
    bias: Literal["none", "all", "lora_only"]
    target_modules: str | tuple[str, ...] | None
    """None uses the family's targets by the toggles; a string is a regular expression."""
    target_parameters: tuple[str, ...] | None
    layers_to_transform: int | tuple[int, ...] | None
    rank_pattern: Patterns
    alpha_pattern: Patterns
    modules_to_save: tuple[str, ...] | None
    use_rslora: bool
    use_dora: bool
    finetune_vision_layers: bool
    finetune_language_layers: bool
    finetune_attention_modules: bool | None
    finetune_mlp_modules: bool
    finetune_experts: bool | None
    """None: names of `target_modules` may select routed experts, the toggles do not."""


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    per_device_train_batch_size: int
    per_device_eval_batch_size: int | Literal["auto"]
    gradient_accumulation_steps: int
    learning_rate: float
    vision_tower_lr: float | None
    """None uses `learning_rate`."""
    loraplus_lr_ratio: float | None
    """None trains both matrices of an adapter at the same learning rate."""
    lr_scheduler_type: str
    warmup_steps: int
    num_train_epochs: float
    max_steps: int
    optim: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    neftune_noise_alpha: float | None
    seed: int
    logging_steps: int
    save_steps: int
    save_total_limit: int
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: int | None
    """None uses `logging_steps`; see `validation_steps`."""
    predict_with_generate: bool | None
    """None depends on the metric; see `generates_answers`."""
    metric_for_best_model: str | None
    """None uses the loss; see `best_metric`."""
    load_best_model_at_end: bool
    early_stopping_patience: int | None
    early_stopping_threshold: float
    gradient_checkpointing: bool | Literal["auto"]
    """Training resolves `auto` before step 1, as it does that of `torch_compile`."""
    torch_compile: bool | Literal["auto"]
    cuda_graphs: bool
    fit: Literal["auto", "on", "off"]
    max_length: int
    packing: Literal[False]
    padding_free: bool
    group_by_length: bool
    router_aux_loss_coef: float | None
    """None uses the checkpoint's value; 0 disables the auxiliary loss."""
    dataloader_num_workers: int
    report_to: tuple[str, ...]
    logging_dir: str | None
    """None uses `logs` under the output."""
    resume_from_checkpoint: str

    @property
    def rows_a_step(self) -> int:
        """Rows that an optimizer step learns from in each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def validates(self) -> bool:
        return self.eval_strategy != "no"

    @property
    def validation_steps(self) -> int:
        """Optimizer steps between validations, if `eval_strategy` is `steps`."""
        return self.logging_steps if self.eval_steps is None else self.eval_steps

    @property
    def best_metric(self) -> str:
        """The metric by which validations are compared, without the prefix `eval_`."""
        return bare_metric(self.metric_for_best_model)

    @property
    def generates_answers(self) -> bool:
        """Whether validations generate answers, in addition to measuring the loss."""
        if self.predict_with_generate is None:
            return self.best_metric != LOSS
        return self.predict_with_generate


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    name: str
    """A reward of `job.spec.answer_kinds.REWARDS`, or `module:function`."""
    weight: float


@dataclass(frozen=True, kw_only=True)
class ReinforceSpec:
    """The stage `reinforce`; names follow TRL's `GRPOConfig`."""

    rewards: tuple[RewardSpec, ...]
    allow_code: bool
    num_generations: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_iterations: int
    max_steps: int
    max_completion_length: int
    temperature: float
    top_p: float
    beta: float
    epsilon: float
    epsilon_high: float | None
    """None uses `epsilon`."""
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"]
    scale_rewards: Literal["group", "batch", "none"]
    mask_truncated_completions: bool
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    optim: str
    weight_decay: float
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    eval_strategy: Literal["no", "steps"]
    eval_steps: int | None
    """None uses `save_steps`."""
    metric_for_best_model: str | None
    """None uses the first of the metrics that are measured."""
    load_best_model_at_end: bool

    @property
    def answers_a_step(self) -> int:
        """Answers that an optimizer step learns from: `num_generations` to each row."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_a_step(self) -> int:
        """Rows that are answered for a step."""
        return self.answers_a_step // self.num_generations

    @property
    def rollouts(self) -> int:
        """How many times answers are generated; each serves `num_iterations` steps."""
        return -(-self.max_steps // self.num_iterations)


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    max_new_tokens: int | Literal["auto"]
    do_sample: bool
    temperature: float
    min_p: float
    enable_thinking: bool


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    max_samples: int
    validation_samples: int
    answer: Answer
    turns: Literal["all", "last"]
    metrics: tuple[str, ...] | None
    """None computes all metrics of the kind of answer; see `measured`."""
    generation: GenerationSpec
    baseline: bool

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics to compute."""
        return METRICS[self.answer] if self.metrics is None else self.metrics


@dataclass(frozen=True, kw_only=True)
class MergedSpec:
    enabled: bool
    dtype: Literal["float16", "bfloat16"]
    max_shard_size: str
    layout: Literal["vllm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    adapter: Literal[True]
    """The adapter is always stored, before the merge starts."""
    merged: MergedSpec
    verify: Literal["reload", "vllm", "none"]
    push_to_hub: bool
    hub_model_id: str | None
    hub_private_repo: bool
    hub_revision: str | None
    """None uses the main branch."""
    hub_content: Literal["auto", "adapter", "merged", "all"]


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    uri: str


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    workdir: str | None
    """None uses `work` under `cache_dir`."""
    cache_dir: str
    cache_limit: str | None
    """A number with its unit, as in `200GB`; None sets no limit."""
    accelerator: Literal["auto", "cpu", "cuda", "rocm"]
    distributed: Literal["auto", "none", "ddp", "fsdp2"]
    metrics_port: int | None
    metrics_file: str | None
    lease_wait: int | Literal["auto"]
    """Seconds."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    version: int
    name: str
    model: ModelSpec
    data: DataSpec
    lora: LoraSpec
    train: TrainSpec
    reinforce: ReinforceSpec | None
    """None leaves the stage out."""
    eval: EvalSpec
    export: ExportSpec
    output: OutputSpec
    runtime: RuntimeSpec

    @property
    def reinforcement_metric(self) -> str | None:
        """The metric by which validations of reinforcement are compared, without the prefix
        `eval_`; None without validations."""
        own = self.reinforce
        if own is None or own.eval_strategy == "no":
            return None
        if own.metric_for_best_model is not None:
            return bare_metric(own.metric_for_best_model)
        return next(iter(self.eval.measured), LOSS)

    @property
    def shards_weights(self) -> bool:
        """Whether the weights of a training are divided among its processes."""
        return self.runtime.distributed == "fsdp2"

    @property
    def shards_trained_weights(self) -> bool:
        """Whether the model's own weights are trained, and divided among the processes."""
        return self.shards_weights and self.lora.method == "full"

    @property
    def reads_shards_only(self) -> bool:
        """Whether each process of a training reads only its shards of the model's weights.

        Not of random ones, which one generator draws in order; nor if an adapter is made from the
        weights (DoRA's magnitudes) or trains some of them (biases): it is made before they are
        sharded.
        """
        made_of_weights = self.lora.use_dora or self.lora.bias != "none"
        return (
            self.shards_weights
            and self.model.init == "pretrained"
            and (self.lora.method == "full" or not made_of_weights)
        )
