"""--where for Milvus: the part of SQL that Milvus can express with the meaning that it has for a gallery.

Anything else is refused with the reason: a filter that silently finds other images is worse than none.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from clipret.errors import ClipretError
from clipret.tables import OWN_COLUMNS

__all__ = ["translate"]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\])
    | (?P<word>[^\W\d]\w*)
    | (?P<sign><>|<=|>=|==|!=|[=<>(),+\-])
    )""",
    re.VERBOSE,
)
_NUMERIC = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")
_COMPARE = {"=": "==", "==": "==", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_WORDS = frozenset({"and", "or", "not", "in", "like", "glob", "between", "is", "null", "isnull", "notnull"})
_TEXTS = tuple(name for name, kind in OWN_COLUMNS.items() if kind is str)

Constant = int | float | str


@dataclass(frozen=True)
class _Column:
    """A column by its name there."""

    name: str

    @property
    def shown(self) -> str:
        return self.name if self.name in OWN_COLUMNS else f"$meta[{json.dumps(self.name, ensure_ascii=False)}]"


@dataclass(frozen=True)
class _Node:
    """`kind` is and, or (of `parts`), one of the comparisons, match (a pattern of LIKE) or null, of a column; the
    last two may be `no`: NOT."""

    kind: str
    parts: tuple["_Node", ...] = ()
    column: _Column = _Column("")
    value: Constant = 0
    no: bool = False

    def negated(self) -> "_Node":
        if self.kind in ("and", "or"):
            return _Node("or" if self.kind == "and" else "and", tuple(part.negated() for part in self.parts))
        if self.kind in _OPPOSITE:
            return _Node(_OPPOSITE[self.kind], column=self.column, value=self.value)
        return _Node(self.kind, column=self.column, value=self.value, no=not self.no)

    def __str__(self) -> str:
        name = self.column.shown
        if self.kind in ("and", "or"):
            return "(" + f" {self.kind} ".join(map(str, self.parts)) + ")"
        if self.kind == "null":
            return f"({name} is not null)" if self.no else f"({name} is null)"
        value = json.dumps(self.value, ensure_ascii=False)
        if self.kind == "match":
            return f"({name} is not null and not ({name} like {value}))" if self.no else f"({name} like {value})"
        # In SQL a comparison with what is not there holds neither way.
        return f"({name} is not null and {name} != {value})" if self.kind == "!=" else f"({name} {self.kind} {value})"


def translate(where: str, columns: Sequence[str]) -> str:
    """The Milvus expression that finds what `where` finds in a gallery with these metadata columns.

    Supports comparisons of a column with a value, IN, BETWEEN, GLOB, LIKE without letters, IS NULL, AND, OR, NOT.
    Raises ClipretError for other expressions, with the position and, where possible, what to write instead.
    """
    return str(_Parser(where, columns).parsed())


class _Parser:
    def __init__(self, where: str, columns: Sequence[str]) -> None:
        self.where = where
        self._names = {name.lower(): name for name in (*columns, *OWN_COLUMNS)}
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while where[at:].strip():
            match = _TOKEN.match(where, at)
            if match is None:
                raise self._error(f"{where[at:].strip()[:20]!r} cannot be said there")
            assert match.lastgroup is not None
            self._tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        self._at = 0

    def parsed(self) -> _Node:
        node = self._any()
        if self._at < len(self._tokens):
            raise self._error(f"{self._tokens[self._at][1]!r} is not understood there")
        return node

    def _error(self, reason: str) -> ClipretError:
        return ClipretError(
            f"--where {self.where!r} cannot be asked of Milvus: {reason}; compare columns with values by = <> < > IN "
            "BETWEEN GLOB IS NULL, joined by AND OR NOT, or search the gallery"
        )

    def _peek(self) -> str:
        """The next word or sign in small letters; "" for a name in quotes, a value and the end."""
        if self._at == len(self._tokens):
            return ""
        kind, text = self._tokens[self._at]
        return text.lower() if kind in ("word", "sign") else ""

    def _take(self, *wanted: str) -> bool:
        if self._peek() in wanted:
            self._at += 1
            return True
        return False

    def _need(self, sign: str) -> None:
        if not self._take(sign):
            found = repr(self._tokens[self._at][1]) if self._at < len(self._tokens) else "the end"
            raise self._error(f"{sign} should be where {found} is")

    def _any(self) -> _Node:
        parts = [self._all()]
        while self._take("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else _Node("or", tuple(parts))

    def _all(self) -> _Node:
        parts = [self._one()]
        while self._take("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else _Node("and", tuple(parts))

    def _one(self) -> _Node:
        if self._take("not"):
            return self._one().negated()
        if self._take("("):
            node = self._any()
            self._need(")")
            return node
        left = self._operand()
        if isinstance(left, _Column):
            return self._predicate(left)
        sign = _COMPARE.get(self._peek())
        self._at += 1
        right = self._operand() if sign else None
        if sign is None or not isinstance(right, _Column):
            raise self._error(f"{left!r} stands alone")
        return self._compared(right, _FLIPPED.get(sign, sign), left)

    def _predicate(self, column: _Column) -> _Node:
        if self._take("is"):
            no = self._take("not")
            self._need("null")
            return _Node("null", column=column, no=no)
        if self._take("isnull"):
            return _Node("null", column=column)
        if self._take("notnull"):
            return _Node("null", column=column, no=True)
        no = self._take("not")
        if self._take("in"):
            node = self._within(column)
        elif self._take("between"):
            low = self._constant()
            self._need("and")
            node = _Node("and", (self._compared(column, ">=", low), self._compared(column, "<=", self._constant())))
        elif self._peek() in ("like", "glob"):
            node = self._pattern(column)
        elif not no and (sign := _COMPARE.get(self._peek())):
            self._at += 1
            node = self._compared(column, sign, self._constant())
        else:
            raise self._error(f"the column {column.name} is not compared with anything")
        return node.negated() if no else node

    def _within(self, column: _Column) -> _Node:
        self._need("(")
        parts = [self._compared(column, "==", self._constant())]
        while self._take(","):
            parts.append(self._compared(column, "==", self._constant()))
        self._need(")")
        return parts[0] if len(parts) == 1 else _Node("or", tuple(parts))

    def _pattern(self, column: _Column) -> _Node:
        kind = self._peek()
        self._at += 1
        pattern = str(self._constant())
        if kind == "like":
            if any(c.isascii() and c.isalpha() for c in pattern):
                raise self._error("LIKE makes no difference of A and a here and does there: write GLOB, with * and ?")
            return _Node("match", column=column, value=pattern.replace("\\", "\\\\"))
        if "[" in pattern:
            raise self._error("GLOB with [ cannot be said there")
        literal = re.sub(r"([\\%_])", r"\\\1", pattern)
        return _Node("match", column=column, value=literal.replace("*", "%").replace("?", "_"))

    def _compared(self, column: _Column, sign: str, value: Constant) -> _Node:
        """As sqlite compares: a column of texts with a text, others by number where the value looks like one."""
        if column.name in _TEXTS:
            value = str(value)
        elif isinstance(value, str) and _NUMERIC.fullmatch(value):
            value = _number(value)
        elif isinstance(value, str) and column.name in OWN_COLUMNS:
            raise self._error(f"{column.name} is a number and {value!r} is none")
        return _Node(sign, column=column, value=value)

    def _constant(self) -> Constant:
        value = self._operand()
        if isinstance(value, _Column):
            raise self._error(f"{value.name} is a column where a value should be")
        return value

    def _operand(self) -> _Column | Constant:
        if self._at == len(self._tokens):
            raise self._error("it ends too early")
        if self._peek() in ("-", "+"):
            sign = self._peek()
            self._at += 1
            value = self._constant()
            if isinstance(value, str):
                raise self._error(f"{sign}{value!r} is no number")
            return -value if sign == "-" else value
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "number":
            return _number(text)
        if kind == "text":
            return text[1:-1].replace("''", "'")
        if kind == "word" and text.lower() in ("true", "false") and text.lower() not in self._names:
            return int(text.lower() == "true")
        if kind == "sign" or (kind == "word" and text.lower() in _WORDS):
            raise self._error(f"{text!r} stands where a column or a value should")
        if self._peek() == "(":
            raise self._error(f"it has no function {text}")
        name = text if kind == "word" else text[1:-1].replace('""', '"')
        if name.lower() not in self._names:
            raise self._error(f"there is no column {name!r}, only {', '.join(sorted(self._names.values()))}")
        return _Column(self._names[name.lower()])


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)
