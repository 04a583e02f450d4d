"""A formula's syntax tree: rows of symbols, groups, commands with arguments, and scripts."""

from dataclasses import dataclass, field

from job.evaluation.latex.commands import CELL_ENDS, FONTS

MAX_DEPTH = 48  # nested groups: no formula is deeper, and Python's stack is finite


@dataclass
class Symbol:
    """One token, or a command with its verbatim arguments."""

    tokens: list[str]


@dataclass
class Group:
    """Significant braces: around a script's base, or around an infix command."""

    row: "Row"


@dataclass
class Call:
    name: str
    arguments: list["Row"]
    option: "Row | None" = None


@dataclass
class Infix:
    name: str
    left: "Row"
    right: "Row"


@dataclass
class Scripts:
    base: "Symbol | Group | Call | None"
    below: "Row" = field(default_factory=list)
    above: "Row" = field(default_factory=list)


Node = Symbol | Group | Call | Infix | Scripts
Row = list[Node]


def extend(row: Row, nodes: Row) -> None:
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


def in_font(font: str, row: Row) -> Row:
    """The row in a font, without redundant inner font commands; empty if the row is."""
    inner: Row = []
    for node in row:
        same = isinstance(node, Call) and node.name == font
        extend(inner, node.arguments[0] if same else [node])  # type: ignore[union-attr]
    return [Call(font, [inner])] if inner else []


def splice(row: Row) -> Row:
    """A group's row for the enclosing row: without braces, except around an infix command."""
    return [Group(row)] if any(isinstance(node, Infix) for node in row) else row


def base_of(row: Row) -> Symbol | Group | Call | None:
    """A script's base; braces remain around more than one node."""
    match row:
        case []:
            return None
        case [Symbol(tokens=[mark])] if mark in CELL_ENDS:
            return Group(row)
        case [(Symbol() | Call() | Group()) as only]:
            return only
    return Group(row)
