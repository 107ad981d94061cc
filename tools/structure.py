"""structure.py [PACKAGE]: figures of a package's structure, read from its sources with ast alone.

Nothing is imported or run, so this reads any commit's tree: `git worktree add DIR COMMIT`, then
`structure.py DIR/megatron_opdlm`. A room is a folder of the package, or a file that stands at its
top. An arrow says that one room imports another, at the top of a file or inside a function.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

# One shipped entry of each kind of extension. The files that say its name, as an identifier or a
# string, are those that somebody touches who adds another.
EXTENSIONS = {
    "a divergence": "jsd",
    "a remasking rule": "entropy_bounded",
    "a way to choose states": "per_block",
    "a method": "off_policy",
    "a grader": "final_number",
    "an export format": "a2d",
    "a model family": "qwen2",
}
CONFIGURATION = ("Config", "ModelConfig", "ParallelConfig", "RolloutConfig", "DistillConfig")
CONFIGURATION += ("OptimizerConfig", "TrainConfig")


def read(package: Path) -> dict[str, ast.Module]:
    """Returns the syntax tree of every module by its dotted name; `a.b` for `package/a/b.py`."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(trees: Mapping[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Returns, for every module, the modules of the same package that it imports, anywhere."""
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == package:
                    found[name].add(_module(target.removeprefix(package).strip("."), trees))
        found[name] -= {name, ""}  # the package itself holds the version alone
    return found


def libraries(trees: Mapping[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Returns, for every module, the libraries that it imports when it runs."""
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[name].add(node.module.split(".")[0])
        found[name] -= {package, *sys.stdlib_module_names}
    return found


def room(module: str) -> str:
    """Returns the room that a module stands in."""
    return module.split(".")[0]


def arrows(imported: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Returns, for every room, the other rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in imported.items():
        found[room(module)] |= {room(target) for target in targets}
    return {name: targets - {name} for name, targets in sorted(found.items()) if name}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the groups of nodes that can all reach each other; those of one node are left out."""
    reached = {node: _reach(node, graph) for node in graph}
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached[other]))
        for node in graph
        if node in reached[node]
    }
    return [list(group) for group in sorted(groups)]


def function_lengths(trees: Mapping[str, ast.Module]) -> list[int]:
    """Returns the lengths of all functions in lines, sorted; nested ones are counted, too."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for tree in trees.values() for node in ast.walk(tree))
    return sorted(
        node.end_lineno - node.lineno + 1
        for node in nodes
        if isinstance(node, functions) and node.end_lineno
    )


def files_that_name(entry: str, trees: Mapping[str, ast.Module]) -> list[str]:
    """Returns the modules whose code says a name; docstrings and comments do not count."""
    return [name for name, tree in trees.items() if entry in {w.lower() for w in _words(tree)}]


def files_of_configuration(trees: Mapping[str, ast.Module]) -> list[str]:
    """Returns the modules that a run's configuration passes through: those that name its types."""
    wanted = set(CONFIGURATION)
    return [name for name, tree in trees.items() if wanted & set(_words(tree))]


def report(package: Path) -> str:
    """Returns all figures as lines of text."""
    trees = read(package)
    imported = imports(trees, package.resolve().name)
    graph, lengths = arrows(imported), function_lengths(trees)
    sources = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in package.rglob("*.py")}
    top = [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    folders = [path for path in package.iterdir() if (path / "__init__.py").is_file()]
    figures = {
        "files at the top, beside __init__ and __main__": len(top),
        "folders at the top": len(folders),
        "files": len(sources),
        "lines of the longest file": max(sources.values()),
        "arrows between modules": sum(map(len, imported.values())),
        "arrows between rooms": sum(map(len, graph.values())),
        "rooms in circles": sum(map(len, circles(graph))),
        "files that a run's configuration passes through": len(files_of_configuration(trees)),
        "rooms that it passes through": len({room(n) for n in files_of_configuration(trees)}),
        "functions": len(lengths),
        "lines of a function, 90th percentile": lengths[int(0.9 * len(lengths))],
        "lines of the longest function": lengths[-1],
    }
    figures |= {
        f"files that name {kind} ({entry})": len(files_that_name(entry, trees))
        for kind, entry in EXTENSIONS.items()
    }
    lines = [f"{value:6d}  {name}" for name, value in figures.items()]
    lines += [f"circle: {', '.join(group)}" for group in circles(graph)]
    return "\n".join(lines) + "\n"


def _module(target: str, trees: Mapping[str, ast.Module]) -> str:
    """The module that an imported name is or belongs to."""
    return target if target in trees else target.rpartition(".")[0]


def _reach(node: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph.get(node, ()))
    while waiting:
        if (following := waiting.pop()) not in found:
            found.add(following)
            waiting += graph.get(following, ())
    return found


def _words(tree: ast.Module) -> Iterator[str]:
    """Identifiers and strings of a module's code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.keyword | ast.arg) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", nargs="?", default="megatron_opdlm", help="folder of a package")
    package = Path(parser.parse_args().package)
    if not (package / "__init__.py").is_file():
        parser.error(f"{package} is no package; give the folder that holds its __init__.py")
    sys.stdout.write(report(package))


if __name__ == "__main__":
    main()
