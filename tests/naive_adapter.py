"""A compressor that somebody else might have: the golden decode loop, one request at a time, wrapped for the kit."""

import torch

from kvcondense.conformance.adapter import Capabilities
from kvcondense.golden.decode import DecodeCompressor, sylvester


class Naive:
    """Token by token, in the least that the kit asks for."""

    capabilities = Capabilities(
        max_draft=0,
        inert=False,
        spare=False,
        unmapped=False,
        exports=False,
        refuses=False,
        returns_state=False,
        specs=("csa", "hca", "indexer"),
        max_positions=9000,  # it walks to the last ones token by token
    )

    def init(self, setup):
        self.setup, self.requests = setup, {}
        self.cache = setup.new_cache().data.view(torch.bfloat16).view(-1, setup.spec.head_dim)

    def step(self, kv_score, batch):
        s = self.setup
        for q, slot in enumerate(batch.state_slots.tolist()):
            first, last = batch.query_start_loc[q : q + 2].tolist()
            for t in range(first, last):
                position = int(batch.start_positions[q]) + t - first
                if position == 0:
                    hadamard = sylvester(s.spec.head_dim) if s.spec.rotate else None
                    w, table = s.weights, s.rope
                    self.requests[slot] = DecodeCompressor(s.spec, w.ape, w.norm, table.cos, table.sin, hadamard)
                row = self.requests[slot].step(*kv_score[t].split(s.spec.width), position)
                if row is not None:
                    window = position // s.spec.ratio
                    page = batch.block_table[q, window // s.page_rows]
                    self.cache[page * s.page_rows + window % s.page_rows] = row.bfloat16()

    def rows(self, slots):
        return self.cache[slots]

    def state(self, _):
        return None

    def reset(self, slots):
        for slot in slots:
            self.requests.pop(slot, None)

    def export(self, batch):
        raise NotImplementedError

    def load(self, batch, payload):
        raise NotImplementedError


class Leaky(Naive):
    """The same with a bug: state slots are shared by requests that are apart by two."""

    def step(self, kv_score, batch):
        super().step(kv_score, type(batch)(**{**vars(batch), "state_slots": batch.state_slots % 2}))


make, make_leaky = Naive, Leaky


def make_nothing():
    """No adapter at all."""
    return object()
