#!/bin/sh
# The first stage of each image: the locked packages in /opt/venv. Takes ACCELERATOR, TORCH_INDEX,
# EXTRAS and PIP_INDEX_URL as requirements/install.sh and pip do, and APT_MIRROR.
set -eu
export DEBIAN_FRONTEND=noninteractive

# Another host with the same paths; apt checks signatures, so http will do, as before certificates.
if [ -n "${APT_MIRROR:-}" ]; then
    find /etc/apt/sources.list* -type f -exec sed -i -E "s|https?://[^/ ]+|${APT_MIRROR%/}|" {} +
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv /opt/venv
# Wheels are kept in a cache mount, which is no part of any image. cpu.Containerfile takes the plain
# wheels with ACCELERATOR=default.
PYTHON=/opt/venv/bin/python PIP_CACHE_DIR=/root/.cache/pip PIP_ONLY_BINARY=:all: requirements/install.sh
# The packages are complete; whatever could change them is not needed any more.
/opt/venv/bin/python -m pip uninstall -qq -y pip
