"""The laws of the repository's layers (docs/architecture.md), read from its sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "internvl_rt"
# Parts that a plain `import internvl_rt` must do without.
OPTIONAL = ("av", "huggingface_hub", "safetensors", "transformers", "triton")


def files(folder, *suffixes):
    return [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes and p.is_file()]


def where(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


PYTHON = [p for d in ("python", "kernels", "bench", "tests") for p in files(d, ".py")]
CSRC = files("csrc", ".h", ".cpp")
KERNELS = files("kernels", ".h", ".cpp", ".cu", ".cuh")
# The emulator stands in for the CUDA compiler and runtime; it is a test's tool, not device code.
DEVICE_CODE = [p for p in KERNELS if "emu" not in p.relative_to(ROOT).parts]


def without_comments(path):
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', without_comments(path), re.MULTILINE)


def environment_reads(tree):
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        names = [name, *(a.name for a in getattr(node, "names", ()) if isinstance(a, ast.alias))]
        if {"environ", "environb", "getenv", "putenv"} & set(names):
            yield node


def swallowed_imports(tree):
    """Handlers that catch an ImportError, by whatever name, and do nothing."""
    broad = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {"Exception" if k is None else getattr(k, "id", None) for k in kinds}
            idle = all(
                isinstance(s, (ast.Pass, ast.Continue))
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if caught & broad and idle:
                yield node


def test_behaviour_never_comes_from_the_environment():
    for path in [*files("python", ".py"), *files("kernels", ".py")]:
        for node in environment_reads(ast.parse(path.read_text(encoding="utf-8"))):
            raise AssertionError(f"{where(path, node)} reads the environment")
    for path in [*CSRC, *KERNELS]:
        assert not re.search(r"\b(secure_)?getenv\b|\benviron\b", without_comments(path)), path


def test_no_error_is_swallowed():
    for path in PYTHON:
        for node in swallowed_imports(ast.parse(path.read_text(encoding="utf-8"))):
            raise AssertionError(f"{where(path, node)} swallows what it catches")


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (environment_reads, "import os\nos.environ['A']"),
        (environment_reads, "from os import getenv"),
        (environment_reads, "import os\nos.getenv('A')"),
        (swallowed_imports, "try:\n import a\nexcept ImportError:\n pass"),
        (swallowed_imports, "try:\n import a\nexcept (OSError, ModuleNotFoundError):\n ..."),
        (swallowed_imports, "try:\n import a\nexcept:\n pass"),
    ],
)
def test_the_checks_can_fail(check, source):
    assert list(check(ast.parse(source)))


def module_name(path):
    parts = ["internvl_rt", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files("python/internvl_rt", ".py")}


def executed(tree):
    """All nodes but those under `if TYPE_CHECKING`, which no program runs."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            yield from executed(node)


def imports(module, modules):
    """Modules of the package that one imports, at its top or inside a function."""
    found = set()
    for node in executed(ast.parse(modules[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from package import x`: the module x where it is one, else the package.
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                extension = full == "internvl_rt._C"
                found.add(full if full in modules or extension else node.module)
    return found & set(modules)


def cycle(graph):
    """A cycle of {node: successors} as a list of nodes, or None."""
    state = {}

    def visit(node, path):
        if state.get(node) == "open":
            return [*path[path.index(node) :], node]
        if node in state:
            return None
        state[node] = "open"
        for successor in sorted(graph[node]):
            found = visit(successor, [*path, node])
            if found:
                return found
        state[node] = "done"
        return None

    for node in sorted(graph):
        found = visit(node, [])
        if found:
            return found
    return None


def test_no_import_cycles():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert len(MODULES) > 10
    found = cycle({m: imports(m, MODULES) for m in MODULES})
    assert found is None, " -> ".join(found)


def test_ops_know_nothing_of_models():
    """Arrows go one way: the catalogue stands below layers, models, runtime and engine."""
    below = ("internvl_rt.ops", "internvl_rt._triton")
    for module in MODULES:
        if module.startswith(below):
            above = [m for m in imports(module, MODULES) if not m.startswith(below)]
            assert not above, f"{module} imports {above}"


def test_kernels_include_no_framework():
    assert KERNELS
    banned = re.compile(r"^(torch|ATen|c10|pybind11|dlpack|csrc)(/|$)|^Python\.h$|dlpack\.h$")
    for path in KERNELS:
        for header in includes(path):
            assert not banned.search(header), f"{path.relative_to(ROOT)} includes {header}"


def test_kernels_never_throw_print_or_end_the_process():
    assert DEVICE_CODE
    banned = re.compile(r"\bthrow\b|\bf?printf\s*\(|std::c(out|err)\b|\b(abort|exit)\s*\(")
    for path in DEVICE_CODE:
        found = banned.search(without_comments(path))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_host_code_has_no_intrinsics_and_no_kernels():
    assert CSRC
    header = re.compile(r"intrin\.h$|^arm_(neon|sve|sme)\.h$")
    use = re.compile(r"\b_mm\d*_\w+|\b__m\d{3}|\b_tile_\w+|__builtin_ia32_(?!pause\b)|__global__")
    for path in CSRC:
        for name in includes(path):
            assert not header.search(name), f"{path.relative_to(ROOT)} includes {name}"
        found = use.search(without_comments(path))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_nothing_is_left_for_later():
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in [*PYTHON, *CSRC, *KERNELS]:
        assert not mark.search(path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def documents():
    return [p for p in (ROOT / "README.md", *files("docs", ".md")) if p.exists()]


def named_paths(text):
    """Paths of this repository: from its top, or a file's bare name in backticks."""
    top = r"(?:python|csrc|kernels|tests|bench|tools|docs|\.ci)/[\w./*<>-]*"
    for found in re.findall(rf"(?<![\w/.<>-]){top}", text):
        yield found.rstrip("./") if found.rstrip("/").endswith(".") else found.rstrip("/")
    suffixes = r"(?:py|cpp|h|cu|cuh|md|toml|txt|cmake|\*)"
    yield from re.findall(rf"`([\w*<>-]+\.{suffixes})`", text)
    yield from re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)


def exists(name, folder):
    pattern = re.sub(r"<[^>]*>", "*", name)
    places = [ROOT, folder]
    if "/" not in pattern:  # a bare name stands for a file anywhere
        sources = [
            ROOT / d for d in ("python", "csrc", "kernels", "tests", "bench", "tools", "docs")
        ]
        if any(next(s.rglob(pattern), None) for s in sources if s.exists()):
            return True
    return any(next(place.glob(pattern), None) for place in places)


def test_documents_name_files_that_exist():
    assert documents()
    for path in documents():
        for name in named_paths(path.read_text(encoding="utf-8")):
            assert exists(name, path.parent), f"{path.relative_to(ROOT)} names {name}"


def test_the_path_check_can_fail():
    text = (
        "see `kernels/rms_norm.h`, docs/none.md. And `none.py`, [x](none/y.md), `csrc/ops/<op>.cpp`"
    )
    names = list(named_paths(text))
    assert names == [
        "kernels/rms_norm.h",
        "docs/none.md",
        "csrc/ops/<op>.cpp",
        "none.py",
        "none/y.md",
    ]
    assert [exists(n, ROOT) for n in names] == [True, False, True, False, False]


def test_importing_the_package_imports_nothing_optional():
    code = (
        f"import sys, internvl_rt\nprint(*[m for m in {OPTIONAL!r} if m in sys.modules], sep=',')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == ""
    assert result.stderr == ""
