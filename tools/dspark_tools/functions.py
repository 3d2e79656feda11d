"""Tool that replaces one Python function: the edit that small models get right.

Exact-text and line edits need the model to copy or count; writing a function is what a code model
has seen most. So the edit is the whole function, and finding the old one is our work.
"""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from dspark_agent import FunctionToolset
from dspark_tools.files import number_lines
from dspark_tools.workspace import Workspace, WorkspaceError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Functions:
    """The function-rewriting tool of a workspace."""

    workspace: Workspace

    def toolset(self) -> FunctionToolset:
        """The tool as a toolset."""
        return FunctionToolset([self.rewrite_function], id="functions")

    def rewrite_function(self, path: str, code: str) -> str:
        """Replace a function of a Python file by new code for the function of the same name.

        Args:
            path: The Python file, relative to the workspace.
            code: The complete new function, from "def" on.
        """
        text = self.workspace.read_text(path)
        changed = replace_function(text, code, path)
        self.workspace.write_text(path, changed)
        name = _only_function(_parse_code(clean_code(code))).name
        source = function_source(changed, name)
        return f"Rewrote {name} in {path}:\n" + "\n".join(number_lines(source.splitlines()))


def function_names(text: str) -> tuple[str, ...]:
    """Names of the functions and methods of a module, in order; empty if it does not parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return ()
    return tuple(dict.fromkeys(node.name for node in _functions(tree)))


def function_source(text: str, name: str) -> str:
    """The source of a function, decorators included, dedented.

    Raises:
        WorkspaceError: The module has no such function, or several.
    """
    node = _find(ast.parse(text), name, "the module")
    lines = text.splitlines()[_first_line(node) - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines))


def function_contract(text: str, name: str, *, open_defaults: bool = False) -> str:
    """What a function promises: its signature and docstring, without the body.

    With ``open_defaults`` the default values are written as ``?``, for whoever shall choose them.

    Raises:
        WorkspaceError: The module has no such function, or several.
    """
    node = copy.deepcopy(_find(ast.parse(text), name, "the module"))
    node.body = node.body[:1] if ast.get_docstring(node) is not None else []
    if open_defaults:
        blank = ast.Name("?")
        node.args.defaults = [blank for _ in node.args.defaults]
        node.args.kw_defaults = [blank if value else None for value in node.args.kw_defaults]
    return ast.unparse(node)


def function_pattern(text: str, name: str) -> str:
    """A regular expression for new code of a function, to hold a model to.

    It fixes the name, keeps brackets and open defaults out of the parameters, and ends where the
    function does: after a ``return`` of the outermost level, where small models like to run on.

    Raises:
        WorkspaceError: The module has no such function, or several.
    """
    node = _find(ast.parse(text), name, "the module")
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    head = rf"{keyword} {name}\([^()?\n]*\)( -> [^:\n]+)?:"
    # Without look-ahead: a line that does not start with "return", letter by letter; nor with
    # a closing brace, which is the model ending its JSON inside the string.
    starts = [r"[^r }\n]", *(f"{'return'[:i]}[^{'return'[i]}\\n]" for i in range(1, 6))]
    other = "|".join([*starts, r"return[A-Za-z0-9_]"])
    line = rf"\n{{1,2}}( {{5,}}[^ \n]| {{4}}({other}))[^\n]*"
    over_lines = r"[^\n]*[\[({](\n {5,}[^ \n][^\n]*)+\n {4}[\])}]+"
    last = rf"\n{{1,2}} {{4}}return([^\n]*|{over_lines})"
    return f"^{head}(({line})+({last})?|{last})$"


def replace_function(text: str, code: str, path: str = "the module") -> str:
    """``text`` with one of its functions replaced by ``code``.

    Decorators and docstring stay where ``code`` has none; imports in ``code`` move to the top of
    the module. Anything else beside the function, such as examples of its use, is left out.

    Raises:
        WorkspaceError: ``code`` is not one function that differs from the one in ``text``.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    text = text.replace("\r\n", "\n")
    code = _body_below(clean_code(code))
    fresh = _parse_code(code)
    function = _only_function(fresh)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise WorkspaceError(
            f"{path} does not parse (line {error.lineno}: {error.msg}); use edit_file."
        ) from None
    old = _find(tree, function.name, path)

    body = code.splitlines()[_first_line(function) - 1 : function.end_lineno]
    kept_decorators = [] if function.decorator_list else _lines(text, _first_line(old), old.lineno)
    fresh_lines = [*kept_decorators, *_indented(body, old.col_offset)]
    if ast.get_docstring(function) is None and ast.get_docstring(old) is not None:
        doc = old.body[0]
        position = function.body[0].lineno - _first_line(function) + len(kept_decorators)
        assert doc.end_lineno is not None
        fresh_lines[position:position] = _lines(text, doc.lineno, doc.end_lineno + 1)

    lines = text.splitlines()
    lines[_first_line(old) - 1 : old.end_lineno] = fresh_lines
    imports = [ast.unparse(node) for node in fresh.body if isinstance(node, _IMPORTS)]
    missing = [line for line in imports if line not in lines]
    place = _import_line(tree)
    lines[place:place] = [*([""] if missing and place else []), *missing]
    changed = "\n".join(lines) + "\n"
    _check(text, changed, path, function.name)
    return changed.replace("\n", newline)


def clean_code(code: str) -> str:
    """The code inside a Markdown fence, or ``code`` itself; dedented, and without the brackets
    with which small models end their JSON inside the string."""
    lines = code.strip("\n").splitlines()
    if lines and lines[0].startswith("```"):
        end = next((i for i, line in enumerate(lines[1:], 1) if line.startswith("```")), len(lines))
        lines = lines[1:end]
    whole = textwrap.dedent("\n".join(lines))
    shorter = whole
    while not _parses(shorter) and shorter.rstrip()[-1:] in ("}", "]", "`", '"'):
        shorter = shorter.rstrip()[:-1]
    return shorter if _parses(shorter) else whole


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


_IMPORTS = (ast.Import, ast.ImportFrom)


def _body_below(code: str) -> str:
    """The code with a function written in one line (``def f(x): return x``) split in two."""
    function = _only_function(_parse_code(code))
    first = function.body[0]
    lines = code.splitlines()
    # Columns count bytes of UTF-8.
    line = lines[first.lineno - 1].encode()
    head, rest = line[: first.col_offset], line[first.col_offset :]
    if not head.strip():
        return code
    lines[first.lineno - 1 : first.lineno] = [head.decode().rstrip(), f"    {rest.decode()}"]
    return "\n".join(lines)


def _parse_code(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise WorkspaceError(f"the code is not valid Python{where}: {error}.") from None


def _only_function(tree: ast.Module) -> FunctionNode:
    found = [node for node in tree.body if isinstance(node, FunctionNode)]
    if not found:
        raise WorkspaceError('the code has no function; start it with "def".')
    # Small models like to go on with the next function of the file: the first is the one meant.
    return found[0]


def _functions(tree: ast.Module) -> Iterator[FunctionNode]:
    """The functions of a module and the methods of its classes, in order of the source."""
    for node in tree.body:
        if isinstance(node, FunctionNode):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (inner for inner in node.body if isinstance(inner, FunctionNode))


def _find(tree: ast.Module, name: str, path: str) -> FunctionNode:
    found = [node for node in _functions(tree) if node.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise WorkspaceError(f"{path} has {len(found)} functions {name!r}; use edit_file.")
    names = ", ".join(dict.fromkeys(node.name for node in _functions(tree))) or "none"
    raise WorkspaceError(f"{path} has no function {name!r}; its functions are: {names}.")


def _first_line(node: FunctionNode) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _lines(text: str, first: int, end: int) -> list[str]:
    """Lines ``first`` up to but not including ``end``, counted from 1."""
    return text.splitlines()[first - 1 : end - 1]


def _indented(lines: list[str], columns: int) -> list[str]:
    return [f"{' ' * columns}{line}" if line.strip() else "" for line in lines]


def _import_line(tree: ast.Module) -> int:
    """After which line a new import goes: behind the last import, else the docstring, else 0."""
    line = 0
    for index, node in enumerate(tree.body):
        is_docstring = index == 0 and ast.get_docstring(tree, clean=False) is not None
        if is_docstring or isinstance(node, _IMPORTS):
            line = node.end_lineno or line
    return line


def _check(before: str, after: str, path: str, name: str) -> None:
    try:
        tree = ast.parse(after)
    except SyntaxError as error:
        raise WorkspaceError(f"{path} would not parse with it: {error.msg}.") from None
    if ast.dump(tree) == ast.dump(ast.parse(before)):
        raise WorkspaceError(
            f"this is the {name} that is in {path} already, with the same bug; change it."
        )
