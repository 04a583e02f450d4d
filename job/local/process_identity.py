"""Identifies a process in a file that may outlive it, such as a lock or a lease."""

import time
from pathlib import Path


def boot_id() -> str:
    """The id of the kernel's current boot; empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def utc_now() -> str:
    """The current time in ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
