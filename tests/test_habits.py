"""The house rules of CONTRIBUTING.md that no linter checks: file length, imports, pickles, make targets."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
HEAVY = {"hydra", "omegaconf", "ray", "deepspeed", "megatron", "wandb", "matplotlib"}
PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FILE_CALLS = {"torch.load", "torch.save"}

# Prints every module name after torch alone, a blank line, and every name after the science was imported too.
IMPORT_SCIENCE = """
import sys, numpy, torch, torch.utils.checkpoint
print(*sys.modules, sep="\\n")
print()
import importlib, pkgutil
for name in ("memory", "model", "tasks"):
    package = importlib.import_module(f"sleeptrain.{name}")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"sleeptrain.{name}.{module.name}")
print(*sys.modules, sep="\\n")
"""


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def too_long(source: str) -> bool:
    if len(source.splitlines()) <= MAX_LINES:
        return False
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return not any(line.startswith("Over 400 lines because") for line in docstring.splitlines())


def unsafe_file_access(source: str) -> Iterator[str]:
    """Yield what in ``source`` can unpickle: a pickle library, torch.load or torch.save, allow_pickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").split(".")[0] in PICKLERS or names & FILE_CALLS:
                yield f"from {node.module}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FILE_CALLS:
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def top_level(names: str) -> set[str]:
    return {name.split(".")[0] for name in names.split()}


def makefile_targets() -> list[str]:
    return re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_stay_short() -> None:
    files = python_files("sleeptrain", "tools", "tests")
    assert files
    assert [str(path.relative_to(ROOT)) for path in files if too_long(path.read_text())] == []


def test_too_long_asks_for_the_reason() -> None:
    body = "x = 1\n" * (MAX_LINES - 1)
    assert not too_long('"""One."""\n' + body)
    assert too_long('"""One."""\n\n' + body)
    assert not too_long('"""One.\n\nOver 400 lines because it is a table.\n"""\n' + body)


def test_science_imports_torch_and_numpy_alone() -> None:
    script = [sys.executable, "-c", IMPORT_SCIENCE]
    listing = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = map(top_level, listing.split("\n\n"))
    assert after - before - sys.stdlib_module_names == {"sleeptrain"}
    assert after & HEAVY == set()


def test_the_model_needs_torch_alone() -> None:
    """Everything else that could be installed is hidden; numpy too."""
    hidden = sorted(HEAVY | {"numpy", "safetensors", "tokenizers", "tqdm", "yaml"})
    script = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import sleeptrain.model"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True)


def test_package_reads_and_writes_no_pickles() -> None:
    found = {
        str(path.relative_to(ROOT)): list(unsafe_file_access(path.read_text()))
        for path in python_files("sleeptrain")
    }
    assert found
    assert {path: uses for path, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_file_access_is_found(source: str) -> None:
    assert list(unsafe_file_access(source))


def test_every_make_target_is_phony_and_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert sorted(phony[1].split()) == sorted(makefile_targets())


@pytest.mark.parametrize("target", makefile_targets())
def test_readme_documents_make_target(target: str) -> None:
    assert re.search(rf"make {target}(?![\w-])", (ROOT / "README.md").read_text())
