"""Objects as readable YAML: block scalars, keys in insertion order, a comment on top."""

from collections.abc import Sequence

import yaml

from job.kubernetes.context import Object


def dump(documents: Sequence[Object], comment: str = "") -> str:
    """The documents as a YAML stream, below the comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    bodies = [
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
        for document in documents
    ]
    return head + "---\n".join(bodies)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
