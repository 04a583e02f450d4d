"""What `--help` shows: the commands by what they are for, each with examples to copy.

On a terminal it is coloured and framed; in a pipe, a file or a dumb terminal it is plain text.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from typer.core import TyperGroup

from job import log

FIRST_STEPS = """
# Is the spec right, what would it do, is all there that it needs?
python -m job validate specs/latex.yaml
python -m job plan specs/latex.yaml
python -m job doctor specs/latex.yaml

# Do it. The same command goes on where a stopped run left off.
python -m job run specs/latex.yaml

# Options of all commands may stand behind the command too.
python -m job run specs/latex.yaml --quiet
"""

EXAMPLES: Mapping[str, str] = {
    "run": """
# The whole job, as the spec says.
python -m job run specs/latex.yaml

# A short trial of it, with its results elsewhere.
python -m job run specs/latex.yaml --set train.max_steps=5 -o /tmp/try
""",
    "prep": """
# Look at the data before anything else: rows, rejects, statistics.
python -m job prep my.yaml

# The first 100 rows only.
python -m job prep my.yaml --set data.train.limit=100
""",
    "train": """
# The adapter, without evaluation and export.
python -m job train specs/latex.yaml

# From the start, instead of from the newest checkpoint.
python -m job train my.yaml --set train.resume_from_checkpoint=never
""",
    "eval": """
# Metrics before and after, with report.html.
python -m job eval specs/latex.yaml

# On more held-out rows; nothing is trained again for it.
python -m job eval specs/latex.yaml --set eval.max_samples=500
""",
    "export": """
# Merged weights with their proof.
python -m job export specs/latex.yaml

# Proven by a vLLM that serves them, too.
python -m job export specs/latex.yaml --verify vllm

# In bfloat16, in files of 2 GB at most.
python -m job export my.yaml --set export.merged.dtype=bfloat16 \\
    --set export.merged.max_shard_size=2GB
""",
    "validate": """
# Every problem with its line, value and fix.
python -m job validate my.yaml

# With the changes that you mean to run it with.
python -m job validate my.yaml --set lora.r=16 --set train.max_steps=100
""",
    "plan": """
# Rows, steps, trainable parameters, sizes, stages to come.
python -m job plan specs/latex.yaml

# Does it fit that accelerator, and what would training cost there?
python -m job plan specs/latex.yaml --accelerator mi300x --price-per-hour 3

# What would a larger rank change?
python -m job plan specs/latex.yaml --set lora.r=64
""",
    "infer": """
# What does the trained adapter read in an image?
python -m job infer my.yaml --image formula.png

# Two images, in this order, and a system text.
python -m job infer my.yaml --image before.png --image after.png \\
    --system "Be brief." --question "What changed?"

# A held-out row beside its label; eval/predictions.jsonl has the ids.
python -m job infer my.yaml --row train.jsonl:12

# And the model before training?
python -m job infer my.yaml --image formula.png --weights base

# Sampled, the same at every call.
python -m job infer my.yaml --image formula.png --temperature 1.5 --seed 1
""",
    "fetch": """
# Merged weights from a bucket, for a server here.
python -m job fetch s3://results/my-run --to weights

# The adapter alone.
python -m job fetch outputs/latex --part adapter --to adapter
""",
    "verify": """
# Is every byte of a run still what the run wrote?
python -m job verify s3://results/my-run
""",
    "clean": """
# What is left on this machine, how large and how old; nothing is removed.
python -m job clean

# Remove it, where a spec keeps its files; models unused for a week too.
python -m job clean my.yaml --unused-days 7 --remove
""",
    "ask": """
# Wait until vLLM is ready, then ask it about a picture.
python -m job ask http://localhost:8000 --model my-model --wait 600 \\
    --question "Write the LaTeX representation for this image." \\
    --image formula.png
""",
    "manifest": """
# Run a spec on a cluster with AMD GPUs.
python -m job manifest my.yaml --registry registry.example.com \\
    | kubectl apply -f -

# Serve what it exported, on NVIDIA.
python -m job manifest my.yaml --platform nvidia --kind vllm
""",
    "doctor": """
# This machine alone.
python -m job doctor

# And what a run needs: inputs, output, disk, memory, accounts.
python -m job doctor my.yaml --output s3://results/try
""",
    "schema": """
# For an editor that completes and checks the keys of a spec.
python -m job schema > job.v1.json
""",
    "reference": """
# One key, by its last name or in full; a section; everything.
python -m job reference optim
python -m job reference lora
python -m job reference | less
""",
}

PANELS: Mapping[str, Sequence[str]] = {
    "Before a run": ("validate", "plan", "doctor", "reference", "schema"),
    "Run a spec": ("run", "prep", "train", "eval", "export"),
    "After a run": ("infer", "fetch", "verify", "clean", "ask", "manifest"),
}

EVERYWHERE = ("--quiet", "-q", "--verbose", "-v", "--debug", "--log-format")
"""Options of all commands."""


class Commands(TyperGroup):
    """The commands with their examples; options of all may stand behind a command too."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        plain = not log.is_terminal(sys.stdout)
        self.epilog = _epilog(FIRST_STEPS, plain)
        for name, command in self.commands.items():
            command.epilog = _epilog(EXAMPLES.get(name, ""), plain)
            command.rich_help_panel = panels.get(name)  # type: ignore[attr-defined]
            # Lines are for the reader of the code; a paragraph is as wide as the terminal.
            command.help = re.sub(r"(?<!\n)\n *(?! *\n)", " ", command.help or "")
        if plain:
            for each in (self, *self.commands.values()):
                each.rich_markup_mode = None  # type: ignore[attr-defined]

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the panels."""
        ordered = [name for names in PANELS.values() for name in names if name in self.commands]
        return [*ordered, *(name for name in self.commands if name not in ordered)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoisted(args))


def hoisted(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options of all commands first, where their parser looks for them."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word.partition("=")[0] not in EVERYWHERE:
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
    if plain:  # \b: the lines of a paragraph stay as they are
        return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))
    return re.sub(r"^  #.*$", r"[dim]\g<0>[/]", text, flags=re.MULTILINE)
