"""The rules of the house, read from its source: who imports from whom, how long things may be, nothing twice."""

import ast
import collections
import io
import pathlib
import re
import tokenize

import dfq_jax

PACKAGE = pathlib.Path(dfq_jax.__file__).parent
# A room imports from rooms of lower floors alone.
FLOORS = {
    "base": 0,
    "quantizers": 1,
    "graph": 2,
    "synthesis": 3,
    "stages": 4,
    "report": 5,
    "runtime": 5,
    "export": 6,
    "zoo": 6,
    "recipes": 7,
    "data": 7,
    "cli": 8,
}
MODULE_LINES = 400  # a module has fewer
FUNCTION_LINES, LONG_FUNCTIONS = 40, 9  # fewer functions have more lines of code
SAME_LINES = 6  # so many lines of code that are the same stand in one place

MODULES = {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(source) for path, source in MODULES.items()}
FRONT_DOORS = {path.parts[0]: TREES[path] for path in TREES if len(path.parts) == 2 and path.name == "__init__.py"}


def exported(tree):
    """What `__all__` of a module says, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def imports(tree):
    """(room, module inside it, name, whether for type checkers alone) of each import from this package."""
    types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "dfq_jax" for alias in node.names), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dfq_jax":
            for alias in node.names:
                room, _, inner = f"{node.module}.{alias.name}".removeprefix("dfq_jax.").partition(".")
                inner, _, name = inner.rpartition(".")
                yield room, inner, name, id(node) in types
                if not name:  # `from dfq_jax import room`: what is taken from it comes later
                    for use in ast.walk(tree):
                        if isinstance(use, ast.Attribute) and ast.unparse(use.value) == (alias.asname or room):
                            yield room, "", use.attr, False


def code_lines(source, tree, without=()):
    """The numbers of lines that hold code: neither blank nor comment nor docstring nor part of nodes `without`."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, without):
            last = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            lines.difference_update(range(node.lineno, last + 1))
    return sorted(lines)


def test_rooms_import_through_front_doors():
    wrong = set()
    for path, tree in TREES.items():
        for room, inner, name, _ in imports(tree):
            if path.parts[0] != room and (inner or (name and name not in exported(FRONT_DOORS[room]))):
                wrong.add(f"{path} {name or inner or room}")
    assert not wrong


def test_rooms_import_from_lower_floors():
    assert set(FRONT_DOORS) == set(FLOORS)
    wrong = set()
    for path, tree in TREES.items():
        for room, _, name, types in imports(tree):
            own = path.parts[0]
            if own in FLOORS and own != room and not types and FLOORS[room] >= FLOORS[own]:
                wrong.add(f"{path} {name or room}")
    assert not wrong


def test_rooms_say_what_they_are_for():
    for room, tree in FRONT_DOORS.items():
        assert ast.get_docstring(tree), room


def test_sections_of_docstrings_are_indented_by_two():
    wrong = []
    for path, tree in TREES.items():
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for text in [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]:
            for section, indent in re.findall(r"^(Args|Attributes|Raises|Returns):\n( +)", text, re.MULTILINE):
                if len(indent) != 2:
                    wrong.append(f"{path} {section}")
    assert not wrong


def test_modules_are_short():
    lengths = {str(path): source.count("\n") for path, source in MODULES.items()}
    assert not {path: n for path, n in lengths.items() if n >= MODULE_LINES}


def test_functions_are_short():
    long = []
    for path, tree in TREES.items():
        lines = code_lines(MODULES[path], tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = sum(node.lineno <= line <= node.end_lineno for line in lines)
                if n > FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno} {node.name} {n}")
    assert len(long) < LONG_FUNCTIONS, long


def test_nothing_stands_twice():
    found = collections.defaultdict(list)
    for path, tree in TREES.items():
        source = MODULES[path].splitlines()
        without = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        lines = code_lines(MODULES[path], tree, without)
        for i in range(len(lines) - SAME_LINES + 1):
            run = lines[i : i + SAME_LINES]
            found["\n".join(source[line - 1].strip() for line in run)].append(f"{path}:{run[0]}")
    twice = {text: places for text, places in found.items() if len(places) > 1}
    assert not twice
