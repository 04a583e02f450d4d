"""Every problem is told at once, in words that say what to write instead."""

import pytest

from job.errors import Problem, SpecError
from job.spec.load import load_spec

METRICS = [
    "exact_match", "exact_match_normalized", "cer", "wer", "token_edit_distance", "bleu",
    "render_match", "valid_json", "exact_object", "field_precision", "field_recall", "field_f1",
    "accuracy", "macro_f1",
]  # fmt: skip
MAPPINGS = "must be a mapping of keys or a non-empty list of mappings of keys"
MINIMAL = """
version: 1
name: sample
model: {model_name_or_path: models/base}
data: {train: {uri: data/train.jsonl}}
output: {uri: outputs/sample}
"""


def _problems(text: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        load_spec(text, "job.yaml", environ={})
    assert caught.value.exit_code == 10
    return list(caught.value.problems)


def _only(extra: str) -> Problem:
    (problem,) = _problems(MINIMAL + extra)
    return problem


def test_a_problem_reads_as_place_path_reason_value_fix_and_entry() -> None:
    assert str(_only("train:\n  seed: 1\n  learning_rate: -1\n")) == (
        "job.yaml:9 $.train.learning_rate: must be a number greater than 0 and less than 1 "
        "(found -1)\n"
        "    fix: the default is 0.0002\n"
        "    see: python -m job reference train.learning_rate"
    )


@pytest.mark.parametrize(
    ("extra", "message", "value", "fix"),
    [
        (
            "train: {learning_rate: '2e-4'}",
            "must be a number greater than 0 and less than 1",
            '"2e-4"',
            "write 2e-4 without quotes",
        ),
        (
            "train: {save_steps: 1_000}",
            "must be a whole number of at least 1",
            "1_000",
            "write 1000",
        ),
        (
            "train: {learning_rate: '0,0002'}",
            "must be a number greater than 0 and less than 1",
            "0,0002",
            "write 0.0002",
        ),
        (
            "train: {learning_rate: '2,5e-4'}",
            "must be a number greater than 0 and less than 1",
            "2,5e-4",
            "write 2.5e-4",
        ),
        (
            "train: {save_steps: '1,000,000'}",
            "must be a whole number of at least 1",
            "1,000,000",
            "write 1000000",
        ),
        (
            "train: {save_steps: '1,5'}",
            "must be a whole number of at least 1",
            "1,5",
            "the default is 100",
        ),
        (
            "train: {save_steps: 1.5}",
            "must be a whole number of at least 1",
            "1.5",
            "the default is 100",
        ),
        (
            "train: {max_steps: }",
            "must be a whole number of at least -1",
            "null",
            "remove the line to use the default, -1",
        ),
        (
            "train: {gradient_checkpointing: yes}",
            "must be true, false or auto",
            "yes",
            "write true",
        ),
        (
            "train: {gradient_checkpointing: Off}",
            "must be true, false or auto",
            "Off",
            "write false",
        ),
        ("train: {gradient_checkpointing: 0}", "must be true, false or auto", "0", "write false"),
        ("train: {padding_free: yes}", "must be true or false", "yes", "write true"),
        (
            "train: {packing: true}",
            "must be false: packing is not supported in this version",
            "true",
            "write false",
        ),
        (
            "export: {adapter: no}",
            "must be true: the adapter is always stored",
            "no",
            "write true",
        ),
        (
            "runtime: {accelerator: cud}",
            "must be one of auto, cpu, cuda, rocm",
            "cud",
            "write cuda",
        ),
        (
            "runtime: {accelerator: GPU}",
            "must be one of auto, cpu, cuda, rocm",
            "GPU",
            "write auto, which uses a GPU if there is one",
        ),
        (
            "train: {optim: lamb}",
            "must be one of auto, adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit, "
            "adafactor, sgd",
            "lamb",
            "the default is auto",
        ),
        (
            "train: {optim: adamw}",
            "must be one of auto, adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit, "
            "adafactor, sgd",
            "adamw",
            "write adamw_torch",
        ),
        (
            "eval: {metrics: [cer, blue]}",
            f"must be one of {', '.join(METRICS)}",
            "blue",
            "write bleu",
        ),
        (
            "eval: {metrics: cer}",
            f"must be a non-empty list of {', '.join(METRICS)} or null",
            "cer",
            "write [cer]",
        ),
        (
            "eval: {metrics: []}",
            "must not be empty",
            "[]",
            'for example ["exact_match", "cer"]',
        ),
        (
            "eval: {metrics: [cer, cer]}",
            "must not contain an item twice",
            '["cer", "cer"]',
            "remove the second",
        ),
        (
            "train: {report_to: none}",
            "must be a list of mlflow, tensorboard, wandb",
            "none",
            "write []",
        ),
        ("runtime: {cache_dir: 12}", "must be text", "12", "put it in quotes"),
        ("runtime: {cache_dir: ''}", "must not be empty", '""', "the default is ~/.cache/finetune"),
        ("lora: 5", "must be a mapping of keys", "5", "indent its keys under it"),
        *(
            (
                f"reinforce: {{rewards: {given}}}",
                message,
                found,
                "list its items under it, for example - {name: exact_match}",
            )
            for given, found, message in (
                ("[]", "[]", "must not be empty"),
                ("null", "null", MAPPINGS),
                ("exact_match", "exact_match", MAPPINGS),
                ("[exact_match]", "exact_match", "must be a mapping of keys"),
            )
        ),
        ("lora:", "must be a mapping of keys", "null", "remove the line to use the default, {}"),
        (
            "lora: {target_modules: 5}",
            "must be text or a non-empty list of text or null",
            "5",
            "put it in quotes",
        ),
        (
            "lora: {lora_dropout: 1}",
            "must be a number of at least 0 and less than 1",
            "1",
            "the default is 0",
        ),
        (
            "train: {learning_rate: .inf}",
            "must be a number greater than 0 and less than 1",
            "Infinity",
            "the default is 0.0002",
        ),
        ("train: {learning_rate: .nan}", "must be a finite number", "NaN", None),
        (
            "train: {save_steps: 1e20}",
            "must fit into 64 bits",
            "1e+20",
            None,
        ),
        (
            'runtime: {cache_dir: "a\\u2028b"}',
            "must not start or end with a space or contain a line break",
            "a\\u2028b",
            "remove the spaces and line breaks",
        ),
        (
            "export: {merged: {max_shard_size: 5GiB}}",
            "must be a number and a unit of KB, MB, GB or TB",
            "5GiB",
            "the default is 5GB",
        ),
        (
            "runtime: {cache_dir: 'a '}",
            "must not start or end with a space or contain a line break",
            "a ",
            "remove the spaces and line breaks",
        ),
        (
            'runtime: {cache_dir: "\\ud800"}',
            "must be Unicode text",
            "\\ud800",
            "save it as UTF-8",
        ),
    ],
)
def test_what_a_key_cannot_hold(extra: str, message: str, value: str, fix: str | None) -> None:
    problem = _only(extra)
    assert (problem.message, problem.value) == (message, value)
    assert problem.fix == fix or (problem.fix and fix and problem.fix.startswith(fix))


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("My_Job", "must be lower-case letters, digits and hyphens", "write my-job"),
        ("-a", "must be lower-case letters, digits and hyphens", "write a"),
        ("a.b", "must be lower-case letters, digits and hyphens", "write a-b"),
        ("a" * 53, "must be text of at most 52 characters", "write " + "a" * 52),
    ],
)
def test_a_name_that_kubernetes_refuses(name: str, message: str, fix: str) -> None:
    (problem,) = _problems(MINIMAL.replace("name: sample", f"name: {name}"))
    assert problem.message.startswith(message)
    assert problem.fix == fix


@pytest.mark.parametrize("name", ["a", "a" * 52, "0-9", "latex--ocr"])
def test_a_name_that_kubernetes_takes(name: str) -> None:
    text = MINIMAL.replace("name: sample", f"name: '{name}'")
    assert load_spec(text, "job.yaml", environ={}).spec.name == name


def test_texts_for_the_model_and_templates_may_have_lines_and_locations_may_not() -> None:
    text = MINIMAL.replace("base}", 'base, chat_template: "{{ a }}\\n{{ b }}\\n"}')
    text = text.replace("jsonl}", 'jsonl}, system: " a\\nb\\n"', 1)
    spec = load_spec(text, "job.yaml", ['data.instruction="a\\nb"'], {}).spec
    assert (spec.data.instruction, spec.data.system) == ("a\nb", " a\nb\n")
    assert spec.model.chat_template == "{{ a }}\n{{ b }}\n"
    with pytest.raises(SpecError, match="line break"):
        load_spec(MINIMAL, "job.yaml", ['model.chat_template="a\\nb.jinja"'], {})


def test_a_name_with_a_line_break_is_refused() -> None:
    (problem,) = _problems(MINIMAL.replace("name: sample", "name: |\n  sample"))
    assert problem.message.startswith("must ")


@pytest.mark.parametrize(
    ("section", "key", "fix"),
    [
        ("train", "lr", "write learning_rate"),
        ("train", "batch_size", "write per_device_train_batch_size"),
        ("train", "micro_batch_size", "write per_device_train_batch_size"),
        ("train", "epochs", "write num_train_epochs"),
        ("train", "max_seq_length", "write max_length"),
        ("train", "sequence_len", "write max_length"),
        ("train", "cutoff_len", "write max_length"),
        ("train", "optimizer", "write optim"),
        ("train", "scheduler", "write lr_scheduler_type"),
        ("train", "lr_scheduler", "write lr_scheduler_type"),
        ("train", "learning_rat", "write learning_rate"),
        ("train", "Learning-Rate", "write learning_rate"),
        ("train", "lora_alpha", "move it to lora.lora_alpha"),
        ("train", "alpha", "move it to lora.lora_alpha"),
        ("train", "lora_alhpa", "move it to lora.lora_alpha"),
        ("train", "uri", "move it to data.train.uri or output.uri"),
        (
            "train",
            "fp16",
            "remove it: float16 training diverges without loss scaling; "
            "export.merged.dtype: float16 still exports it",
        ),
        (
            "train",
            "bf16",
            "write model.dtype: bfloat16, which auto uses for adapters on a GPU",
        ),
        (
            "train",
            "eval_delay",
            "remove it: train.eval_strategy and train.eval_steps say when to validate, "
            "eval.metrics what to measure",
        ),
        ("train", "seed_", "write seed"),
        ("lora", "seed", "move it to train.seed"),
        ("train", "warmup_ratio", "write train.warmup_steps, the number of warmup steps"),
        (
            "train",
            "deepspeed",
            "write runtime.distributed: fsdp2, which shards the weights across processes",
        ),
        ("train", "fsdp", "write runtime.distributed: fsdp2"),
        (
            "train",
            "path",
            "move it to model.model_name_or_path or data.train.uri or output.uri",
        ),
        ("lora", "rank", "write r"),
        ("lora", "alpha", "write lora_alpha"),
        (
            "runtime",
            "zzz",
            "remove it; valid keys: workdir, cache_dir, cache_limit, accelerator, "
            "distributed, metrics_port, metrics_file, lease_wait",
        ),
    ],
)
def test_an_unknown_key_leads_to_the_known_one(section: str, key: str, fix: str) -> None:
    problem = _only(f"{section}: {{{key}: 1}}")
    assert problem.message == "is not a known key"
    assert problem.fix == fix


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("learning_rate: 1", "move it to train.learning_rate"),
        ("model_name: x", "move it to model.model_name_or_path"),
        ("base_model: x", "move it to model.model_name_or_path"),
        ("peft: {}", "write lora"),
        ("training: {}", "write train"),
        ("outptu: {}", "write output"),
        ("load_in_4bit: true", "move it to model.load_in_4bit"),
        ("load_in_8bit: true", "remove it: this version quantizes frozen weights to 4 bits only"),
        (
            '"": 1',
            "remove it; valid keys: version, name, model, data, lora, train, reinforce",
        ),
    ],
)
def test_an_unknown_section_leads_to_the_known_one(line: str, fix: str) -> None:
    problem = _only(line)
    assert problem.message == "is not a known key"
    assert problem.fix is not None
    assert problem.fix.startswith(fix)


def test_an_unknown_key_of_the_evaluation_source_leads_to_its_own_keys() -> None:
    text = MINIMAL.replace("jsonl}}", "jsonl}, eval: {uri: x, max_samples: 1, learning_rate: 1}}")
    assert [problem.fix for problem in _problems(text)] == [
        "write limit",
        "move it to train.learning_rate",
    ]


@pytest.mark.parametrize("name", ["url", "path", "location"])
@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("model: {model_name_or_path: models/base", "write model_name_or_path"),
        ("data: {train: {uri: data/train.jsonl}", "move it to data.train.uri"),
        ("data: {train: {uri: data/train.jsonl", "write uri"),
        ("output: {uri: outputs/sample", "write uri"),
    ],
)
def test_a_word_for_where_a_thing_lies_leads_to_the_key_of_its_section(
    line: str, fix: str, name: str
) -> None:
    (problem,) = _problems(MINIMAL.replace(line, f"{line}, {name}: x"))
    assert (problem.message, problem.fix) == ("is not a known key", fix)


def test_a_path_that_is_no_word_is_quoted() -> None:
    assert _only("'a b': 1").field == 'job.yaml:7 $["a b"]'


def test_missing_sections_and_keys_say_what_to_add() -> None:
    assert [
        str(problem) for problem in _problems("version: 1\nname: a\nmodel: {}\ndata: {}\n")
    ] == [
        "job.yaml $.output: is missing\n    fix: add `output:` with at least uri in it\n   "
        " see: python -m job reference output",
        "job.yaml:3 $.model.model_name_or_path: is missing\n"
        "    fix: add `model_name_or_path: hf://baidu/ERNIE-4.5-VL-28B-A3B-PT`, or the like\n"
        "    see: python -m job reference model.model_name_or_path",
        "job.yaml:4 $.data.train: is missing\n    fix: add `train:` with at least uri in "
        "it\n    see: python -m job reference data.train",
    ]


def test_another_version_is_refused() -> None:
    (problem,) = _problems(MINIMAL.replace("version: 1", "version: 2"))
    assert (problem.message, problem.value, problem.fix) == ("must be 1", "2", "write 1")


def test_problems_of_every_kind_are_told_at_once_in_the_order_of_the_lines() -> None:
    text = """
version: 1
name: Sample
model: {model_name_or_path: 'builtin://nothing'}
data:
  train: {uri: data/train.jsonl}
  min_pixels: 9
  max_pixels: 4
train:
  lr: 1
  seed: ${SEED}
  max_steps: 0
output: {uri: outputs/sample}
"""
    assert [problem.field for problem in _problems(text)] == [
        "job.yaml:3 $.name",
        "job.yaml:4 $.model.model_name_or_path",
        "job.yaml:7 $.data.min_pixels",
        "job.yaml:10 $.train.lr",
        "job.yaml:11 $.train.seed",
        "job.yaml:12 $.train.max_steps",
    ]


def test_a_value_that_is_wrong_in_itself_has_one_problem_only() -> None:
    assert _only("train: {seed: '${SEED}'}").message.startswith("the environment variable SEED")
    assert _only("eval: {generation: {temperature: hot}}").message.startswith("must be a number")
