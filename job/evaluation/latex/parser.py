"""Parses tokens into a tree."""

from job.evaluation.latex.commands import (
    ARGUMENTS,
    CELL_ENDS,
    FONT,
    FONTS,
    INFIX,
    NEGATED,
    NO_ARGUMENT,
    NO_DELIMITER,
    SWITCHES,
    VERBATIM,
    WRAPPERS,
)
from job.evaluation.latex.tokens import UnreadableError, after_group
from job.evaluation.latex.tree import (
    MAX_DEPTH,
    Call,
    Infix,
    Nodes,
    Scripts,
    Symbol,
    base_of,
    extend,
    in_font,
    splice,
)


class Parser:
    """Parses one formula. Raises UnreadableError if it cannot."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def formula(self) -> Nodes:
        row = self._row((), 0)
        if self._next() is not None:
            raise UnreadableError  # a closing brace without an opening one
        return row

    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str:
        item = self._next()
        if item is None:
            raise UnreadableError
        self._at += 1
        return item

    def _row(self, stops: tuple[str, ...], depth: int) -> Nodes:
        """Parses up to, but not including, a closing brace, one of `stops` or the end."""
        if depth > MAX_DEPTH:
            raise UnreadableError
        done: Nodes = []
        cell = _Cell()
        while (item := self._next()) is not None and item != "}" and item not in stops:
            if item in CELL_ENDS:
                extend(done, cell.close())
                done.append(Symbol([self._take()]))
                cell = _Cell()
            elif item in SWITCHES:
                cell.switch(FONT[self._take()])
            elif item in INFIX:
                cell.split(self._take())
            elif item == r"\left":
                self._fence(cell.row, depth)
            elif item == r"\right":  # without its `\left`
                self._take()
                self._scripted(self._delimiter(), cell.row, depth)
            elif item == "{":
                self._scripted(self._braces(depth), cell.row, depth)
            elif item in ("^", "_", "'"):
                self._scripted([], cell.row, depth)
            else:
                self._scripted(self._single(depth), cell.row, depth)
        extend(done, cell.close())
        return done

    def _braces(self, depth: int) -> Nodes:
        self._take()
        row = self._row((), depth + 1)
        if self._next() != "}":
            raise UnreadableError
        self._take()
        return row

    def _fence(self, out: Nodes, depth: int) -> None:
        r"""Parses `\left( … \right)`, which is the scope of infix commands, like a group."""
        self._take()
        extend(out, self._delimiter())
        extend(out, splice(self._row((r"\right",), depth + 1)))
        if self._next() == r"\right":
            self._take()
            self._scripted(self._delimiter(), out, depth)

    def _delimiter(self) -> Nodes:
        item = self._next()
        if item is None or any(item in names for names in NO_DELIMITER):
            return []
        self._take()
        shown = {"<": r"\langle", ">": r"\rangle"}.get(item, item)
        return [] if item == "." else [Symbol([shown])]

    def _single(self, depth: int) -> Nodes:
        """Parses one token, with its arguments if it is a command that takes any."""
        if depth > MAX_DEPTH:
            raise UnreadableError
        item = self._take()
        name = FONT.get(item, item)
        if name in VERBATIM:
            return self._verbatim(name)
        if name not in ARGUMENTS:
            return [Symbol([item])]
        option = None
        if name == r"\sqrt" and self._next() == "[":
            self._take()
            option = self._row(("]",), depth + 1)
            if self._take() != "]":
                raise UnreadableError
        arguments = [self._argument(depth) for _ in range(ARGUMENTS[name])]
        if name in FONTS:
            return in_font(name, arguments[0])
        if name == r"\not":
            match arguments[0]:
                case [Symbol(tokens=[negated])] if negated in NEGATED:
                    return [Symbol([NEGATED[negated]])]
        return [Call(name, arguments, option or None)]

    def _argument(self, depth: int) -> Nodes:
        item = self._next()
        if item == "{":
            return self._braces(depth)
        if item is None or item in NO_ARGUMENT:
            raise UnreadableError
        return self._single(depth + 1)

    def _verbatim(self, name: str) -> Nodes:
        label = self._verbatim_group()
        environment = "".join(label[1:-1])
        if name in (r"\begin", r"\end") and environment in WRAPPERS:
            return []
        columns: list[str] = []
        if name == r"\begin" and environment in ("array", "tabular"):
            columns = self._verbatim_group() if self._next() == "{" else ["{", "}"]
        return [Symbol([name, *label, *columns])]

    def _verbatim_group(self) -> list[str]:
        rest = tuple(self._tokens[self._at : self._at + 256])  # no name is longer
        length = after_group(rest, 0)
        if length == 0:
            raise UnreadableError
        self._at += length
        return list(rest[:length])

    def _scripted(self, row: Nodes, out: Nodes, depth: int) -> None:
        """Adds `row` to `out`, with the scripts after it."""
        if self._next() not in ("^", "_", "'"):
            extend(out, splice(row))
            return
        scripts = Scripts(base_of(row))
        raised = lowered = False
        while (item := self._next()) in ("^", "_", "'"):
            if (item == "^" and raised) or (item == "_" and lowered):
                break  # a second script of the same kind has an empty base
            self._take()
            if item == "'":
                extend(scripts.above, [Symbol([r"\prime"])])
            elif item == "^":
                extend(scripts.above, self._argument(depth))
                raised = True
            else:
                scripts.below = self._argument(depth)
                lowered = True
        if scripts.above or scripts.below:
            out.append(scripts)
        else:
            extend(out, splice(row))


class _Cell:
    """A table cell or a whole group: the scope of font switches and infix commands."""

    def __init__(self) -> None:
        self.row: Nodes = []
        self._font: str | None = None
        self._before_row: Nodes = []  # up to the last font switch
        self._left: Nodes | None = None
        self._infix = ""

    def switch(self, font: str) -> None:
        self._flush()
        self._font = font

    def split(self, infix: str) -> None:
        if self._left is not None:
            raise UnreadableError  # ambiguous in TeX, too
        self._flush()
        self._left, self._before_row, self._infix = self._before_row, [], infix

    def close(self) -> Nodes:
        self._flush()
        if self._left is None:
            return self._before_row
        name = INFIX[self._infix]
        if name is None:
            return [Infix(self._infix, self._left, self._before_row)]
        return [Call(name, [self._left, self._before_row])]

    def _flush(self) -> None:
        extend(self._before_row, in_font(self._font, self.row) if self._font else self.row)
        self.row = []
