"""The output of `--help`: commands in panels, each with examples to copy.

Coloured and framed on a terminal; plain text otherwise.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from typer import Context
from typer.core import TyperGroup

from job import log

FIRST_STEPS = """
# A spec for rows of your own: a list, a table, or a folder of images.
python -m job init data/receipts

# Is the spec valid? What would it do? Is everything it needs there?
python -m job validate specs/latex.yaml
python -m job plan specs/latex.yaml
python -m job doctor specs/latex.yaml

# Run it. The same command resumes a run that was stopped.
python -m job run specs/latex.yaml

# Another task: JSON from the receipts that specs/receipts.py renders.
python -m job run specs/receipts.yaml

# Global options may also follow the command.
python -m job run specs/latex.yaml --quiet
"""

EXAMPLES: Mapping[str, str] = {
    "run": """
# The whole job.
python -m job run specs/latex.yaml

# A short trial, with its own output.
python -m job run specs/receipts.yaml --set train.max_steps=5 -o /tmp/try

# Push the export to a private repository on the hub, as HF_TOKEN allows.
python -m job run my.yaml -o hf://my-org/my-receipts
""",
    "prep": """
# Look at the data first: rows, rejects, statistics.
python -m job prep my.yaml

# The first 100 rows only.
python -m job prep my.yaml --set data.train.limit=100
""",
    "train": """
# The adapter, without evaluation and export.
python -m job train specs/latex.yaml

# From scratch, instead of from the newest checkpoint.
python -m job train my.yaml --set train.resume_from_checkpoint=never
""",
    "eval": """
# Metrics before and after, with report.html.
python -m job eval specs/latex.yaml

# On more held-out rows, without training again.
python -m job eval specs/receipts.yaml --set eval.max_samples=500

# Another adapter on the same held-out rows, without training.
python -m job eval my.yaml --adapter s3://results/other/adapter --to other
""",
    "export": """
# Merged weights, verified by reloading them.
python -m job export specs/latex.yaml

# Also verified by serving them with vLLM.
python -m job export specs/latex.yaml --verify vllm

# In bfloat16, in files of at most 2 GB.
python -m job export my.yaml --set export.merged.dtype=bfloat16 \\
    --set export.merged.max_shard_size=2GB
""",
    "init": """
# Write receipts.yaml for a folder; asks what the rows do not tell.
python -m job init data/receipts

# Without questions, for a real model.
python -m job init data/rows.jsonl --instruction "What is the total?" \\
    --model hf://baidu/ERNIE-4.5-VL-28B-A3B-PT -o totals.yaml

# Two columns could be the answer: name the right one.
python -m job init data/rows.csv --text-column label --answer label
""",
    "validate": """
# Every problem with its line, value and fix.
python -m job validate my.yaml

# With the overrides of the run to come.
python -m job validate my.yaml --set lora.r=16 --set train.max_steps=100
""",
    "plan": """
# Rows, steps, trainable parameters, memory, disk, stages.
python -m job plan specs/latex.yaml

# Does training fit an MI300X, and what would it cost there?
python -m job plan specs/latex.yaml --accelerator mi300x --price-per-hour 3

# And by four processes that train together, on a GPU each?
python -m job plan my.yaml --accelerator h200 --processes 4

# What would a larger rank change?
python -m job plan specs/receipts.yaml --set lora.r=64
""",
    "infer": """
# What does the trained adapter read in an image?
python -m job infer my.yaml --image receipt.png

# Two images, in this order, and a system prompt.
python -m job infer my.yaml --image before.png --image after.png \\
    --system "Be brief." --question "What changed?"

# A held-out row beside its label; eval/predictions.jsonl has the ids.
python -m job infer my.yaml --row train.jsonl:12

# And the model before training?
python -m job infer my.yaml --image receipt.png --weights base

# With an adapter that another run, or another tool, has trained.
python -m job infer my.yaml --image receipt.png --adapter hf://org/adapter

# Sampled, reproducibly.
python -m job infer my.yaml --image receipt.png --temperature 1.5 --seed 1
""",
    "compare": """
# What did the higher rank change? A table here, the rest on a page.
python -m job compare outputs/r8 outputs/r16

# Many runs, in a bucket too; the page goes to a file of its own.
python -m job compare outputs/r8 s3://results/a s3://results/b \\
    --html sweep.html

# For scripts.
python -m job compare outputs/r8 outputs/r16 --no-html --format json
""",
    "fetch": """
# Merged weights from a bucket, to serve them here.
python -m job fetch s3://results/my-run --to weights

# Only the adapter, after reinforcement the reinforced one.
python -m job fetch outputs/receipts --part adapter --to adapter
""",
    "verify": """
# Is every byte of a run still as it was written?
python -m job verify s3://results/my-run
""",
    "clean": """
# What is left on this machine, its size and age; removes nothing.
python -m job clean

# Remove it from the folders of a spec, and models unused for a week.
python -m job clean my.yaml --unused-days 7 --remove
""",
    "ask": """
# Wait until vLLM is ready, then ask it about an image.
python -m job ask http://localhost:8000 --model my-model --wait 600 \\
    --question "Read it as JSON." --image receipt.png

# Ask a text-only model that was trained with thoughts.
python -m job ask http://localhost:8000 --model my-model --no-image \\
    --enable-thinking --question "What is 17 * 3?"
""",
    "manifest": """
# Run a spec on a cluster with AMD GPUs.
python -m job manifest my.yaml --registry registry.example.com \\
    | kubectl apply -f -

# Serve the exported weights on NVIDIA GPUs.
python -m job manifest my.yaml --platform nvidia --kind vllm

# Does a node's GPU compute what other devices did?
python -m job manifest specs/latex.yaml --kind parity \\
    --registry registry.example.com | kubectl apply -f -

# With what your cluster asks for, kept in a file.
python -m job manifest my.yaml --cluster cluster.yaml --ttl 86400

# The image by its digest, and a volume of yours for the cache.
python -m job manifest my.yaml --cache-claim team-cache \\
    --image registry.example.com/finetune-job@sha256:…
""",
    "doctor": """
# Only this machine.
python -m job doctor

# Also what a run needs: inputs, output, disk, memory, credentials.
python -m job doctor my.yaml --output s3://results/try
""",
    "parity": """
# Does this device compute what others did?
python -m job parity

# With the tests for GPUs, and the record in a bucket.
python -m job parity --tests tests/gpu --to s3://results/parity-mi300x.json
""",
    "schema": """
# For an editor that completes and checks specs.
python -m job schema > job.v1.json
""",
    "reference": """
# One key, by its full or last name; a section; all keys.
python -m job reference optim
python -m job reference lora
python -m job reference | less
""",
}

PANELS: Mapping[str, Sequence[str]] = {
    "Before a run": ("init", "validate", "plan", "doctor", "parity", "reference", "schema"),
    "Run a spec": ("run", "prep", "train", "eval", "export"),
    "After a run": ("infer", "compare", "fetch", "verify", "clean", "ask", "manifest"),
}

GLOBAL_OPTIONS = ("--quiet", "-q", "--verbose", "-v", "--debug", "--log-format")
"""Global options, which may precede or follow the command."""


class Commands(TyperGroup):
    """A Typer group with panels, examples, and global options allowed after the command."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - passed through to Typer's group
        super().__init__(**settings)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        plain = not log.is_terminal(sys.stdout)
        self.epilog = _epilog(FIRST_STEPS, plain)
        for name, command in self.commands.items():
            command.epilog = _epilog(EXAMPLES.get(name, ""), plain)
            command.rich_help_panel = panels.get(name)  # type: ignore[attr-defined]
            # Join the source's lines, so that paragraphs wrap at the terminal's width.
            command.help = re.sub(r"(?<!\n)\n *(?! *\n)", " ", command.help or "")
        if plain:
            for each in (self, *self.commands.values()):
                each.rich_markup_mode = None  # type: ignore[attr-defined]

    def list_commands(self, ctx: Context) -> list[str]:  # type: ignore[override]
        """In the order of the panels."""
        ordered = [name for names in PANELS.values() for name in names if name in self.commands]
        return [*ordered, *(name for name in self.commands if name not in ordered)]

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, with_global_options_first(args))


def with_global_options_first(arguments: Sequence[str]) -> list[str]:
    """Moves global options before the command, where their parser expects them."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word.partition("=")[0] not in GLOBAL_OPTIONS:
            rest.append(word)
        elif word == "--log-format":
            first += [word, *(value for value in (next(words, None),) if value is not None)]
        else:
            first.append(word)
    return [*first, *rest]


def _epilog(examples: str, plain: bool) -> str | None:
    if not examples:
        return None
    text = f"Examples:\n\n{indent(examples.strip(), '  ')}"
    if plain:  # \b: do not rewrap the paragraph
        return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))
    return re.sub(r"^  #.*$", r"[dim]\g<0>[/]", text, flags=re.MULTILINE)
