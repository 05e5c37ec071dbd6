"""``LLM.generate`` of the small model in one process: tokens, logprobs, seconds of steps and of the compressor."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from in_vllm import ground, tiny, workers

Say = Callable[[str], None]
_HOW: dict[str, dict[str, Any]] = {
    "": {},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
                                      "prompt_lookup_min": 1}},
    "ranks": {"tensor_parallel_size": workers.RANKS},
}  # fmt: skip
RATIOS, LENGTHS, NEW = [0, 4, 128], (140, 203, 250), 10
"""The prompt of 250 tokens finishes a window of 128 while it decodes."""


def run(mode: str, folder: Path, say: Say) -> dict[str, Any]:
    """One engine's result. mode: vLLM's own compressor, the plugin's, or the plugin's doing nothing, on purpose."""
    who, _, how = mode.partition(", ")
    ground.before_vllm()
    if how == "ranks":
        workers.prepare(folder, who)
    say("import vllm")
    import_module("vllm")
    found = ground.set_up(who)
    cpu, _ = ground.compressors()
    say("start the engine")
    llm = import_module("vllm").LLM(**tiny.arguments(folder, RATIOS), **_HOW[how])
    replaced = hasattr(vars(cpu)["forward"], "__wrapped__")
    if replaced != (who != "own"):
        raise RuntimeError(f"the entry point has {'' if replaced else 'not '}replaced the compressor's forward")
    clock = _Clock(llm, cpu, who)
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, tiny.VOCABULARY, (length,), generator=gen).tolist() for length in LENGTHS]
    asked = import_module("vllm").SamplingParams(
        max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False, logprobs=1
    )
    say("generate")
    made = [out.outputs[0] for out in llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)]
    tokens = [list(one.token_ids) for one in made]
    logprobs = [[step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in made]
    scheduler, cache = llm.llm_engine.vllm_config.scheduler_config, llm.llm_engine.vllm_config.cache_config
    switches = {"chunked_prefill": scheduler.enable_chunked_prefill, "prefix_caching": cache.enable_prefix_caching}
    told = {"worker_steps": workers.steps(folder)} if how == "ranks" else clock.result()
    return {**found, "tokens": tokens, "logprobs": logprobs, "switches": switches, **told}


class _Clock:
    """Seconds of each engine step, and in it of compressors' forwards; who ran, and how many plans were made."""

    def __init__(self, llm: Any, cpu: type, who: str) -> None:
        from kvcondense.bound import Bound
        from kvcondense.integrations.vllm_plugin import steps

        self.counts: Counter[str] = Counter()
        self.inside, self.steps = 0.0, []
        self._watch(cpu, "forward", "forwards", timed=True)
        self._watch(Bound, "condense", "plugin_steps", idle=who == "idle")
        self._watch(steps, "_plan", "plans")
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def scheduled(*given: Any, **named: Any) -> Any:
            found = schedule(*given, **named)
            self.counts["drafts"] += sum(map(len, found.scheduled_spec_decode_tokens.values()))
            return found

        scheduler.schedule = scheduled
        step = llm.llm_engine.step

        def timed() -> Any:
            begun, self.inside = time.perf_counter(), 0.0
            done = step()
            self.steps.append((time.perf_counter() - begun, self.inside))
            return done

        llm.llm_engine.step = timed

    def _watch(self, owner: Any, name: str, key: str, timed: bool = False, idle: bool = False) -> None:
        function = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self.counts[key] += 1
            begun = time.perf_counter()
            done = None if idle else function(*given, **named)
            self.inside += timed * (time.perf_counter() - begun)
            return done

        setattr(owner, name, watched)

    def result(self) -> dict[str, Any]:
        """The first step is the prompts'; medians are of the others."""
        (prefill, prefill_inside), *rest = [one for one in self.steps if one[1]]
        decode, inside = ([one[i] for one in rest] for i in (0, 1))
        counted = {name: self.counts[name] for name in ("forwards", "plugin_steps", "plans", "drafts")}
        return {
            **counted,
            "passes": 1 + len(rest),
            "prefill_s": round(prefill, 3),
            "prefill_compressor_s": round(prefill_inside, 3),
            "step_s": round(statistics.median(decode), 4),
            "compressor_s": round(statistics.median(inside), 5),
        }
