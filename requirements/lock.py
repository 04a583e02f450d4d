"""Writes the lock files of this folder from pyproject.toml: exact pins, no index addresses.

    python requirements/lock.py            (needs uv on the PATH; `make lock` has it there)
    python requirements/lock.py --upgrade

Pins that fit the ranges of pyproject.toml stay; `--upgrade` takes the newest versions that fit.

One resolution for Linux covers every extra, at the oldest Python supported (what it picks
installs on 3.12 too), so that no extra can move a base package. It is then split by who installs
what:

    torch.txt      torch, torchvision and what only they need: replaced as a whole by
                   `make setup ACCELERATOR=rocm|cpu TORCH_INDEX=...`
    base.txt       everything else the job needs
    <extra>.txt    what the extra adds to the two above
    serving.txt    the dependency group of that name: vLLM, in an environment of its own

All of them are installed with `pip --no-deps`, so nothing later can replace torch.
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
TORCH_STACK = re.compile(r"^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
# vLLM's wheel for a CPU asks for torch's build for one, which has an index of its own; the plain
# build serves as well. Its audio and video packages, which nothing here uses, fail to import.
SERVING = (
    "torch==2.13.0",
    "torchvision==0.28.0",
    "torchaudio; python_version < '3'",
    "torchcodec; python_version < '3'",
)
HEADER = "# Made by requirements/lock.py from pyproject.toml; do not edit.\n"


def resolve(extras: list[str], constraints: list[str], kept: Sequence[str] = ()) -> list[str]:
    """The pins, one a line with its environment marker, for the base and the extras named.

    The pins in `kept` are preferred to newer versions.
    """
    what = ["pyproject.toml", *(word for extra in extras for word in ("--extra", extra))]
    return _compile([*what, *(["--constraint", "-"] if constraints else [])], constraints, kept)


def _compile(what: list[str], lines: Sequence[str], kept: Sequence[str]) -> list[str]:
    command = ["uv", "pip", "compile", "--quiet", "--python-version", "3.11"]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate"]
    with TemporaryDirectory() as folder:
        lock = Path(folder, "lock.txt")  # uv prefers the pins that are in its output file
        lock.write_text("\n".join(kept))
        done = subprocess.run(  # noqa: S603 - fixed words and the names of extras
            [*command, "--output-file", str(lock), *what],
            cwd=ROOT,
            input="\n".join(lines),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        return lock.read_text().splitlines()


def pins(*names: str) -> list[str]:
    """The pins of the lock files with these names, as they are now."""
    texts = [(LOCKS / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    return [line for text in texts for line in text.splitlines() if not line.startswith("#")]


def write(name: str, locked: list[str]) -> None:
    (LOCKS / f"{name}.txt").write_text(HEADER + "\n".join(locked) + "\n", encoding="utf-8")
    print(f"requirements/{name}.txt  {len(locked)} packages")


def main() -> None:
    upgrade = "--upgrade" in sys.argv[1:]
    extras = list(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    kept = [] if upgrade else pins("base", "torch", *extras)
    everything = resolve(extras, [], kept)
    base = resolve([], everything)
    write("torch", [pin for pin in base if TORCH_STACK.match(pin)])
    write("base", [pin for pin in base if not TORCH_STACK.match(pin)])
    for extra in extras:
        write(extra, [pin for pin in resolve([extra], everything) if pin not in base])
    kept = [] if upgrade else pins("serving")
    serving = _compile(["--group", "serving", "--override", "-"], SERVING, kept)
    # Nothing but this build: where one for a CPU (2.13.0+cpu) is at hand, `==` takes it, and the
    # plain torchvision does not load beside it.
    write("serving", [re.sub(r"^torch==", "torch===", pin) for pin in serving])


if __name__ == "__main__":
    main()
