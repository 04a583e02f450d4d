"""Writes a tree as the tokens of its normal form."""

from job.evaluation.latex.commands import FUNCTIONS
from job.evaluation.latex.tokens import UnreadableError
from job.evaluation.latex.tree import (
    MAX_DEPTH,
    Braces,
    Call,
    Infix,
    Nodes,
    Scripts,
    Symbol,
)


def write(row: Nodes, out: list[str], depth: int) -> None:
    """Appends a row's tokens to `out`."""
    if depth > MAX_DEPTH:
        raise UnreadableError
    for node in row:
        match node:
            case Symbol(tokens):
                out += tokens
            case Braces(inner):
                _write_group(inner, out, depth)
            case Infix(name, left, right):
                write(left, out, depth)
                out.append(name)
                write(right, out, depth)
            case Scripts(base, below, above):
                if base is None:
                    out += ["{", "}"]
                else:
                    write([base], out, depth)
                for mark, script in (("_", below), ("^", above)):
                    if script:
                        out.append(mark)
                        _write_group(script, out, depth)
            case Call(name, arguments, option):
                _write_call(name, arguments, option, out, depth)


def _write_call(
    name: str, arguments: list[Nodes], option: Nodes | None, out: list[str], depth: int
) -> None:
    if name == r"\mathrm":
        letters = [node.tokens[0] for node in arguments[0] if isinstance(node, Symbol)]
        function = "\\" + "".join(letters)
        if len(letters) == len(arguments[0]) and function in FUNCTIONS:
            out.append(function)
            return
    out.append(name)
    if option is not None:
        inner: list[str] = []
        write(option, inner, depth + 1)
        out += ["[", *(["{", *inner, "}"] if "]" in inner else inner), "]"]
    for argument in arguments:
        _write_group(argument, out, depth)


def _write_group(row: Nodes, out: list[str], depth: int) -> None:
    out.append("{")
    write(row, out, depth + 1)
    out.append("}")
