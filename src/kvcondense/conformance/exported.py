"""What an exported state holds, against the request's own tokens: rows in kvcondense's order, or running values.

An adapter whose ``export`` and ``load`` agree on an order of their own moves its requests and breaks no row. Whoever
else takes over such a state does.
"""

from __future__ import annotations

import torch

from kvcondense.conformance.play import Player, at
from kvcondense.conformance.script import Request
from kvcondense.files import sealed
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.online import OnlineState
from kvcondense.layout.snapshot import export_live
from kvcondense.layout.state import StatePool
from kvcondense.snapshot import load_live, settle

_CLOSE = 1 / 64
"""Of the scale of tokens: more than bf16 rounds, less than any two tokens are apart in all of their channels."""


def against_tokens(player: Player, request: Request) -> str | None:
    """Export a request and compare what kvcondense reads from the payload with what its tokens say."""
    first, spec = player.case.first, player.spec
    if request.done == first:
        return None
    payload = player.adapter.export(at(request))
    alone, name = RaggedBatch.at(request.done, state_slot=0), f"exported state of request {player.all.index(request)}"
    low = spec.live_start(request.done)
    start = max(first, low)  # what lies before the first token is the kit's own
    wanted = _rows(player, request, start)
    if spec.overlap or "rows" in sealed.unpacked(payload, "payload", unsealed=(1,)).names:
        pool = StatePool.ring(spec, 1)
        load_live(spec, pool, alone, payload, convert=True)
        return _of_rows(player, name, export_live(spec, pool, alone)[start - low :], wanted, start)
    online = OnlineState.allocate(spec, 1)
    load_live(spec, online, alone, payload)
    if not wanted.shape[0]:
        return None
    m, total, o = settle(spec, online, alone)
    kv, score = wanted.split(spec.width, dim=1)
    pairs = ((m + total.log(), score.logsumexp(0)), (o / total, (score.softmax(0) * kv).sum(0)))
    if all(bool(_close(player, got, of).all()) for got, of in pairs):
        return None
    return f"{name}: running values (m, l, o) of other tokens than those from position {start} on"


def _rows(player: Player, request: Request, start: int) -> torch.Tensor:
    """Of positions ``start`` .. done - 1: [n, 2N], kv, then score + ape."""
    spec, ape = player.spec, player.setup.weights.ape
    pieces = request.pieces(start, request.done - start, player.case.first)
    rows = player.script.inputs.tokens(pieces).clone()
    if ape is not None:
        rows[:, spec.width :] += ape[torch.arange(start, request.done) % spec.ratio]
    return rows


def _of_rows(player: Player, name: str, got: torch.Tensor, wanted: torch.Tensor, start: int) -> str | None:
    """The first row that is not its position's; nobody reads the other half of the window before."""
    spec, done = player.spec, start + wanted.shape[0]
    read = torch.ones_like(wanted, dtype=torch.bool)
    if spec.overlap:
        before = torch.arange(start, done) < done // spec.ratio * spec.ratio
        read.unflatten(1, (2, 2, spec.head_dim))[before, :, 1] = False
    good = _close(player, got, wanted) | ~read
    wrong = (~good.all(1)).nonzero()[:, 0]
    if not wrong.shape[0]:
        return None
    row = int(wrong[0])
    told = f"{name}: row {row} is not that of position {start + row}"
    same = (_close(player, got[row], wanted) | ~(read & read[row])).all(1).nonzero()[:, 0]
    if same.shape[0]:
        return f"{told}, but of {start + int(same[0])} (oldest first, from position {start} on)"
    channel = int((~good[row]).nonzero()[0])
    pair = f"{got[row, channel]:.6g} instead of {wanted[row, channel]:.6g}"
    return f"{told}: channel {channel} of kv and score + ape is {pair}"


def _close(player: Player, got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (got - wanted).abs() <= _CLOSE * (player.case.scale + wanted.abs())
