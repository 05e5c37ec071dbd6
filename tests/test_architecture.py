"""The tree's own rules: import arrows without cycles, first lines that say what lives there, small files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "kvcondense"
FILES = sorted(PACKAGE.rglob("*.py"))

# Layer -> layers it may import. "top" is what stands in the package's root beside the layers named here.
ARROWS = {
    "errors": set(),
    "numerics": set(),
    "config": {"config", "files", "errors"},
    "spec": {"config", "files", "errors"},
    "formats": {"formats", "errors"},
    "forks": set(),
    "rope_table": {"forks", "config", "errors"},
    "weightfiles": {"weightfiles", "files", "spec", "config", "errors"},
    "weights": {"forks", "weightfiles", "spec", "errors"},
    "checkpoint": {"weights", "weightfiles", "spec", "config", "errors"},
    "layout": {"layout", "formats", "spec", "errors"},
    "stages": {"layout", "spec", "numerics", "errors"},
    "backends": {"backends", "files", "forks", "stages", "rope_table", "layout", "formats", "spec", "config", "errors"},
    "ops": {
        "bound", "validate", "backends", "layout", "rope_table", "weights", "formats", "spec", "numerics", "errors",
    },
    "planning": {"backends", "layout", "errors"},
    "marks": {"backends", "layout", "spec"},
    "bound": {
        "planning", "marks", "validate", "backends", "layout", "rope_table", "weights", "spec", "numerics", "errors",
    },
    "validate": {"layout", "rope_table", "weights", "spec", "errors"},
    "prepared": {"bound", "validate", "backends", "layout", "numerics", "errors"},
    "api": {"bound", "validate", "backends", "stages", "rope_table", "layout", "weights", "spec", "numerics", "errors"},
    "golden": {
        "golden", "api", "backends", "layout", "stages", "rope_table", "weights", "formats", "spec", "config",
        "numerics", "errors",
    },
    "conformance": {
        "conformance", "golden", "snapshot", "files", "api", "backends", "layout", "stages", "rope_table", "weights",
        "formats", "spec", "config", "numerics", "errors",
    },
    "snapshot": {"files", "backends", "layout", "spec", "errors"},
    "files": {"files", "errors"},
    "cachefile": {"files", "api", "layout", "weights", "formats", "spec", "errors"},
    "bundle": {"bundle", "api", "snapshot", "files", "backends", "layout", "formats", "spec", "errors"},
    "stream": {"cachefile", "files", "api", "layout", "rope_table", "weights", "formats", "spec", "config", "errors"},
    "integrations": {
        "integrations", "planning", "api", "bound", "backends", "layout", "rope_table", "weights", "formats", "spec",
        "config", "errors",
    },
    "parallel": {
        "parallel", "training", "api", "bound", "backends", "stages", "layout", "rope_table", "weights", "spec",
        "numerics", "errors",
    },
    "markup": set(),
    "visualiser": {"visualiser", "markup", "layout", "formats", "spec", "config", "errors"},
    "capacity": {"formats", "spec", "config", "errors"},
    "module": {"training", "parallel", "layout", "rope_table", "weights", "spec", "numerics", "errors"},
    "training": {
        "training", "api", "bound", "validate", "backends", "stages", "layout", "rope_table", "weights", "formats",
        "spec", "numerics", "errors",
    },
    "bench": {
        "bench", "bundle", "files", "parallel", "training", "planning", "prepared", "api", "bound", "backends",
        "layout", "stages", "rope_table", "weights", "formats", "spec", "config", "errors",
    },
    "cli": {
        "cli", "files", "markup", "bundle", "capacity", "visualiser", "bench", "stream", "cachefile", "checkpoint",
        "conformance", "golden", "integrations", "planning", "api", "backends", "layout", "weights",
        "formats", "spec", "config", "errors", "kvcondense",
    },
}  # fmt: skip
FREE = {"__init__", "__main__"}


def layer(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.names[0].name != "*", f"{path}: star import"
            modules = [f"{node.module}.{a.name}" if node.module == "kvcondense" else node.module for a in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "kvcondense":
                yield parts[1] if len(parts) > 1 else "kvcondense"


def test_every_module_has_a_layer():
    assert {layer(p) for p in FILES} == set(ARROWS) | FREE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    if layer(path) in FREE:
        return
    assert set(imports(path)) <= ARROWS[layer(path)]


def test_arrows_have_no_cycle():
    done = []
    rest = {k: v - {k, "kvcondense"} for k, v in ARROWS.items()}
    while rest:
        free = [k for k, v in rest.items() if v <= set(done)]
        assert free, f"cycle among {sorted(rest)}"
        done += free
        rest = {k: v for k, v in rest.items() if k not in free}


def test_only_the_reference_backend_knows_the_stages():
    for path in sorted((PACKAGE / "backends").rglob("*.py")):
        # The host side of pypto hands the selectors and signs of the stages over as matrices.
        assert ("stages" in set(imports(path))) == (
            path.name == "reference.py" or path.parts[-2:] == ("pypto", "calls.py")
        )


def test_host_side_of_the_cpu_backend_does_not_import_numba():
    """What a process with compiled kernels imports: llvmlite at most, and that inside functions."""
    for path in sorted((PACKAGE / "backends" / "cpu").glob("*.py")):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.split(".")[0] in ("numba", "llvmlite") or ".kernels" in n], path


def test_host_side_of_the_triton_backend_does_not_import_triton():
    """It is asked for its reasons where triton is not installed."""
    for path in sorted((PACKAGE / "backends" / "triton").glob("*.py")):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        assert not [n for n in names if n.split(".")[0] == "triton" or ".kernels" in n], path


def test_golden_reference_does_not_use_the_stages():
    assert set(imports(PACKAGE / "golden" / "decode.py")) <= {"numerics", "spec"}


@pytest.mark.parametrize(
    "path",
    [p for folder in ("src", "tests", "examples") for p in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_files_are_small_and_say_what_they_are(path):
    text = path.read_text()
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert len(first) >= 20, "the first line says what lives here"
    assert len(text.splitlines()) <= 420


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_take_at_most_ten_parameters(path):
    if layer(path) == "cli":  # a command has as many as it has options
        return
    for node in ast.walk(ast.parse(path.read_text())):
        # What is compiled for a GPU or an NPU takes its operands one by one.
        compiled = ("triton.jit", "pl.function")
        if isinstance(node, ast.FunctionDef) and not any(
            name in ast.unparse(d) for d in node.decorator_list for name in compiled
        ):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([a for a in arguments if a.arg not in ("self", "cls")]) <= 10, f"{path}: {node.name}"
