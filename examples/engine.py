"""How an engine calls kvcondense: its own tensors (here with vLLM's shapes), one call per layer and step."""

import torch

import kvcondense as kc
from kvcondense.integrations import vllm
from kvcondense.spec import Rounding

config = kc.ModelConfig.FLASH
spec = kc.CompressorSpec.csa(config, rounding=Rounding.FUSED)
weights = kc.CompressorWeights(norm=torch.ones(512), ape=torch.zeros(4, 1024))
rope = kc.RopeTable.build(config, 4096)

# What the engine owns: blocks of states and of compressed rows, each padded to its page size, and two block tables.
states = torch.zeros(9, 8208).as_strided((9, 4, 2048), (8208, 2048, 1))
pages = torch.zeros(3, 37440, dtype=torch.uint8).as_strided((3, 64, 584), (37440, 584, 1))
state_table = torch.tensor([[4, 1, 7, 3], [2, 8, 5, 6]], dtype=torch.int32)
row_table = torch.tensor([[1], [2]], dtype=torch.int32)
state, cache = vllm.state(states), vllm.cache(pages)

seq_lens = torch.zeros(2, dtype=torch.int32)
for tokens in ([9, 6], [1, 1], [1, 3]):  # a mixed prefill, a decode step, a decode and a verify step in one call
    query_start_loc = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(seq_lens.tolist(), tokens, strict=True)])
    request = torch.repeat_interleave(torch.arange(2), torch.tensor(tokens))
    slots = row_table[request, positions // 256] * 64 + positions // 4 % 64
    seq_lens = seq_lens + torch.tensor(tokens, dtype=torch.int32)
    batch = vllm.batch(query_start_loc, seq_lens, state_block_table=state_table, slot_mapping=slots)
    plan = kc.Plan.build(spec, batch, state_layout=state.layout)  # once a step, for all layers of this ratio
    kv_score = torch.randn(sum(tokens), spec.projected)  # the layer's fused_wkv_wgate
    rows = kc.condense(spec, kv_score, weights, rope, batch, plan=plan, state=state, cache=cache)
    windows, requests, slots = (t.tolist() for t in (rows.window, rows.request, rows.slot))
    print(f"{tokens} tokens: rows {windows} of requests {requests} to slots {slots}")
