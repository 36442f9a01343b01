"""Who may import whom, read from the import statements.

These rules keep the engine without circles, globals and hidden doors.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part may import of ours, besides itself. A part is a folder of core/ or a file beside
# them; a file inside a folder that has a row of its own is held to that row alone.
FOR_ALL = {"logs", "config"}  # plain values and words: no torch in them
FOUNDATION = {
    "mesh",
    "role",
    "layout",
    "comm",
    "gradients",
    "rng",
    "ops",
    "precision",
    "state",
}
MAY_IMPORT = {
    "__init__": set(),
    "logs": set(),
    "config": set(),
    "config.validate.parallel": {"config", "pipeline.from_flags"},
    "launch": {"mesh"},
    "mesh": set(),
    "role": set(),
    "layout": {"mesh", "role"},
    "comm": {"mesh", "layout"},
    "gradients": {"mesh", "layout"},
    "rng": {"mesh", "layout"},
    "precision": {"mesh", "layout", "state"},
    "state": set(),
    "ops": {"mesh", "layout"},
    "ops.cpu": {"ops.reference", "_native"},
    "ops.triton": {"kernels", "ops.reference"},
    "ops.products": set(),
    "ops.reference": {"config.sizes"},
    "ops.attention": {"config", "ops.products", "ops.reference"},
    "ops.ops": {"ops.attention", "ops.cpu", "ops.reference", "ops.triton"},
    "data": {"_native"},
    "pipeline": set(),
    "pipeline.actions": set(),
    "pipeline.placement": set(),
    "pipeline.schedules": {"pipeline.actions", "pipeline.placement"},
    "pipeline.plan": {
        "config",
        "pipeline.actions",
        "pipeline.placement",
        "pipeline.schedules",
    },
    "pipeline.simulate": {"pipeline.actions", "pipeline.plan"},
    "pipeline.split": {"config", "pipeline.placement"},
    "pipeline.from_flags": {"config", "pipeline.placement", "pipeline.split"},
    "pipeline.runtime": {"mesh", "comm", "gradients", "pipeline.actions", "pipeline.plan"},
    "optim": {"layout", "role", "mesh", "comm", "gradients", "ops", "precision", "state"},
    "checkpoint": {"layout", "mesh", "comm"},
    "parallel": FOUNDATION,
    "model": FOUNDATION | {"parallel"},
    "model.shape": {"config", "role"},
    "estimate": {"role", "model.shape", "pipeline"},
    "decode": {"model", "ops", "parallel"},
    "interop": FOUNDATION | {"data", "checkpoint", "model"},
    "train": FOUNDATION
    | {
        "estimate",
        "interop",
        "launch",
        "data",
        "pipeline",
        "optim",
        "checkpoint",
        "parallel",
        "model",
    },
    "testing": {"mesh"},
    "kernels": set(),
}
# These do not even get FOR_ALL.
STRICT = {
    "role",
    "logs",
    "config",
    "config.validate.parallel",
    "kernels",
    "ops.cpu",
    "ops.reference",
    "ops.ops",
    "ops.attention",
    "__init__",
}
WITHOUT_TORCH = {
    "role",
    "model.shape",
    "logs",
    "config",
    "config.flags",
    "config.presets",
    "config.sizes",
    "config.validate",
    "pipeline.actions",
    "pipeline.placement",
    "pipeline.schedules",
    "pipeline.plan",
    "pipeline.simulate",
    "pipeline.split",
    "pipeline.from_flags",
    "estimate",
    "estimate.planning",
    "estimate.report",
    "estimate.draw",
}
FORBIDDEN = {  # of others' packages
    "mesh": ("torch.nn",),
    "layout": ("torch.nn",),
    "data": ("torch.distributed",),
}
KERNELS_IMPORT = {"torch", "triton", "math", "typing"}


def python_files():
    found = [
        *(ROOT / "core").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    return sorted([*found, *ROOT.glob("pretrain_gpt.py")])


def name_of(path):
    """Return a file's name as it is imported; a script keeps its own name.

    core/data/indexed.py -> trivium.data.indexed.
    """
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "core":
        parts[0] = "trivium"
    elif parts[:2] == ["kernels", "triton"]:
        parts[:2] = ["trivium", "kernels"]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in python_files()}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CORE = [
    name
    for name in FILES
    if name.split(".")[0] == "trivium" and not name.startswith("trivium.kernels")
]


def part_of(module):
    """trivium.data.indexed -> data."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def row_of(module):
    """The row of the table that holds for a module: its own if it has one, else its part's."""
    own = module.removeprefix("trivium.")
    return own if own in MAY_IMPORT else part_of(module)


def allowed(module):
    """What a module may import: names of parts, and of single modules of others."""
    row = row_of(module)
    if "." in row:
        return MAY_IMPORT[row]
    return MAY_IMPORT[row] | {row, "__init__"} | (set() if row in STRICT else FOR_ALL)


def imported(module, node):
    """Return the absolute names that an import statement in `module` brings in.

    They are modules where they are ours, else the dotted name.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        base = f"{package}.{base}".rstrip(".")
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [
        name if name in FILES or name == "trivium._native" or base not in FILES else base
        for name in names
    ]


def imports(module):
    """Every (node, absolute name) of a module, wherever it stands."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported(module, node):
                yield node, name


def ours(name):
    return name == "trivium" or name.startswith("trivium.")


def nodes(module, kind):
    return [node for node in ast.walk(TREES[module]) if isinstance(node, kind)]


def where(module, node):
    return f"{FILES[module].relative_to(ROOT)}:{node.lineno}"


def test_every_part_imports_only_what_the_table_allows():
    wrong = []
    for module in CORE:
        assert row_of(module) in MAY_IMPORT, (
            f"{FILES[module].relative_to(ROOT)}: give {part_of(module)} a row in the table"
        )
        for node, name in imports(module):
            if ours(name) and not {part_of(name), name.removeprefix("trivium.")} & allowed(module):
                wrong.append(f"{where(module, node)} imports {name}")
    assert not wrong


def test_the_table_has_no_row_for_what_is_not_there():
    there = {part_of(name) for name in FILES} | {name.removeprefix("trivium.") for name in CORE}
    assert not (set(MAY_IMPORT) | WITHOUT_TORCH) - there and not STRICT - set(MAY_IMPORT)


def test_kernels_import_torch_and_triton_only():
    kernels = [name for name in FILES if name.startswith("trivium.kernels")]
    assert kernels
    wrong = [
        f"{where(m, n)} imports {name}"
        for m in kernels
        for n, name in imports(m)
        if name.split(".")[0] not in KERNELS_IMPORT
    ]
    assert not wrong


@pytest.mark.parametrize("part", sorted(WITHOUT_TORCH))
def test_configuration_and_plans_need_no_torch(part):
    """Not even through what they import of ours, or through the packages that they stand in."""
    seen, todo = set(), [f"trivium.{part}"]
    while todo:
        module = todo.pop()
        if module in seen or module not in FILES:
            continue
        seen.add(module)
        todo.append(module.rpartition(".")[0])
        for node, name in imports(module):
            assert name.split(".")[0] not in ("torch", "transformers"), (
                f"{where(module, node)} imports {name}"
            )
            todo.append(name)


def test_a_configuration_is_checked_without_torch_being_loaded():
    """What the import statements say, held against the interpreter."""
    modules = ", ".join(f"trivium.{part}" for part in sorted(WITHOUT_TORCH))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_parts_leave_out_what_they_must_not_know():
    wrong = [
        f"{where(module, node)} imports {name}"
        for module in CORE
        for node, name in imports(module)
        for prefix in FORBIDDEN.get(part_of(module), ())
        if name == prefix or name.startswith(prefix + ".")
    ]
    assert not wrong


def test_no_circles():
    graph = {
        module: {name for _, name in imports(module) if name in FILES and name != module}
        for module in FILES
    }
    finished, path = set(), []

    def visit(module):
        if module in finished:
            return
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        path.append(module)
        for name in sorted(graph[module]):
            visit(name)
        finished.add(path.pop())

    for module in graph:
        visit(module)


def test_core_imports_its_own_by_relative_names():
    wrong = [
        f"{where(m, n)} imports {name}"
        for m in CORE
        for n, name in imports(m)
        if ours(name) and not getattr(n, "level", 0)
    ]
    assert not wrong


def test_our_own_code_is_imported_at_the_top():
    wrong = []
    for module in FILES:
        for function in nodes(module, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = [
                node
                for node in ast.walk(function)
                if isinstance(node, (ast.Import, ast.ImportFrom))
            ]
            wrong += [
                where(module, node) for node in inside if any(map(ours, imported(module, node)))
            ]
    assert not wrong


def test_nothing_is_global():
    assert not [where(module, node) for module in FILES for node in nodes(module, ast.Global)]


def test_core_prints_only_through_the_logger():
    calls = [(module, node) for module in CORE for node in nodes(module, ast.Call)]
    assert not [
        where(module, node)
        for module, node in calls
        if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def is_empty_container(value):
    if isinstance(value, ast.Call):
        name = (
            value.func.attr
            if isinstance(value.func, ast.Attribute)
            else getattr(value.func, "id", "")
        )
        return name in (
            "list",
            "dict",
            "set",
            "defaultdict",
            "deque",
            "OrderedDict",
            "Counter",
            "WeakKeyDictionary",
            "WeakValueDictionary",
        )
    return (isinstance(value, ast.List) and not value.elts) or (
        isinstance(value, ast.Dict) and not value.keys
    )


MUTATORS = {
    "append",
    "extend",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "clear",
    "remove",
    "insert",
    "discard",
}


def changed_names(function):
    """Return the names whose contents a function changes, less those that are its own.

    A change is name[...] = x, name.append(x) or del name[...].
    """
    own = {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
    own |= {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    changed = {}
    for node in ast.walk(function):
        value = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            value = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in MUTATORS
        ):
            value = node.func.value
        if isinstance(value, ast.Name) and value.id not in own:
            changed[value.id] = node
    return changed


def test_modules_hold_no_state():
    """No container made empty to be filled later, and none that a function changes."""
    wrong = []
    for module in FILES:
        top = [node for node in TREES[module].body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        names = {
            target.id
            for node in top
            for target in getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(target, ast.Name)
        }
        wrong += [
            where(module, node)
            for node in top
            if node.value is not None and is_empty_container(node.value)
        ]
        for function in nodes(module, (ast.FunctionDef, ast.AsyncFunctionDef)):
            wrong += [
                where(module, node)
                for name, node in changed_names(function).items()
                if name in names
            ]
    assert not wrong


def test_native_code_knows_no_torch():
    wrong = []
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            includes = [
                line
                for line in path.read_text().splitlines()
                if line.lstrip().startswith("#include")
            ]
            wrong += [
                f"{path.name}: {line}"
                for line in includes
                if any(word in line for word in ("torch/", "ATen", "c10/", "caffe2/"))
            ]
    assert not wrong


def test_no_kernels_package_at_the_root():
    """kernels/__init__.py would hide the package `kernels` from every script run from the
    checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
