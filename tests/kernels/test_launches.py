"""Launches in the source against the kernels they launch.

Triton's interpreter ignores keyword arguments that a kernel does not have; its compiler does not.
"""

import ast
from pathlib import Path

import pytest

import shoal.kernels

FOLDERS = sorted(path.parent for path in Path(shoal.kernels.__path__[0]).glob("*/jit.py"))
# Options of a launch, not parameters of the kernel.
OPTIONS = {"num_warps", "num_stages", "maxnreg"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_launches_name_only_parameters_of_their_kernel(folder: Path) -> None:
    kernels = {
        node.name: {argument.arg for argument in node.args.args}
        for node in ast.parse((folder / "jit.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    launched = [
        (node.func.value.id, {keyword.arg for keyword in node.keywords if keyword.arg})
        for node in ast.walk(ast.parse((folder / "kernel.py").read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in kernels
    ]
    assert launched
    for name, keywords in launched:
        assert keywords <= kernels[name] | OPTIONS, name
