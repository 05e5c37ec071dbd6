"""What a commit says, and the chain of them: which compressors a bundle has, where their rows and states are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvcondense.bundle.container import Container, Extent
from kvcondense.bundle.held import row_bytes
from kvcondense.errors import CheckpointError, require_int, require_known
from kvcondense.files.schema import decoded, typed
from kvcondense.formats import FORMATS, CacheFormat
from kvcondense.formats.descriptor import check_tensor_scale
from kvcondense.layout.batch import MOST_POSITIONS
from kvcondense.spec import CompressorSpec

_MOST_BYTES = 4 << 20
_MOST_COMMITS = 1 << 16


@dataclass(frozen=True)
class Member:
    """A compressor in a bundle. ``converted_from``: formats in which its rows have lost bits before this one."""

    layer: int
    part: str
    spec: CompressorSpec
    format: CacheFormat
    tensor_scale: float | None = None
    converted_from: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"layer {self.layer} {self.part}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "layer": self.layer,
            "part": self.part,
            "spec": self.spec.as_dict(),
            "format": self.format.name,
            "tensor_scale": self.tensor_scale,
            "converted_from": list(self.converted_from),
        }


@dataclass(frozen=True)
class Entry:
    """Of one compressor in one commit: the fields of its new rows, and its live state at the commit's position."""

    rows: Extent
    state: Extent


@dataclass(frozen=True)
class Commit:
    """The request at ``position``. members: in the first commit alone; entries: in their order; about: its writer's."""

    position: int
    about: dict[str, str]
    previous: Extent | None
    members: list[dict[str, Any]]
    entries: list[Entry]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass
class _About:
    layer: int
    part: str
    spec: dict[str, Any]
    format: str
    tensor_scale: float | None
    converted_from: list[str]


def chain(file: Container) -> tuple[list[Commit], list[Member]]:
    """Commits, the oldest first, and the members of all; raises CheckpointError unless they fit together."""
    commits: list[Commit] = []
    at: Extent | None = file.mark.commit
    while at is not None:
        label = f"commit {file.mark.number - len(commits)}"
        if at.bytes > _MOST_BYTES or len(commits) > min(file.mark.number, _MOST_COMMITS):
            raise CheckpointError(f"{file.path} {label}", "a chain of commits as long as its mark says", "a longer one")
        commit = decoded(file.read(at, label).numpy().tobytes(), Commit, f"{file.path} {label}")
        if commit.previous is not None and commit.previous.at + commit.previous.bytes > at.at:
            raise CheckpointError(f"{file.path} {label}", "the commit before it to end before it", commit.previous.at)
        commits.append(commit)
        at = commit.previous
    commits.reverse()
    members = [_member(f"{file.path} members[{i}]", one) for i, one in enumerate(commits[0].members)]
    if len(commits) != file.mark.number + 1 or len({(m.layer, m.part) for m in members}) != len(members):
        raise CheckpointError(str(file.path), "every commit, and a compressor once", "fewer commits, or one twice")
    before = 0
    for number, commit in enumerate(commits):
        _check(f"{file.path} commit {number}", commit, members, before)
        before = commit.position
    return commits, members


def _check(label: str, commit: Commit, members: list[Member], before: int) -> None:
    require_int(f"{label} position", commit.position, before)
    if commit.position > MOST_POSITIONS or len(commit.entries) != len(members):
        got = f"position {commit.position}, {len(commit.entries)} entries"
        raise CheckpointError(label, f"positions to {MOST_POSITIONS}, {len(members)} entries", got)
    for member, entry in zip(members, commit.entries, strict=True):
        rows = member.spec.visible_rows(commit.position) - member.spec.visible_rows(before)
        wanted = rows * row_bytes(member.format, member.spec.head_dim)
        if entry.rows.bytes != wanted:
            raise CheckpointError(f"{label} {member.name}", f"{wanted} bytes for {rows} rows", entry.rows.bytes)


def _member(label: str, entries: dict[str, Any]) -> Member:
    about = typed(entries, _About, label)
    for one in (about.format, *about.converted_from):
        require_known(f"{label} format", one, FORMATS, error=CheckpointError)
    spec, fmt = CompressorSpec.from_dict(about.spec, f"{label} spec"), FORMATS[about.format]
    fmt.check(spec.head_dim, spec.rope_dim)
    if fmt.tensor_scale != (about.tensor_scale is not None):
        raise CheckpointError(f"{label} tensor_scale", "one, if the format has one", about.tensor_scale)
    scale = None if about.tensor_scale is None else check_tensor_scale(about.tensor_scale)
    layer = require_int(f"{label} layer", about.layer, 0)
    return Member(layer, about.part, spec, fmt, scale, tuple(about.converted_from))
