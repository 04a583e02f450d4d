"""Overlays as the difference between two renderings, so that no value is written twice."""

from collections.abc import Iterator, Sequence

from job.kubernetes.context import Object

Operation = dict[str, object]
"""An RFC 6902 (JSON Patch) operation."""


def between(before: Sequence[Object], after: Sequence[Object]) -> list[Object]:
    """The `patches` of a kustomization that turn one rendering into the other.

    Both hold the same objects, in the same order.
    """
    patches = []
    for old, new in zip(before, after, strict=True):
        operations = list(_operations(old, new, ""))
        if operations:
            patches.append({"target": _target(old), "patch": operations})
    return patches


def _target(document: Object) -> Object:
    group, _, version = document["apiVersion"].rpartition("/")
    target = {"version": version, "kind": document["kind"]}
    return {"group": group, **target} if group else target


def _operations(old: object, new: object, path: str) -> Iterator[Operation]:
    """The operations from `old` to `new`; lists are patched by index and may only grow."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            pointer = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                yield {"op": "remove", "path": pointer}
            elif key not in old:
                yield {"op": "add", "path": pointer, "value": new[key]}
            else:
                yield from _operations(old[key], new[key], pointer)
    elif isinstance(old, list) and isinstance(new, list) and len(old) <= len(new):
        for index, item in enumerate(old):
            yield from _operations(item, new[index], f"{path}/{index}")
        for item in new[len(old) :]:
            yield {"op": "add", "path": f"{path}/-", "value": item}
    else:
        yield {"op": "replace", "path": path, "value": new}
