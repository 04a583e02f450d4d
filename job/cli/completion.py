"""Shell completion of spec keys, and of options with a few possible values."""

from collections.abc import Callable


def spec_keys(incomplete: str) -> list[str]:
    """Keys of the spec, by dotted name."""
    from job.spec import keys

    return [key for key in keys.dotted_keys() if key.startswith(incomplete)]


def overrides(incomplete: str) -> list[str]:
    """Completes `KEY=`; after the `=`, the values of a key that has a few choices."""
    from job.spec import keys

    key, equals, _ = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in spec_keys(incomplete)]
    node = keys.at(tuple(key.split("."))) or {}
    values = node.get("enum", [])
    if node and "boolean" in keys.types(node):
        values = ["true", "false", *(["auto"] if "string" in keys.types(node) else [])]
    return [text for value in values if (text := f"{key}={value}").startswith(incomplete)]


def one_of(*values: str) -> Callable[[str], list[str]]:
    """A completion function that offers `values`."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
