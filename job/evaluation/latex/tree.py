"""A formula's syntax tree: rows of symbols, groups, commands with arguments, and scripts."""

from dataclasses import dataclass, field

from job.evaluation.latex.commands import CELL_ENDS, FONTS

MAX_DEPTH = 48  # nested groups: no formula is deeper, and Python's stack is finite


@dataclass
class Symbol:
    """One token, or a command with its verbatim arguments."""

    tokens: list[str]


@dataclass
class Braces:
    """Significant braces: around a script's base, or around an infix command."""

    row: "Nodes"


@dataclass
class Call:
    name: str
    arguments: list["Nodes"]
    option: "Nodes | None" = None


@dataclass
class Infix:
    name: str
    left: "Nodes"
    right: "Nodes"


@dataclass
class Scripts:
    base: "Symbol | Braces | Call | None"
    below: "Nodes" = field(default_factory=list)
    above: "Nodes" = field(default_factory=list)


Node = Symbol | Braces | Call | Infix | Scripts
Nodes = list[Node]


def extend(row: Nodes, nodes: Nodes) -> None:
    """Adds nodes to a row, joining adjacent ones in the same font."""
    for node in nodes:
        last = row[-1] if row else None
        if (
            isinstance(node, Call)
            and isinstance(last, Call)
            and node.name == last.name
            and node.name in FONTS
        ):
            extend(last.arguments[0], node.arguments[0])
        else:
            row.append(node)


def in_font(font: str, row: Nodes) -> Nodes:
    """The row in a font, without redundant inner font commands; empty if the row is."""
    inner: Nodes = []
    for node in row:
        same = isinstance(node, Call) and node.name == font
        extend(inner, node.arguments[0] if same else [node])  # type: ignore[union-attr]
    return [Call(font, [inner])] if inner else []


def splice(row: Nodes) -> Nodes:
    """A group's row for the enclosing row: without braces, except around an infix command."""
    return [Braces(row)] if any(isinstance(node, Infix) for node in row) else row


def base_of(row: Nodes) -> Symbol | Braces | Call | None:
    """A script's base; braces remain around more than one node."""
    match row:
        case []:
            return None
        case [Symbol(tokens=[mark])] if mark in CELL_ENDS:
            return Braces(row)
        case [(Symbol() | Call() | Braces()) as only]:
            return only
    return Braces(row)
