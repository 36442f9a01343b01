"""The two flags that say which tokens a query sees, in Megatron's words.

    --window-size W,0             the token itself and W before it
    --window-attn-skip-freq N     all layers but every N-th have the window
    --window-attn-skip-freq LIST  1 for a layer with the window and 0 for one without: [1]*3+[0]

Megatron evaluates such a list as Python. Here only whole numbers, lists, + and * are read.
"""

import ast
from typing import Any

from .errors import FlagError

_MOST_COPIES = 1000  # of a list: a number that no model needs, and that cannot fill the memory


def tokens_before(window_size: str) -> int:
    """Return W of --window-size W,0. Raises FlagError for anything else."""
    match _value_of(window_size):
        case (int() as before, 0) if before >= 0:
            return before
    raise FlagError(f"--window-size {window_size} is not W,0 with W of at least 0")


def layers_with_window(pattern: str | None, num_layers: int, layer: int) -> bool:
    """Return whether a layer has the window, by --window-attn-skip-freq (None: all have it).

    Raises FlagError for a pattern that cannot be read or is of another number of layers.
    """
    if pattern is None:
        return True
    value = _value_of(pattern or "1")
    if isinstance(value, int) and value > 0:
        return (layer + 1) % value > 0
    is_list = isinstance(value, list) and len(value) == num_layers
    if is_list and all(item in (0, 1) for item in value):
        return value[layer] == 1
    expected = f"N, or a 0 or 1 for each of the {num_layers} layers such as [1]*3+[0]"
    raise FlagError(f"--window-attn-skip-freq {pattern} is not {expected}")


def _value_of(text: str) -> Any:
    """Return a whole number, or a list or tuple of them; None for anything else."""
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return None


def _evaluate(tree: ast.expr) -> Any:
    match tree:
        case ast.Constant(value=int() as number):
            return number
        case ast.List(elts=items):
            return [_evaluate(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_evaluate(item) for item in items)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left) + _evaluate(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int() as times)):
            is_list = isinstance(left, ast.List | ast.BinOp)
            if is_list and times <= _MOST_COPIES:
                return _evaluate(left) * times
    raise ValueError
