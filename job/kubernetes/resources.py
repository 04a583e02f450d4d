"""Resource quantities."""

from job.planning.sizes import GIB


def quantity(count: int) -> str:
    """Bytes as a quantity, such as `78Gi`."""
    assert count % GIB == 0, "needs are whole GiB"
    return f"{count // GIB}Gi"
