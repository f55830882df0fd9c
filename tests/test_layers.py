"""Who may import whom, which modules stay free of device code, and the shape of the folders."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "adapters", "kernels", "loadtests")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "adapters": {"kernels"},
    "server": {"adapters", "kernels", "loadtests"},  # loadtests: only cli/bench.py, see below
    "loadtests": {"server"},
}
# Decided with integers: these may reach no tensor library, not even through another module.
PURE = (
    "shoal.adapters.blending",
    "shoal.adapters.compact",
    "shoal.adapters.errors",
    "shoal.adapters.residency",
    "shoal.adapters.slots",
    "shoal.adapters.spec",
    "shoal.loadtests.workload",
    "shoal.server.config",
    "shoal.server.engine.blocks",
    "shoal.server.engine.lookahead",
    "shoal.server.engine.loop",
    "shoal.server.engine.plan",
    "shoal.server.engine.prefix_cache",
    "shoal.server.engine.request",
    "shoal.server.engine.scheduler",
    "shoal.server.errors",
    "shoal.server.http.quotas",
    "shoal.server.model.fake",
)
DEVICE = ("torch", "triton", "numpy")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    found = imports(path)
    used = {name.split(".")[1] for name in found if name.startswith("shoal.")}
    assert used <= MAY_IMPORT[folder] | {folder}
    if path != ROOT / "server/cli/bench.py" and folder == "server":
        assert "loadtests" not in used
    assert not {name.split(".")[0] for name in found} & set(FOLDERS)


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_reach_no_device_code(module: str) -> None:
    script = f"import sys, {module}; print([m for m in {DEVICE!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_linked_and_shadow_no_package(folder: str) -> None:
    link = ROOT / "src/shoal" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    # An __init__.py here would shadow the `kernels` and `adapters` packages other projects install.
    assert not (ROOT / folder / "__init__.py").exists()
