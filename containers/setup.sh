#!/bin/sh
# What the three images share; each Containerfile calls one part in each of its stages.
#
#   setup.sh build     the packages into /opt/venv. Takes ACCELERATOR, TORCH_INDEX and EXTRAS as
#                      requirements/install.sh does.
#   setup.sh runtime   an interpreter for them, and the user who runs the job. Takes JOB_UID.
#   setup.sh finish    writes the command `finetune-job`, compiles the sources, checks the image.
set -eu
export DEBIAN_FRONTEND=noninteractive

debian() {
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

case "$1" in
build)
    debian ca-certificates python3 python3-venv
    python3 -m venv /opt/venv
    # cpu.Containerfile takes the plain wheels with ACCELERATOR=default.
    PYTHON=/opt/venv/bin/python PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: requirements/install.sh
    # The packages are complete; whatever could change them is not needed any more.
    /opt/venv/bin/python -m pip uninstall -qq -y pip
    /opt/venv/bin/python containers/check.py packages "$ACCELERATOR"
    ;;
runtime)
    debian ca-certificates python3
    groupadd --gid "$JOB_UID" job
    useradd --uid "$JOB_UID" --gid "$JOB_UID" --no-create-home --home-dir /cache --shell /usr/sbin/nologin job
    # Group 0 too: OpenShift runs the job as a user that it chooses, in this group.
    install -d -m 0775 -o "$JOB_UID" -g 0 /cache /work
    ;;
finish)
    # The command `finetune-job`; pip, which would write it, is gone.
    printf '%s\n' '#!/opt/venv/bin/python' 'from job.__main__ import main' 'main()' > /opt/venv/bin/finetune-job
    chmod 755 /opt/venv/bin/finetune-job
    # Nobody can write beside the sources later on.
    /opt/venv/bin/python -m compileall -q /opt/finetune/job
    /opt/venv/bin/python containers/check.py image
    ;;
*)
    echo "setup.sh: build, runtime or finish (found $1)" >&2
    exit 2
    ;;
esac
