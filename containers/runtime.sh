#!/bin/sh
# The second stage of each image: what the packages need of the system for ACCELERATOR, and the user
# who runs the job, whose number is JOB_UID. APT_MIRROR is as in build.sh.
set -eu
export DEBIAN_FRONTEND=noninteractive

# Another host with the same paths; apt checks signatures, so http will do, as before certificates.
if [ -n "${APT_MIRROR:-}" ]; then
    own=$(mktemp -d)
    cp -a /etc/apt/sources.list* "$own"
    find /etc/apt/sources.list* -type f -exec sed -i -E "s|https?://[^/ ]+|${APT_MIRROR%/}|" {} +
fi
apt-get update -qq
# NCCL and RCCL look for the library of InfiniBand and RoCE when they start, and else use TCP.
set -- ca-certificates python3 ibverbs-providers libibverbs1
if [ "$ACCELERATOR" != cpu ]; then
    # For the job, while it runs: Triton compiles the C module that loads and starts its kernels,
    # torch.compile the C++ of what a compiled block computes on the CPU. Both include Python.h.
    set -- "$@" gcc g++ libpython3-dev
fi
apt-get install -y -qq --no-install-recommends "$@"
# The mirror is for the build: the image keeps the sources of its base.
if [ -n "${APT_MIRROR:-}" ]; then
    cp -a "$own"/sources.list* /etc/apt/
    rm -rf "$own"
fi
rm -rf /var/lib/apt/lists/*
groupadd --gid "$JOB_UID" job
useradd --uid "$JOB_UID" --gid "$JOB_UID" --no-create-home --home-dir /cache --shell /usr/sbin/nologin job
# Group 0 too: OpenShift runs the job as a user that it chooses, in this group.
install -d -m 0775 -o "$JOB_UID" -g 0 /cache /work
