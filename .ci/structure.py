"""Print what every module of evomem is, folder by folder, with what each folder imports.

    make structure

The text is the first line of a module's docstring; ``->`` names the folders that a folder imports from.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "evomem"


def imported(tree: ast.Module) -> set[str]:
    """Return the names of evomem's modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


def folder_of(module: str) -> str:
    """Return the folder of a module, one level below the package; the package's own files are ``evomem``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else PACKAGE.name


def main() -> None:
    """Print the tree."""
    uses: dict[str, set[str]] = defaultdict(set)
    lines: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        folder = folder_of(module.removesuffix(".__init__"))
        uses[folder] |= {folder_of(name) for name in imported(tree)} - {folder}
        said = (ast.get_docstring(tree) or "").split("\n")[0]
        lines[folder].append(f"  {path.relative_to(PACKAGE).as_posix():44} {text.count(chr(10)):4}  {said}")
    for folder in sorted(lines, key=lambda name: (name != PACKAGE.name, name)):
        print(f"\n{folder}/  ->  {', '.join(sorted(uses[folder])) or 'nothing'}")
        print("\n".join(lines[folder]))


if __name__ == "__main__":
    main()
