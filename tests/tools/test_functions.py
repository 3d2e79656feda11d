"""rewrite_function puts a model's function in the place of the old one, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dspark_tools.functions import (
    Functions,
    clean_code,
    function_contract,
    function_names,
    function_pattern,
    function_source,
    replace_function,
)
from dspark_tools.workspace import Workspace, WorkspaceError

MODULE = '''"""Shapes."""

import math


def area(r):
    """Area of a circle."""
    return math.pi * r


class Square:
    @property
    def size(self):
        return self.side * 2

    def name(self): return "square"
'''


def test_names_and_source() -> None:
    assert function_names(MODULE) == ("area", "size", "name")
    assert function_names("def broken(") == ()
    assert function_source(MODULE, "size") == (
        "@property\ndef size(self):\n    return self.side * 2"
    )


def test_contract_is_the_function_without_its_body() -> None:
    assert function_contract(MODULE, "area") == 'def area(r):\n    """Area of a circle."""'
    assert function_contract(MODULE, "size") == "@property\ndef size(self):"


def test_contract_with_open_defaults() -> None:
    text = 'def f(a, b=[], *, c, d=2):\n    """Doc."""\n    return b\n'

    assert function_contract(text, "f", open_defaults=True) == (
        'def f(a, b=?, *, c, d=?):\n    """Doc."""'
    )


@pytest.mark.parametrize(
    "code",
    [
        "def area(r):\n    return 1",
        "def area(r: float, k=None) -> float:\n    if r:\n        return 1\n\n    return 2",
        "def area(r):\n    r += 1\n    ret = r\n    retur = 1\n    print(ret)",
        "def area(r):\n    return {\n        1: 2,\n    }",
        "def area(r):\n    for x in r:\n        return x\n    else:\n        pass",
    ],
)
def test_pattern_admits_the_function(code: str) -> None:
    assert re.search(function_pattern(MODULE, "area"), code)


@pytest.mark.parametrize(
    "code",
    [
        "def size(r):\n    return 1",
        "def area(r): return 1",
        "def area(r):\n    return 1\n\nprint(area(1))",
        "def area(r):\n    return 1\n}",
        "def area(r):",
        "def area(r=?):\n    return r",
        "def area(r):\n    r = 1\n    }}",
        "def area(r):\n    return r\n    }}",
        "def area(r):\n    return r\n     # Your code here",
        "def area(r):\n    return 1\n    x = 2",
        "def area(r):\n    return 1\n\n    def more():\n        pass",
    ],
)
def test_pattern_admits_nothing_else(code: str) -> None:
    assert not re.search(function_pattern(MODULE, "area"), code)


def test_pattern_of_an_async_function() -> None:
    pattern = function_pattern("async def f():\n    pass\n", "f")

    assert re.search(pattern, "async def f():\n    return 1")
    assert not re.search(pattern, "def f():\n    return 1")


def test_replaces_the_function_and_keeps_its_docstring() -> None:
    changed = replace_function(MODULE, "def area(r):\n    return math.pi * r * r\n")

    assert changed == MODULE.replace("math.pi * r", "math.pi * r * r")


def test_new_docstring_wins() -> None:
    changed = replace_function(MODULE, 'def area(r):\n    """New."""\n    return 1\n')

    assert '"""New."""' in changed
    assert "Area of a circle" not in changed


def test_function_in_one_line_is_split() -> None:
    changed = replace_function(MODULE, "def area(r): return 'ø' if r < 0 else math.pi * r ** 2")

    assert changed == MODULE.replace(
        "return math.pi * r\n", "return 'ø' if r < 0 else math.pi * r ** 2\n"
    )
    assert '(self):\n        return "sq"\n' in replace_function(
        MODULE, 'def name(self): return "sq"'
    )


def test_methods_keep_decorators_and_indentation() -> None:
    changed = replace_function(MODULE, "def size(self):\n    if 1:\n        return self.side\n")

    assert (
        "    @property\n    def size(self):\n        if 1:\n            return self.side\n"
        in changed
    )
    compile(changed, "shapes.py", "exec")


def test_new_decorators_replace_the_old() -> None:
    changed = replace_function(MODULE, "@cached\ndef size(self):\n    return self.side\n")

    assert "    @cached\n    def size(self):" in changed
    assert "@property" not in changed


def test_imports_move_to_the_top_once() -> None:
    code = "import math\nfrom operator import mul\n\ndef area(r):\n    return mul(r, r)\n"

    changed = replace_function(MODULE, code)

    assert changed.startswith('"""Shapes."""\n\nimport math\n\nfrom operator import mul\n')
    assert changed.count("import math") == 1
    compile(changed, "shapes.py", "exec")


def test_imports_go_below_the_docstring_where_there_are_none() -> None:
    changed = replace_function(
        '"""Doc."""\n\n\ndef f():\n    return 1\n', "import os\n\ndef f():\n    return os\n"
    )

    assert changed.startswith('"""Doc."""\n\nimport os\n')


def test_examples_beside_the_function_are_left_out() -> None:
    code = "def area(r):\n    return r\n\nprint(area(2))\n\ndef other():\n    pass\n"

    changed = replace_function(MODULE, code)

    assert "print" not in changed
    assert "other" not in changed


@pytest.mark.parametrize(
    "code", ["```python\ndef f():\n    pass\n```\nDone.", "    def f():\n        pass"]
)
def test_fences_and_indentation_are_taken_off(code: str) -> None:
    assert clean_code(code) == "def f():\n    pass"


@pytest.mark.parametrize("end", ["}", "}}", '"}}', "\n    }}", "]\n```"])
def test_ends_of_json_are_taken_off(end: str) -> None:
    assert clean_code("def f():\n    return {1: [2]}" + end).rstrip() == (
        "def f():\n    return {1: [2]}"
    )


def test_code_that_stays_wrong_is_left_as_it_is() -> None:
    assert clean_code("def f(:\n    return {}}") == "def f(:\n    return {}}"


def test_windows_line_ends_are_kept() -> None:
    changed = replace_function("def f():\r\n    return 1\r\n", "def f():\n    return 2\n")

    assert changed == "def f():\r\n    return 2\r\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def area(r:\n    return 1", "not valid Python in line 1"),
        ("x = 1", "has no function"),
        ("", "has no function"),
        ("\0", "not valid Python"),
        (
            "def volume(r):\n    return 1",
            "no function 'volume'; its functions are: area, size, name",
        ),
        ("def area(r):\n    # better\n    return math.pi * r", "in the module already"),
    ],
)
def test_unusable_code_is_explained(code: str, reason: str) -> None:
    with pytest.raises(WorkspaceError, match=reason):
        replace_function(MODULE, code)


def test_functions_of_the_same_name_are_not_guessed() -> None:
    with pytest.raises(WorkspaceError, match="has 2 functions 'f'"):
        replace_function("def f():\n    pass\n\ndef f():\n    pass\n", "def f():\n    return 1")


def test_module_that_does_not_parse_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(:\n")

    with pytest.raises(WorkspaceError, match=r"a\.py does not parse \(line 1"):
        Functions(Workspace(tmp_path)).rewrite_function("a.py", "def f():\n    pass")


def test_tool_writes_and_shows_the_function(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(MODULE)
    tool = Functions(Workspace(tmp_path))

    shown = tool.rewrite_function("shapes.py", "def area(r):\n    return math.pi * r * r")

    assert shown == (
        "Rewrote area in shapes.py:\n"
        '1| def area(r):\n2|     """Area of a circle."""\n3|     return math.pi * r * r'
    )
    assert "r * r" in (tmp_path / "shapes.py").read_text()
