"""Test the architecture: import rules, light imports, and limits on files and functions.

A wing is a subpackage, or one of the modules beside the subpackages. The number of suppressions
may only decrease: lower ``MOST_SUPPRESSIONS`` when a test finds fewer.
"""

import ast
import functools
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from helpers import ROOT, TESTS, write_run

from prefix_distill.cli.main import app

PACKAGE = ROOT / "prefix_distill"

# From top to bottom. A wing may import only from wings on lower lines.
WINGS = (
    ("cli",),
    ("api",),
    ("planning",),
    ("results",),
    ("training",),
    ("engine",),
    ("prompts", "config"),
    ("plugins",),
    ("maths",),
    ("lab",),
    ("errors", "display", "files", "signals"),
)
LEVEL = {wing: level for level, wings in enumerate(WINGS) for wing in wings}
# The package itself and `python -m prefix_distill` may import every wing.
ENTRANCES = ("", "__main__")

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_SUPPRESSIONS = {"noqa": 25, "type: ignore": 12}

MOST_PARAMETERS = 5  # self and cls excluded
MOST_POSITIONAL_ARGUMENTS = 3
# syntax nodes per line; conditional expressions and comprehensions per 100 lines
MOST_NODES = 6.3
MOST_CONDITIONAL_EXPRESSIONS = 1.0
MOST_COMPREHENSIONS = 2.0

# modules outside cli/ that may write to stdout or exit, with the reason
PRINTS = {
    "__main__": "ends the process at Ctrl-C before the command has begun",
    "api.rank": "a separate program: one rank of --gpus",
    "lab.build": "a separate program: python -m prefix_distill.lab.build",
    "prompts.expressions": "the grading worker sends its answers through stdout",
}

COMMANDS = sorted(typer.main.get_group(app).commands)
# the commands for formatter, linter and type checker in .ci/run
CHECKS = [
    line
    for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    if line.startswith(("ruff ", "mypy "))
]


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return dotted name → syntax tree for every module; "" is the package itself."""
    trees = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        trees[name.removesuffix("__init__").rstrip(".")] = parse(file)
    return trees


def split(name: str) -> list[str]:
    return name.split(".") if name else []


def package_of(module: str) -> list[str]:
    """Return the package to which the relative imports of a module refer."""
    parts = split(module)
    if PACKAGE.joinpath(*parts, "__init__.py").is_file():
        return parts
    return parts[:-1]


def imported_names(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Yield the dotted names that a module imports from the package, without ``prefix_distill``.

    Imports inside functions count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ["prefix_distill", *package[: len(package) - node.level + 1]]
            base += split(node.module or "")
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "prefix_distill":
                yield ".".join(rest)


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of the package that a module imports."""
    targets = set()
    for name in imported_names(modules()[module], package_of(module)):
        targets.add(name if name in modules() else name.rpartition(".")[0])
    return frozenset(targets - {""})


def wing_of(module: str) -> str:
    return module.split(".")[0]


def outside_packages(tree: ast.Module) -> Iterator[str]:
    """Yield the top-level name of every absolute import of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function, including its decorators."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield node.name, (node.end_lineno or node.lineno) - first + 1


# Imports


def test_every_module_has_a_wing():
    for name in modules():
        assert name in ENTRANCES or wing_of(name) in LEVEL, name


def test_imported_names_finds_every_form_of_import():
    tree = ast.parse(
        "import torch, prefix_distill.a.b\n"
        "from prefix_distill.c import d\n"
        "from . import e\n"
        "def f():\n    from ..g import h\n"
        "from .. import i\n"
    )
    names = set(imported_names(tree, ["wing", "part"]))
    assert names == {"a.b", "c.d", "wing.part.e", "wing.g.h", "wing.i"}
    assert {"errors", "config"} <= imports("cli.main") | imports("cli.run")


def test_no_import_goes_up_or_sideways():
    wrong = []
    for name in modules():
        if name in ENTRANCES:
            continue
        here = wing_of(name)
        for target in imports(name):
            there = wing_of(target)
            if here != there and LEVEL[here] >= LEVEL.get(there, 0):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in sorted(imports(name)):
            visit(target, (*path, name))
        done.add(name)

    for name in modules():
        visit(name, ())


def test_maths_imports_only_torch_and_the_standard_library():
    for name, tree in modules().items():
        if wing_of(name) != "maths":
            continue
        for package in outside_packages(tree):
            assert package == "torch" or package in sys.stdlib_module_names, (name, package)


def test_no_test_module_imports_another():
    """Code that several test modules share belongs in helpers.py."""
    for file in TESTS.rglob("*.py"):
        for package in outside_packages(parse(file)):
            assert not package.startswith("test_") and package != "conftest", (file.name, package)


def test_folders_of_tests_are_named_after_wings():
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")}
    assert folders <= LEVEL.keys()
    names = [file.name for file in TESTS.rglob("test_*.py")]
    assert len(set(names)) == len(names), "pytest requires unique names of test files"


# Output and light imports


def speaks(node: ast.AST) -> bool:
    """Return whether a node writes to stdout or ends the process."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) == "sys.stdout"
    if isinstance(node, ast.Name):
        return node.id == "SystemExit"
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    to_a_file = any(keyword.arg == "file" for keyword in node.keywords)
    return called in ("sys.exit", "exit", "quit", "os._exit", "typer.echo") or (
        called == "print" and not to_a_file
    )


def test_only_the_commands_print_or_exit():
    speakers = {
        name
        for name, tree in modules().items()
        if wing_of(name) != "cli" and any(speaks(node) for node in ast.walk(tree))
    }
    assert speakers == set(PRINTS)


def run_without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python code in a process in which importing torch, transformers or datasets fails."""
    without = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets']))"
    return subprocess.run(
        [sys.executable, "-c", f"{without}\n{code}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_torch_fails_in_run_without_torch():
    assert "ModuleNotFoundError" in run_without_torch("import torch").stderr


@pytest.mark.parametrize(
    "module",
    ["results.runs", "results.summary", "results.page", "api.public", "api.launch", "config"],
)
def test_light_modules_do_not_import_torch(module):
    done = run_without_torch(f"import prefix_distill.{module}")
    assert done.returncode == 0, done.stderr


def test_every_help_works_without_torch():
    code = (
        "import contextlib, io\n"
        "from prefix_distill.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = ['prefix-distill', *name.split(), '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        try:\n"
        "            main()\n"
        "        except SystemExit as end:\n"
        "            assert not end.code, (name, end.code)\n"
        "    assert 'Usage' in text.getvalue(), name\n"
    )
    done = run_without_torch(code, "", *COMMANDS)
    assert done.returncode == 0, done.stderr


def test_report_works_without_torch(tmp_path):
    write_run(tmp_path / "run", 0, [0.2, 0.5], 10.0)
    code = "from prefix_distill.cli.main import main; main()"
    done = run_without_torch(
        code, "report", str(tmp_path / "run"), "--out", str(tmp_path / "report")
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report/report.html").is_file()


def test_help_takes_less_than_half_a_second():
    """Use CPU seconds and the fastest of five runs, because the machine may be busy."""

    def seconds() -> float:
        begun = os.times()
        command = [sys.executable, "-m", "prefix_distill", "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        ended = os.times()
        user = ended.children_user - begun.children_user
        return user + ended.children_system - begun.children_system

    assert min(seconds() for _ in range(5)) < 0.5


# Sizes


def test_files_are_at_most_400_lines():
    for file in PACKAGE.rglob("*.py"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, file.relative_to(PACKAGE).as_posix()


def test_functions_are_at_most_60_lines():
    for module, tree in modules().items():
        for function, lines in functions(tree):
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{module}.{function}"


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of a function's parameters except self and cls."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_functions_take_at_most_five_parameters_except_the_operands_of_a_formula():
    """Only functions in maths/ may have more. Each has a linter suppression with a reason."""
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if len(parameters(node)) > MOST_PARAMETERS:
                assert wing_of(module) == "maths", f"{module}.{node.name}"


def test_lines_are_not_dense():
    """Dense lines take longer to read. The limits apply to the average over the package."""
    nodes: list[ast.AST] = []
    lines = 0
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        nodes += ast.walk(ast.parse(text))
    comprehensions = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    conditional = sum(isinstance(node, ast.IfExp) for node in nodes)
    comprehended = sum(isinstance(node, comprehensions) for node in nodes)
    assert len(nodes) / lines <= MOST_NODES
    assert 100 * conditional / lines <= MOST_CONDITIONAL_EXPRESSIONS
    assert 100 * comprehended / lines <= MOST_COMPREHENSIONS


def test_dataclasses_are_keyword_only():
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for decorator in map(ast.unparse, node.decorator_list):
                is_dataclass = re.match(r"(dataclasses\.)?dataclass\b", decorator)
                assert not is_dataclass or "kw_only=True" in decorator, f"{module}.{node.name}"


@functools.cache
def functions_of_package() -> dict[str, bool]:
    """Return, for each name of a function, method or class, whether it takes ``*arguments``."""
    takes_any_number: dict[str, bool] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                takes_any = node.args.vararg is not None
                takes_any_number[node.name] = takes_any or takes_any_number.get(node.name, False)
            elif isinstance(node, ast.ClassDef):
                takes_any_number.setdefault(node.name, False)
    return takes_any_number


def names_of_package(module: str) -> set[str]:
    """Return the names in a module that stand for functions and classes of the package."""
    tree = modules()[module]
    definitions = ast.FunctionDef | ast.ClassDef
    names = {node.name for node in tree.body if isinstance(node, definitions)}
    for name in imported_names(tree, package_of(module)):
        names.add(name.rpartition(".")[2])
    return names - set(names_from_outside(tree))


def names_from_outside(tree: ast.Module) -> Iterator[str]:
    """Yield the names that absolute imports bind in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0]


def long_positional_calls(module: str) -> Iterator[ast.Call]:
    """Yield the calls of the package's functions with too many positional arguments.

    A method is known by its name alone, so a name that some method of the package has, and that
    is called on something else, counts as well.
    """
    tree = modules()[module]
    here, outside = names_of_package(module), set(names_from_outside(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) <= MOST_POSITIONAL_ARGUMENTS:
            continue
        if isinstance(node.func, ast.Name):
            name = node.func.id
            is_ours = name in here
        elif isinstance(node.func, ast.Attribute):
            name = node.func.attr
            is_ours = ast.unparse(node.func.value).split(".")[0] not in outside
        else:
            continue
        takes_any_number = functions_of_package().get(name, True)
        if is_ours and not takes_any_number:
            yield node


def test_calls_name_all_but_three_arguments():
    wrong = []
    for module in modules():
        for call in long_positional_calls(module):
            wrong.append(f"{module}:{call.lineno} {ast.unparse(call.func)}")
    assert wrong == []


def test_the_reader_of_calls_sees_every_form(monkeypatch):
    tree = ast.parse(
        "from rich.progress import Progress\nimport outside\nfrom .a import imported\n"
        "def own(a, b, c, d): own(1, 2, 3, 4)\n"
        "imported(1, 2, 3, 4)\nthing.method(1, 2, 3, 4)\nown(1, 2, 3, d=4)\n"
        "Progress(1, 2, 3, 4)\noutside.method(1, 2, 3, 4)\nlocal(1, 2, 3, 4)\nany(1, 2, 3, 4)\n"
        "class Progress:\n    def method(self, a, b, c, d): pass\n"
    )
    library = ast.parse("def imported(a, b, c, d): pass\ndef any(*numbers): pass")
    monkeypatch.setitem(globals(), "modules", lambda: {"part": tree, "a": library})
    functions_of_package.cache_clear()
    lines = [call.lineno for call in long_positional_calls("part")]
    functions_of_package.cache_clear()
    assert sorted(lines) == [4, 5, 6]


def test_lambdas_only_sort():
    """Elsewhere a value, an object or a function with a name says what it is."""
    for module, tree in modules().items():
        keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        sorting = {id(keyword.value) for keyword in keywords if keyword.arg == "key"}
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Lambda) or id(node) in sorting, (module, node.lineno)


def test_no_module_imports_a_private_name_of_another():
    for module, tree in modules().items():
        for name in imported_names(tree, package_of(module)):
            last = name.rpartition(".")[2]
            assert not last.startswith("_") or last.startswith("__"), f"{module} imports {name}"


# The linter and the type checker


@functools.cache
def comments() -> list[tuple[str, str]]:
    """Return (file:line, text) of every comment of the package and the tests."""
    texts = []
    for file in [ROOT / "prefix_distill.py", *PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                where = f"{file.relative_to(ROOT).as_posix()}:{token.start[0]}"
                texts.append((where, token.string))
    return texts


# `noqa: CODE  reason` and `type: ignore[code]  # reason`
FORMS = {
    "noqa": r"# noqa: [A-Z]+\d+(, ?[A-Z]+\d+)* +\S.{9,}",
    "type: ignore": r"# type: ignore\[[a-z-]+(, ?[a-z-]+)*\] +# \S.{9,}",
}


@pytest.mark.parametrize("kind", MOST_SUPPRESSIONS)
def test_suppressions_have_a_code_and_a_reason_and_do_not_increase(kind):
    suppressions = [
        (where, text)
        for where, text in comments()
        if re.search(rf"#\s*{kind}", text, re.IGNORECASE)
    ]
    assert [where for where, text in suppressions if not re.search(FORMS[kind], text)] == []
    assert len(suppressions) == MOST_SUPPRESSIONS[kind], "lower MOST_SUPPRESSIONS; never raise it"


def test_no_comment_disables_a_tool_for_more_than_one_line():
    switches = re.compile(r"#\s*(ruff|flake8|mypy|fmt|isort|pylint):", re.IGNORECASE)
    assert [where for where, text in comments() if switches.match(text)] == []


def test_ci_checks_the_whole_repository():
    assert CHECKS == [
        "ruff format --check .",
        "ruff check .",
        "mypy prefix_distill tests/benchmarks",
    ]


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=[pytest.mark.long] * line.startswith("mypy")) for line in CHECKS],
)
def test_formatter_linter_and_type_checker_pass(line):
    """Run each installed tool, so that the tests find the errors that .ci/run would find."""
    tool, *arguments = shlex.split(line)
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", tool, *arguments],
        cwd=ROOT,
        env=os.environ | {"RUFF_OUTPUT_FORMAT": "concise"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
