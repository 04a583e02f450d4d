#!/usr/bin/env bash
# Installs the locked packages into the Python given as $PYTHON (a virtual environment's, or a
# container's). The Makefile and the container builds both call this, so their packages are the same.
#
#   PYTHON       the interpreter to install into (required)
#   ACCELERATOR  default | cuda | cpu | rocm. default and cuda use the plain wheels, which run on
#                a CPU and on CUDA; cpu and rocm install torch from TORCH_INDEX
#   TORCH_INDEX  the package index with that torch build
#   EXTRAS       any of: dev gpu trackers unsloth
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:?set PYTHON to the interpreter to install into}
ACCELERATOR=${ACCELERATOR:-default}
PIP=("$PYTHON" -m pip --disable-pip-version-check)

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }
pin() { grep -E "^$1==" torch.txt; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
    die "$PYTHON is Python $("$PYTHON" -V | cut -d' ' -f2); this project needs 3.11 or 3.12. Fix: make setup PYTHON=python3.12"

case "$ACCELERATOR" in
default | cuda) ;;
cpu | rocm) [ -n "${TORCH_INDEX:-}" ] ||
    die "ACCELERATOR=$ACCELERATOR needs TORCH_INDEX=<package index with that torch build>" ;;
*) die "ACCELERATOR=$ACCELERATOR is unknown; known: default cuda cpu rocm" ;;
esac

locks=(-r base.txt)
for extra in ${EXTRAS:-}; do
    # By name: not every lock file belongs to an extra.
    case "$extra" in
    dev | gpu | trackers | unsloth) ;;
    *) die "EXTRAS names '$extra'; known: dev gpu trackers unsloth" ;;
    esac
    locks+=(-r "$extra.txt")
done

# pip before 24 backtracks on a set of this size even if everything is pinned.
"${PIP[@]}" install -qq "pip==26.3"

# --no-deps throughout: the locks are complete, and nothing may install another torch.
# Compiled at the end, by every core: pip compiles with one, which took a third of its time.
say "installing the locked packages; the first time takes some minutes"
"${PIP[@]}" install -qq --no-deps --no-compile "${locks[@]}"

case "$ACCELERATOR" in
default | cuda)
    say "installing $(pin torch), $(pin torchvision) (CUDA wheels; they run on a CPU too)"
    "${PIP[@]}" install -qq --no-deps --no-compile -r torch.txt ;;
cpu | rocm)
    say "installing $(pin torch), $(pin torchvision) from TORCH_INDEX"
    # Both from one index in one step, so that their builds match. What only this torch needs
    # (pytorch-triton-rocm) comes with it; the rest is installed already.
    "${PIP[@]}" install -qq --no-compile --index-url "$TORCH_INDEX" "$(pin torch)" "$(pin torchvision)" ;;
esac

# Some packages hold files for other versions of Python, which pip passes over in silence as well.
"$PYTHON" -m compileall -qq -j 0 "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true

"$PYTHON" - "$ACCELERATOR" <<'PY'
import sys
import torch, torchvision
built = [module.__version__.partition("+")[2] for module in (torch, torchvision)]
if built[0] != built[1]:
    raise SystemExit(f"setup: torch is build {built[0]!r} and torchvision {built[1]!r}; their builds must match")
torchvision.ops.nms  # fails to resolve if their builds do not match
found = "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
# A mirror without the ROCm build may have another of the same version.
if sys.argv[1] == "rocm" and found != "ROCm":
    raise SystemExit(f"setup: ACCELERATOR=rocm, but TORCH_INDEX gave the {found} build of torch {torch.__version__}. "
                     "Fix: name an index that has this version for ROCm")
print(f"torch {torch.__version__} ({found} build), torchvision {torchvision.__version__}, "
      f"{torch.cuda.device_count()} GPU(s)")
PY
