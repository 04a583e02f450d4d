"""Whether an image holds what it should, and nothing more; run while it is built.

    check.py packages cpu|cuda|rocm|default    the environment is the locks', with that torch
    check.py image cpu|cuda|rocm               no installer is left; a compiler where it is needed

Prints each problem and ends with exit code 1 where there is one.
"""

import base64
import csv
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from tempfile import TemporaryDirectory

LOCKS = Path(__file__).resolve().parent.parent / "requirements"
FORBIDDEN = ("clang", "hipcc", "nvcc", "make", "pip", "pip3")
COMPILERS = ("cc", "gcc", "g++", "c++", "ld")
"""Forbidden too where no GPU needs them."""
BACKENDS = {"cuda": "nvidia", "rocm": "amd"}
"""Triton's names."""
OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")
"""Packages that belong to a CUDA build of torch, unless their version names a build for ROCm: AMD's
own index has such a `triton`, PyTorch's calls it `pytorch-triton-rocm` or `triton-rocm`."""
USED = (
    *("cadam_8bit_blockwise_grad_bf16", "cadam_8bit_blockwise_grad_fp32"),
    *("cquantize_blockwise_bf16_nf4", "cdequantize_blockwise_bf16_nf4"),
)
"""Functions of bitsandbytes' library that the job calls, for 8-bit optimizers and 4-bit weights."""


def packages(accelerator: str) -> Iterator[str]:
    """What is wrong with the packages beside this interpreter."""
    found = {str(package.name).lower().replace("_", "-"): package for package in distributions()}
    for name, version in _pins("base").items():
        yield from _installed(name, version, found)
    for name in ("torch", "torchvision"):
        # The build is behind a plus sign: 2.14.1+rocm7.2.
        yield from _installed(name, _pins("torch")[name], found)
    if "torch" in found:
        yield from _build(accelerator, found)
        yield from _changed(found["torch"])


def _build(accelerator: str, found: dict[str, Distribution]) -> Iterator[str]:
    import torch

    builds = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    if accelerator in builds and not builds[accelerator]:
        yield f"torch {torch.__version__} is no {accelerator} build"
    if accelerator == "cpu" and any(builds.values()):
        yield f"torch {torch.__version__} is no cpu build"
    if accelerator in ("rocm", "cpu"):
        for name in sorted(filter(OF_CUDA.match, found)):
            if not (accelerator == "rocm" and "rocm" in found[name].version.partition("+")[2]):
                yield f"{name} belongs to a CUDA build of torch"
    if "bitsandbytes" in found and accelerator != "default":
        yield from _bitsandbytes(found["bitsandbytes"], builds)


def _bitsandbytes(package: Distribution, builds: dict[str, str | None]) -> Iterator[str]:
    """It has a library for each CUDA and ROCm release that it works with."""
    for name, version in builds.items():
        if version:
            release = "".join(version.split(".")[:2])
            file = f"bitsandbytes/libbitsandbytes_{name}{release}.so"
            library = Path(str(package.locate_file(file)))
            if not library.exists():
                yield f"bitsandbytes does not work here: it has no {library.name}"
            elif reason := _unusable(library):
                yield f"bitsandbytes does not work here: {library.name}: {reason}"
    if not any(builds.values()):
        yield "bitsandbytes does not work here: it needs a GPU"


def _unusable(library: Path) -> str | None:
    """Why bitsandbytes' library does not work in a process that has imported torch, as this one.

    That it exists says little: it needs cuBLAS or hipBLAS, has no path to them, and finds by name
    what torch has loaded. Loading it resolves every symbol, and needs no GPU.
    """
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    missing = [name for name in USED if not hasattr(loaded, name)]
    return f"lacks {', '.join(missing)}" if missing else None


def _changed(package: Distribution) -> Iterator[str]:
    """Files of a package that are not those that it was installed with."""
    # Not `package.files`, which newer versions of Python leave missing files out of.
    for name, recorded, _ in csv.reader((package.read_text("RECORD") or "").splitlines()):
        if not recorded or name.endswith(".pyc"):
            continue
        path = Path(str(package.locate_file(name)))
        if not path.is_file():
            yield f"{package.name} has lost {name}"
            continue
        algorithm, _, expected = recorded.partition("=")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, algorithm).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected:
            yield f"{package.name} was replaced: {name} is another file"


def _installed(name: str, version: str, found: dict[str, Distribution]) -> Iterator[str]:
    there = found[name].version.partition("+")[0] if name in found else "missing"
    if there != version:
        yield f"{name} is {there}; the lock says {version}"


def _pins(lock: str) -> dict[str, str]:
    lines = (LOCKS / f"{lock}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (re.match(r"([a-z0-9-]+)==([^ ;]+)", line.lower()) for line in lines)
    return {pair[1]: pair[2] for pair in pairs if pair}


def image(accelerator: str) -> Iterator[str]:
    """What an image for running has no use for, and what keeps it from compiling for its GPU."""
    compiles = accelerator in BACKENDS
    for name in FORBIDDEN if compiles else FORBIDDEN + COMPILERS:
        if path := shutil.which(name):
            yield f"{path} is left"
    if list(distributions(name="pip")):
        yield "pip is left in the environment"
    if compiles:
        # Nothing that is compiled here may end up in the image.
        with TemporaryDirectory() as folder:
            os.environ |= {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
            yield from _triton(BACKENDS[accelerator])
            yield from _inductor()


def _triton(backend: str) -> Iterator[str]:
    """Compiles the module with which Triton loads and starts kernels, as it does before the first
    one. It is not loaded: that takes the driver's library."""
    import triton
    from triton.runtime.build import compile_so_from_file

    folder = Path(triton.__file__).parent / "backends" / backend
    try:
        compile_so_from_file(
            str(folder / "driver.c"), f"{backend}_driver", include_dirs=[str(folder / "include")]
        )
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        yield f"Triton cannot start kernels here, for it compiles C: {error}"


def _inductor() -> Iterator[str]:
    """Compiles what torch.compile makes of an operation on the CPU, of which a GPU's graph may have
    some."""
    import torch
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.neg)(torch.ones(8))
    except TorchDynamoException as error:
        yield f"torch.compile does not work here, for it compiles C++: {error}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["packages", accelerator]:
            problems = list(packages(accelerator))
        case ["image", "cpu" | "cuda" | "rocm" as accelerator]:
            problems = list(image(accelerator))
        case _:
            sys.exit(__doc__)
    print("\n".join(problems) or "the image is as it should be")
    sys.exit(bool(problems))
