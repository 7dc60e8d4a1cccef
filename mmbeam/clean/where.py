"""Expressions that select samples (--where). They are parsed, never executed: no calls, no imports.

    image_width >= 256 and 0.5 < image_width / image_height < 2
    text_words > 3 and "watermark" not in text and metadata.license in ("cc0", "cc-by")
    audio_seconds is None or audio_seconds <= 30

The language has names, constants, comparisons, `and`, `or`, `not`, `in`, `is None`, and `+ - * /` on numbers;
entries of the metadata are `metadata.a.b` or `metadata['a'][0]`. Missing values are unknown, as in SQL, and so
is what is computed from them: a name whose modality the sample lacks, a missing entry, a comparison of a string
with a number, a division by zero. `not unknown` is unknown, `unknown or True` is true. A sample is selected if
the whole expression is true.
"""

import ast
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from mmbeam.clean.text import json_integer
from mmbeam.errors import UsageError, did_you_mean
from mmbeam.names import Kind
from mmbeam.types import Sample

Values = Mapping[str, Any]  # values by name; None: missing
_Term = Callable[[Values], Any]  # None: unknown

KIND_OF_NAME: Mapping[str, Kind | None] = {
    "image_width": "image",  # pixels, as shown
    "image_height": "image",
    "image_pixels": "image",
    "audio_seconds": "audio",
    "video_width": "video",  # pixels, as shown
    "video_height": "video",
    "video_seconds": "video",
    "text_chars": "text",  # of the cleaned text
    "text_words": "text",
    "text": "text",
    "key": None,
    "metadata": "metadata",
}
_MAX_CHARS, _MAX_NODES = 2000, 300  # bound the recursion of parsing and evaluation
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@lru_cache
def compile_where(expression: str) -> Callable[[Values], bool]:
    """Return a predicate on a mapping that has the names used in the expression.

    Raises UsageError that points at the column.
    """
    term = _Compiler(expression).compile(_parse(expression))
    return lambda values: _truth(term(values)) is True


@lru_cache
def where_needs(expression: str) -> frozenset[Kind]:
    """Return the kinds of member that the expression depends on."""
    names = {node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)}
    return frozenset(kind for name in names if (kind := KIND_OF_NAME.get(name)) is not None)


def _parse(expression: str) -> ast.expr:
    if len(expression) > _MAX_CHARS:
        raise UsageError(f"where: expression of {len(expression):,} characters; expected at most {_MAX_CHARS:,}")
    source = _one_line(expression)
    try:
        body = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        column = error.offset - 1 if error.offset else len(source)  # 0 or None: at the end
        raise _usage_error(source, column, error.msg) from error
    except (RecursionError, MemoryError, ValueError) as error:  # nested too deeply, or a NUL
        raise UsageError(f"where: {expression!r} cannot be parsed: {error or 'nested too deeply'}") from error
    if sum(1 for _ in ast.walk(body)) > _MAX_NODES:
        raise UsageError(f"where: expression of more than {_MAX_NODES} terms; split it into several expressions")
    return body


def _one_line(expression: str) -> str:
    return expression.strip().replace("\n", " ")


def _usage_error(source: str, column: int, problem: str) -> UsageError:
    names = ", ".join(KIND_OF_NAME)
    return UsageError(f"where, column {column + 1}: {problem}\n  {source}\n  {' ' * column}^\nnames: {names}")


class _Compiler:
    """Turns the supported syntax nodes into functions, and raises for all others."""

    def __init__(self, expression: str) -> None:
        self._source = _one_line(expression)

    def compile(self, node: ast.expr) -> _Term:
        compile_node = getattr(self, f"_compile_{type(node).__name__.lower()}", None)
        if compile_node is None:
            raise self._error(node, "expected only comparisons, and, or, not, in, is None and + - * /")
        term: _Term = compile_node(node)
        return term

    def _error(self, node: ast.expr, problem: str) -> UsageError:
        before = self._source.encode()[: node.col_offset]  # ast counts bytes
        return _usage_error(self._source, len(before.decode()), problem)

    def _compile_constant(self, node: ast.Constant) -> _Term:
        if not isinstance(node.value, bool | int | float | str | None):
            raise self._error(node, f"{ast.unparse(node)} is not a number, string, True, False or None")
        return lambda values: node.value

    def _compile_name(self, node: ast.Name) -> _Term:
        if node.id not in KIND_OF_NAME:
            raise self._error(node, f"unknown name {node.id!r}{did_you_mean(node.id, KIND_OF_NAME)}")
        return lambda values: values[node.id]

    def _compile_attribute(self, node: ast.Attribute) -> _Term:
        return self._entry(node, node.attr)

    def _compile_subscript(self, node: ast.Subscript) -> _Term:
        if not isinstance(node.slice, ast.Constant) or not isinstance(node.slice.value, str | int):
            raise self._error(node.slice, "expected a string or a number in [ ]")
        return self._entry(node, node.slice.value)

    def _entry(self, node: ast.Attribute | ast.Subscript, name: str | int) -> _Term:
        root: ast.expr = node
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if not isinstance(root, ast.Name) or root.id != "metadata":
            raise self._error(node, "only metadata has entries")
        parent = self.compile(node.value)
        return lambda values: _look_up(parent(values), name)

    def _compile_boolop(self, node: ast.BoolOp) -> _Term:
        terms = [self.compile(value) for value in node.values]
        return partial(_all if isinstance(node.op, ast.And) else _any, terms)

    def _compile_unaryop(self, node: ast.UnaryOp) -> _Term:
        term = self.compile(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda values: _not(_truth(term(values)))
        if isinstance(node.op, ast.USub):
            return lambda values: _arithmetic(operator.sub, 0, term(values))
        raise self._error(node, "the only supported sign is -")

    def _compile_binop(self, node: ast.BinOp) -> _Term:
        if type(node.op) not in _ARITHMETIC:
            raise self._error(node, "the only supported arithmetic is + - * /")
        operation, left, right = _ARITHMETIC[type(node.op)], self.compile(node.left), self.compile(node.right)
        return lambda values: _arithmetic(operation, left(values), right(values))

    def _compile_compare(self, node: ast.Compare) -> _Term:
        operands = [node.left, *node.comparators]
        pairs = zip(operands, node.ops, operands[1:], strict=False)
        return partial(_all, [self._comparison(left, op, right) for left, op, right in pairs])

    def _comparison(self, left_node: ast.expr, op: ast.cmpop, right_node: ast.expr) -> _Term:
        if isinstance(op, ast.In | ast.NotIn):
            left, right = self.compile(left_node), self._container(right_node)
            contains: _Term = lambda values: _contains(left(values), right(values))  # noqa: E731
            return contains if isinstance(op, ast.In) else lambda values: _not(contains(values))
        left, right = self.compile(left_node), self.compile(right_node)
        if isinstance(op, ast.Is | ast.IsNot):
            if not isinstance(right_node, ast.Constant) or right_node.value is not None:
                raise self._error(right_node, "`is` supports only None; compare with ==")
            wanted = isinstance(op, ast.Is)
            return lambda values: (left(values) is None) is wanted
        compare = _COMPARISONS[type(op)]
        return lambda values: _compare(compare, left(values), right(values))

    def _container(self, node: ast.expr) -> _Term:
        if not isinstance(node, ast.Tuple | ast.List):
            return self.compile(node)
        terms = [self.compile(element) for element in node.elts]
        return lambda values: [term(values) for term in terms]


def _look_up(parent: Any, name: str | int) -> Any:
    if isinstance(parent, dict):
        return parent.get(name)
    if isinstance(parent, list) and type(name) is int and name < len(parent):
        return parent[name]
    return None


def _truth(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _not(truth: bool | None) -> bool | None:
    return None if truth is None else not truth


def _all(terms: list[_Term], values: Values) -> bool | None:
    truths = [_truth(term(values)) for term in terms]
    return False if False in truths else None if None in truths else True


def _any(terms: list[_Term], values: Values) -> bool | None:
    truths = [_truth(term(values)) for term in terms]
    return True if True in truths else None if None in truths else False


def _arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return None
    try:
        return operation(left, right)
    except ArithmeticError:  # division by zero, overflow
        return None


def _compare(comparison: Callable[[Any, Any], bool], left: Any, right: Any) -> bool | None:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if left is None or right is None or not (numbers or type(left) is type(right)):
        return None
    try:
        return comparison(left, right)
    except TypeError:  # dictionaries, or lists of mixed content, have no order
        return None


def _contains(element: Any, container: Any) -> bool | None:
    """Return SQL's IN for a list, the substring test for a string, or whether a dictionary has the key."""
    if element is None or container is None:
        return None
    if isinstance(container, str):
        return element in container if isinstance(element, str) else None
    if not isinstance(container, list | dict):
        return None
    matches = [_compare(operator.eq, element, item) for item in container if item is not None]
    return True if True in matches else None if None in container else False


def rejecting_expression(sample: Sample, wheres: Sequence[tuple[str, Callable[[Values], bool]]]) -> str | None:
    """Return the first expression that is not true of the sample, or None if all are.

    `wheres` are expressions with their predicates from `compile_where`.
    """
    values = SampleValues(sample)
    return next((text for text, is_true in wheres if not is_true(values)), None)


class SampleValues(Mapping[str, Any]):
    """The values of a sample by name, computed on first use."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = _VALUE_OF[name](self._sample)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(KIND_OF_NAME)

    def __len__(self) -> int:
        return len(KIND_OF_NAME)


_VALUE_OF: Mapping[str, Callable[[Sample], Any]] = {
    "image_width": lambda sample: sample.image_size and sample.image_size[0],
    "image_height": lambda sample: sample.image_size and sample.image_size[1],
    "image_pixels": lambda sample: sample.image_size and sample.image_size[0] * sample.image_size[1],
    "audio_seconds": lambda sample: sample.audio and sample.audio.seconds,
    "video_width": lambda sample: sample.video and sample.video.size[0],
    "video_height": lambda sample: sample.video and sample.video.size[1],
    "video_seconds": lambda sample: sample.video and sample.video.seconds,
    "text_chars": lambda sample: None if sample.model_text is None else len(sample.model_text),
    "text_words": lambda sample: None if sample.model_text is None else len(sample.model_text.split()),
    "text": lambda sample: sample.model_text,
    "key": lambda sample: sample.key,
    "metadata": lambda sample: None if sample.metadata is None else _parse_json(sample.metadata),
}


def _parse_json(text: str) -> Any:
    """Parse JSON, with NaN as None, since tables export missing values as NaN."""
    try:
        return json.loads(
            text, parse_int=json_integer, parse_constant=lambda name: None if name == "NaN" else float(name)
        )
    except (ValueError, RecursionError):  # it was valid; nesting may exceed the stack that is left here
        return None
