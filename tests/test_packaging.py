"""What is shipped: an sdist in which the tests can run, a wheel that has what the code reads, metadata that is true."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files that are kept."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("tree")
    for name in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


def built(tree, kind, out):
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(out)]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out / result.stdout.splitlines()[-1]


def test_the_tests_of_an_sdist_run(tree, tmp_path):
    """Every test is found in the unpacked archive, with nothing but the archive to import, and some are run."""
    with tarfile.open(built(tree, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data") if sys.version_info >= (3, 12) else archive.extractall(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}

    some = ("test_config.py", "test_readme.py", "test_bench_records.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", " or ".join(some)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout[-2000:]
    found = re.search(r"(\d+) passed.* (\d+) deselected", ran.stdout)
    assert found is not None
    assert int(found[1]) > 50
    assert int(found[1]) + int(found[2]) > 3000


def test_a_wheel_has_what_the_code_reads(tree, tmp_path):
    with zipfile.ZipFile(built(tree, "wheel", tmp_path)) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("METADATA"))
    kept = {str(p.relative_to(tree / "src")) for p in (tree / "src" / "kvcondense").rglob("*") if p.suffix != ".pyc"}
    files = {n for n in kept if (tree / "src" / n).is_file()}
    assert files <= names, sorted(files - names)
    assert not {n.split("/")[0] for n in names} & {"tests", "tools", "docs", "examples"}
    head, _, readme = metadata.partition("\n\n")
    assert "Classifier: Programming Language :: Python :: 3.13" in head
    assert "Project-URL: " in head
    assert readme.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_the_readme_needs_no_formulas_to_be_rendered():
    """Package indexes render Markdown, but no formulas."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", readme, flags=re.DOTALL)
    assert "$" not in outside
