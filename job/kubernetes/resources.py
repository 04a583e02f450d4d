"""Resource quantities."""

from job.planning.sizes import GIB

TIB = 1024 * GIB


def quantity(count: int) -> str:
    """Bytes as a quantity in the form that API servers store, such as `78Gi` or `2Ti`."""
    assert count % GIB == 0, "needs are whole GiB"
    return f"{count // GIB}Gi" if count % TIB else f"{count // TIB}Ti"
