"""Bytes as Kubernetes writes them."""

from job.planning.sizes import GIB


def quantity(count: int) -> str:
    """`78Gi`. Asserts that it is whole GiB, as needs are."""
    assert count % GIB == 0, "needs are whole GiB"
    return f"{count // GIB}Gi"
