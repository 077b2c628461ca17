"""Who may import whom: each package only what stands below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The scripts stand beside the tools.
ORDER = ("utils", "datasets", "model", "model.fast", "flags", "evaluation", "tools")


def level(module: str) -> int | None:
    """The place in `ORDER` of a module of this project; None for others."""
    if (ROOT / f"{module.split('.')[0]}.py").exists():
        return len(ORDER) - 1
    parents = {".".join(module.split(".")[:k]) for k in (1, 2)}
    return max((k for k, name in enumerate(ORDER) if name in parents), default=None)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_imports_what_stands_above_it() -> None:
    upward = set()
    for name in ORDER:
        for path in (ROOT / name.replace(".", "/")).glob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for imported in imports(path):
                above, own = level(imported), level(module)
                assert own is not None
                if above is not None and above > own:
                    upward.add((module, imported.split(".")[0]))
    assert not upward
