"""What a reasoning-gym scorer may be shown, because some of them run the model's answer as Python.

reasoning-gym 0.1.25 calls `eval(answer)` in four scorers and sympy's `parse_expr(answer)`, which evaluates
too, in five. An answer could run code in the trainer, read the entry's own ground truth, or compute for
ever (`9**9**9`, `1e999999`). Such a scorer is shown only answers of the form its task asks for; any other
answer is scored as an empty one.

Not covered: how long a scorer takes on an answer that passes, and a scorer that a later reasoning-gym adds.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

LITERAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Scorers that `eval` an answer which is not the exact one, to accept a Python list."""
ARITHMETIC = frozenset({"countdown", "puzzle24"})
"""Scorers that evaluate an arithmetic expression of numbers."""
SYMBOLIC = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""Scorers that evaluate an expression of variables and functions."""

_FUNCTIONS = frozenset(
    (
        "exp",
        "log",
        "ln",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
        "Abs",
    )
)
_MAX_LENGTH = 1_000
_MAX_NUMBER = 10**15
_MAX_EXPONENT = 64
_MAX_POWERS = 2
"""Powers inside powers: (x**2 + 1)**3 is one, and two with exponents of 64 are still computed at once."""


def is_harmless(dataset: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether the dataset's scorer may be shown this answer."""
    if dataset in LITERAL:
        return _is_exact(answer, entry) or _is_literal(answer)
    if dataset in ARITHMETIC or dataset in SYMBOLIC:
        return _is_expression(answer, names=dataset in SYMBOLIC)
    return True


def _is_exact(answer: str, entry: Mapping[str, Any]) -> bool:
    return answer == entry["answer"] or answer in entry.get("metadata", {}).get("valid_answers", ())


def _is_literal(answer: str) -> bool:
    if len(answer) > _MAX_LENGTH:
        return False
    try:
        ast.literal_eval(answer)
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return False
    return True


def _is_expression(answer: str, *, names: bool) -> bool:
    if len(answer) > _MAX_LENGTH or not answer.isascii() or "#" in answer or "\\" in answer:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
        return _harmless(tree.body, names=names, powers=0)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _harmless(node: ast.expr, *, names: bool, powers: int) -> bool:
    match node:
        case ast.Constant(value=value):
            return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= _MAX_NUMBER
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _harmless(operand, names=names, powers=powers)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            return (
                names
                and powers < _MAX_POWERS
                and _small_number(exponent)
                and _harmless(base, names=names, powers=powers + 1)
            )
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _harmless(left, names=names, powers=powers) and _harmless(right, names=names, powers=powers)
        case ast.Name(id=name):
            return names and len(name) == 1
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return names and name in _FUNCTIONS and _harmless(argument, names=names, powers=powers)
        case _:
            return False


def _small_number(node: ast.expr) -> bool:
    """A number of at most 64, with a sign, or a fraction of two such."""
    match node:
        case ast.Constant(value=value):
            return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= _MAX_EXPONENT
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _small_number(operand)
        case ast.BinOp(left=ast.Constant() as left, op=ast.Div(), right=ast.Constant() as right):
            return _small_number(left) and _small_number(right)
        case _:
            return False
