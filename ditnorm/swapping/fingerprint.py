"""Fingerprints of functions: what a fused body relies on, named by content instead of by class or
by version of diffusers.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from weakref import WeakKeyDictionary

_NOT_SEMANTIC = {"annotation", "returns", "ctx", "type_comment", "type_params", "kind"}

_known: WeakKeyDictionary[CodeType, str | None] = WeakKeyDictionary()
"""By code, since reloading puts new code into a function, and since functions keep their classes
alive.
"""


def fingerprint(function: object) -> str | None:
    """12 hex digits that change with what ``function`` does and not with its comments, docstring,
    annotations or layout.

    Equal on every supported Python. None for anything but a Python function whose source can be
    read. A decorated function is the wrapper, not what it wraps: a library that wraps an upstream
    ``forward`` changes its fingerprint.
    """
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    if code not in _known:
        _known[code] = _read(code)
    return _known[code]


def _read(code: CodeType) -> str | None:
    try:
        source = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return None
    try:
        return digest(ast.parse(source).body[0])
    except SyntaxError:  # a lambda in the middle of an expression
        return None


def fingerprint_of_all(functions: Mapping[str, Iterable[str]]) -> str | None:
    """One fingerprint of functions and methods, given by name for each module that defines them;
    None where one is missing.

    It reads what the modules say, so it finds those too that a decorator has made something else
    of.
    """
    digests = []
    for module, names in functions.items():
        defined = _defined(module)
        digests += [defined.get(name) for name in names]
    return None if None in digests else hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()[:12]


@functools.cache
def _defined(module: str) -> dict[str, str]:
    """The functions and methods of a module -> their fingerprints."""
    try:
        tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    except (ImportError, OSError, TypeError):
        return {}
    found = {node.name: digest(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        found |= {f"{cls.name}.{node.name}": digest(node) for node in cls.body if isinstance(node, ast.FunctionDef)}
    return found


def digest(node: ast.AST) -> str:
    """The fingerprint of a function given as its syntax tree."""
    return hashlib.sha256(" ".join(_tokens(node)).encode()).hexdigest()[:12]


def _tokens(value: object) -> Iterator[str]:
    """The tree in prefix order. Empty fields are left out, so that a newer Python's additional
    fields change nothing.
    """
    if isinstance(value, ast.Constant):
        yield f"{type(value.value).__name__}:{value.value!r}"
    elif isinstance(value, ast.AnnAssign):
        if value.value is not None:  # without a value it does nothing
            yield from _tokens(ast.Assign(targets=[value.target], value=value.value))
    elif isinstance(value, ast.JoinedStr):
        parts = [part for part in value.values if not (isinstance(part, ast.Constant) and part.value == "")]  # Python 3.12 adds empty ones
        yield from ("(JoinedStr", *_tokens(parts), ")")
    elif isinstance(value, ast.AST):
        yield f"({type(value).__name__}"
        for name, field in ast.iter_fields(value):
            if name not in _NOT_SEMANTIC and field is not None and field != []:
                yield name
                yield from _tokens(field)
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            if not _is_bare_string(item):
                yield from _tokens(item)
        yield "]"
    else:
        yield repr(value)


def _is_bare_string(statement: object) -> bool:
    """A docstring, or a string that stands alone as a comment."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
