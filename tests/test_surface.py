"""How the code reads, as numbers: widths, sizes, docstrings and names that a reader relies on."""

import ast
import subprocess
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
LONGEST_FUNCTION = 50  # lines
NODES_PER_LINE = 5.0
MOST_ARGUMENTS = 11
MOST_TARGETS = 2
TEXTS = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".sh", ".yaml", ".toml", ".txt", ".sbatch", ""}
# An opening that makes a sentence without a verb, or hides the verb behind a riddle.
OPENINGS = {
    "What",
    "Of",
    "Where",
    "Whether",
    "As",
    "Why",
    "How",
    "That",
    "Which",
    "Whose",
    "Beside",
}


def tracked() -> list[Path]:
    """Return the files of the checkout that people write by hand."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.exists() and path.suffix in TEXTS]


FILES = [path for path in tracked() if path.name != "LICENSE" and "fixtures" not in path.parts]
PYTHON = {path: ast.parse(path.read_text()) for path in FILES if path.suffix == ".py"}
ENGINE = {
    path: tree
    for path, tree in PYTHON.items()
    if path.relative_to(ROOT).parts[0] in ("core", "kernels", "pretrain_gpt.py")
}
OURS = {
    path: tree
    for path, tree in PYTHON.items()
    if path in ENGINE or path.relative_to(ROOT).parts[0] in ("tools", "benchmarks")
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def at(path: Path, line: int) -> str:
    """Return `file:line`, as an editor opens it."""
    return f"{path.relative_to(ROOT)}:{line}"


def nodes(trees: dict[Path, ast.Module], kind):
    """Yield every node of a kind with the file that it stands in."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield path, node


def public(tree: ast.Module):
    """Yield the public definitions of a module: functions, classes and methods."""
    for node in tree.body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
            yield node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, FUNCTION) and not item.name.startswith("_"):
                    yield item, True


def test_no_line_is_wider_than_100_columns():
    wide = []
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > WIDTH:
                wide.append(at(path, number))
    assert not wide


def test_a_line_of_the_engine_says_one_thing():
    """Syntax nodes, loads and stores of names left out, over the lines that are not blank."""
    count = lines = 0
    for path, tree in ENGINE.items():
        count += sum(not isinstance(node, ast.expr_context) for node in ast.walk(tree))
        lines += sum(bool(line.strip()) for line in path.read_text().splitlines())
    assert count / lines <= NODES_PER_LINE


def test_functions_fit_on_a_screen():
    long = []
    for path, node in nodes(PYTHON, FUNCTION):
        length = node.end_lineno - node.lineno + 1
        if length > LONGEST_FUNCTION:
            long.append(f"{at(path, node.lineno)} {node.name}: {length} lines")
    assert not long


def test_functions_take_few_arguments():
    """A dozen values that travel together are an object."""
    many = []
    for path, node in nodes(OURS, FUNCTION):
        if "triton.jit" in map(ast.unparse, node.decorator_list):
            continue  # a kernel takes each pointer, size and constant by itself
        arguments = node.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        if count > MOST_ARGUMENTS:
            many.append(f"{at(path, node.lineno)} {node.name}: {count} arguments")
    assert not many


def test_a_tuple_assignment_computes_at_most_two_values():
    """`a, b, c = function()` unpacks a value; `a, b, c = f(x), g(y), h(z)` is three statements."""
    wrong = []
    for path, node in nodes(OURS, ast.Assign):
        both = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if both and len(node.value.elts) > MOST_TARGETS:
            wrong.append(at(path, node.lineno))
    assert not wrong


def test_no_conditional_stands_inside_another():
    wrong = []
    for path, node in nodes(OURS, ast.IfExp):
        inner = [*ast.walk(node.test), *ast.walk(node.body), *ast.walk(node.orelse)]
        if any(isinstance(child, ast.IfExp) for child in inner):
            wrong.append(at(path, node.lineno))
    assert not wrong


def is_an_override(node: ast.AST, in_class: bool) -> bool:
    """Return whether a method repeats a declaration that has a docstring elsewhere."""
    return in_class and node.name in DECLARED


def declared_methods() -> set[str]:
    """Return the methods that a protocol, an abstract class or a library's class documents."""
    names = {"forward", "backward"}  # torch.nn.Module, torch.autograd.Function
    for _, node in nodes(ENGINE, ast.ClassDef):
        bases = {ast.unparse(base) for base in node.bases}
        if bases & {"Protocol", "ABC"}:
            names |= {item.name for item in node.body if isinstance(item, FUNCTION)}
    return names


DECLARED = declared_methods()


def test_public_names_have_docstrings():
    missing = []
    for path, tree in OURS.items():
        if not ast.get_docstring(tree):
            missing.append(at(path, 1))
        for node, in_class in public(tree):
            if not ast.get_docstring(node) and not is_an_override(node, in_class):
                missing.append(f"{at(path, node.lineno)} {node.name}")
    assert not missing


def test_docstrings_begin_with_a_verb_or_a_noun():
    wrong = []
    for path, node in nodes(OURS, (*FUNCTION, ast.ClassDef, ast.Module)):
        words = (ast.get_docstring(node) or "").split()
        if words and words[0].rstrip(",;:.") in OPENINGS:
            wrong.append(f"{at(path, getattr(node, 'lineno', 1))} {' '.join(words[:6])}")
    assert not wrong


def test_no_two_public_classes_share_a_name():
    places = defaultdict(list)
    for path, tree in ENGINE.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(at(path, node.lineno))
    assert not {name: found for name, found in places.items() if len(found) > 1}
