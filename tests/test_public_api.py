"""The public surface is small and pinned, and using it needs torch alone."""

import subprocess
import sys

import kvcondense

NAMES = {
    "CompressorSpec",
    "CompressorWeights",
    "KvCondenseError",
    "ModelConfig",
    "OnlineState",
    "PagedCache",
    "Plan",
    "RaggedBatch",
    "RopeTable",
    "StatePool",
    "compress",
    "condense",
    "explain",
    "project",
    "store",
}

BLOCKED = """
import sys
blocked = ("triton", "numba", "llvmlite", "transformers", "safetensors", "typer", "rich", "matplotlib", "hypothesis")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import kvcondense, torch
spec = kvcondense.CompressorSpec(ratio=2, head_dim=16, eps=1e-6, rope_dim=0, has_ape=False)
batch = kvcondense.RaggedBatch.build([0, 4], start_positions=[0])
weights = kvcondense.CompressorWeights(norm=torch.ones(16))
rows = kvcondense.condense(spec, torch.randn(4, 32), weights, None, batch)
assert rows.values.shape == (2, 16)
try:
    kvcondense.condense(spec, torch.randn(4, 32), weights, None, batch, impl="cpu")
except kvcondense.KvCondenseError as error:
    assert "cpu: llvmlite cannot be imported" in str(error), error
else:
    raise AssertionError("an explicit backend never falls back")
loaded = sorted(m for m in blocked if m in sys.modules)
assert not loaded, loaded
"""


def test_public_names_are_pinned():
    assert set(kvcondense.__all__) == NAMES
    assert len(NAMES) <= 15
    public = {n for n in vars(kvcondense) if not n.startswith(("_", "@"))}  # pytest adds names with @
    submodules = {n for n in public if getattr(vars(kvcondense)[n], "__name__", "").startswith("kvcondense.")}
    assert public - submodules <= NAMES
    for name in NAMES:
        assert getattr(kvcondense, name).__doc__, name


def test_import_and_use_with_everything_optional_blocked():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)
