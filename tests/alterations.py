"""Inputs altered as damage and ill will alter them, by a seed: bytes, JSON, safetensors, and with digests made anew."""

import copy
import json
import struct
from dataclasses import dataclass, replace

import xxhash

ALIGNED = 64  # of a bundle's pieces
_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    255,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
)


class Raw(str):
    """Text that stands in JSON as it is."""

    __slots__ = ()


class Again(str):
    """A key that may stand in an object beside its equal: it equals itself alone."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


_PLAIN = (
    *_NUMBERS, -(2**63), 10**400, 0.5, -0.0, 4.0, 1e308, 1e-310, 5e-324, True, False, None, "", "a", "\x00", "\ud800",
    "\u202e\u2028", "é", "$x$", "\\", "$\\frac{", "a|b\nc", "<script>", "../x", "1" * 5000, "nan", [], {}, [[]],
    {"": 0}, Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("-Infinity"), Raw("1" + "0" * 4000), Raw("1" + "0" * 5000),
    Raw("-"), Raw('"\\ud800"'), Raw("01"), Raw("1e-400"), Raw("[" * 70 + "]" * 70), Raw('{"a":' * 60 + "1" + "}" * 60),
)  # fmt: skip
_LONG = (
    Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 100_000 + "1" + "}" * 100_000), "x" * 200_000,
    Raw("[" * 100_000), Raw("[" + "[]," * 50_000 + "[]]"), Raw("1" * 100_000),
)  # fmt: skip


def hostile(chance):
    if chance.random() < 0.02:  # near the limit of recursion: what is read may be too deep to be written
        depth = chance.randrange(900, 1000)
        return Raw(chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    found = chance.choice(_LONG if chance.random() < 0.01 else _PLAIN)
    return copy.deepcopy(found) if isinstance(found, dict | list) else found  # it may be altered in its turn


def rendered(value):
    """JSON with what ``json.dumps`` does not write; of what is too deep to be written, its beginning."""
    try:
        return _rendered(value)
    except RecursionError:
        return "[" * 1000


def _rendered(value):
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_rendered(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_rendered, value)) + "]"
    return json.dumps(value)


def tree(chance, value, most=3):
    """JSON's values with a few of them exchanged, missing, added, twice, or next to what they were."""
    try:
        value = json.loads(json.dumps(value))
    except RecursionError:
        return hostile(chance)
    if not isinstance(value, dict | list):
        return hostile(chance)
    for _ in range(chance.randint(1, most)):
        holders = [h for h in _holders(value) if h]
        if not holders or chance.random() < 0.01:
            return hostile(chance)
        holder = chance.choice(holders)
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        old, way = holder[key], chance.random()
        if way < 0.45:
            holder[key] = hostile(chance)
        elif way < 0.65 and type(old) in (int, float) and abs(old) < 2**70:
            holder[key] = chance.choice((old + 1, old - 1, -old, 2 * old, old / 2, float(old), chance.choice(_NUMBERS)))
        elif way < 0.75:
            del holder[key]
        elif way < 0.85:
            other = chance.choice(holders)
            holder[key] = json.loads(json.dumps(other)) if _plain(other) else 0
        elif isinstance(holder, dict):
            name = chance.choice((Again(key), "", "extra", "schema", "digest", "\ud800", str(key) + "2"))
            holder[name] = hostile(chance) if chance.random() < 0.5 else old
        else:
            holder.insert(key, old if chance.random() < 0.5 else hostile(chance))
    return value


def _holders(value):
    found, level = [], [value]
    while level:
        found += level
        level = [v for h in level for v in (h.values() if isinstance(h, dict) else h) if isinstance(v, dict | list)]
        level = [v for v in level if not isinstance(v, str)]
    return [h for h in found if isinstance(h, dict | list)]


def _plain(value):
    return not any(isinstance(v, Raw) for h in _holders(value) for v in (h.values() if isinstance(h, dict) else h))


def of_bytes(chance, data, others):
    """Damage, and what somebody writes over bytes: flips, quotes, lengths, cuts, copies, pieces of ``others``."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size, way = len(data), chance.randrange(10)
        at = chance.randrange(min(size, 1 << chance.randint(3, 20))) if size else 0
        if way < 3 and size:
            data[at] ^= 1 << chance.randrange(8)
        elif way == 3 and size:
            data[at] = chance.choice(b'\x00\xff"{}[],:0\\')
        elif way == 4:
            packed = struct.pack("<Q", (chance.choice(_NUMBERS) + chance.randrange(-1, 2)) % 2**64)
            data[at : at + 8] = packed[: chance.choice((4, 8, 8))]
        elif way == 5:
            del data[chance.randrange(size + 1) :]
        elif way == 6:
            data += bytes(data) if size < 1 << 16 else b""
        elif way == 7:
            end = at + chance.choice((1, 8, 64, 512))
            data[at:end] = b"" if chance.random() < 0.5 else bytes(end - at)
        elif way == 8:
            other = chance.choice(others)
            begin = chance.choice((at, chance.randrange(len(other) + 1)))
            piece = other[begin : begin + chance.choice((1, 8, 64, 512, 4096))]
            data[at : at + (len(piece) if chance.random() < 0.8 else 0)] = piece
        else:
            length, to = chance.choice((8, 64, 512)), chance.randrange(size + 1)
            one, two = data[at : at + length], data[to : to + length]
            data[at : at + len(one)], data[to : to + len(two)] = two[: len(one)], one[: len(two)]
    return bytes(data)


@dataclass
class Stored:
    """A tensor as safetensors has it."""

    dtype: str
    shape: list
    data: bytes


WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "I64": 8, "I32": 4, "BOOL": 1}
_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "U8": "uint8", "I8": "int8",
          "F8_E4M3": "float8_e4m3fn", "I64": "int64", "I32": "int32", "BOOL": "bool"}  # fmt: skip
SPELT = {f"torch.{v}": k for k, v in _TORCH.items()}


def split(data):
    """(metadata, tensors) of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__", {})
    return metadata, {k: Stored(v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}


def joined(metadata, tensors, change=lambda header: header, claim=None):
    """The file of them; ``change`` alters its header when offsets are known, ``claim`` is the length that it says."""
    header, body = ({"__metadata__": metadata} if metadata else {}), b""
    for name, t in sorted(tensors.items(), key=lambda item: -WIDTHS.get(item[1].dtype, 1)):
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [len(body), len(body) + len(t.data)]}
        body += t.data
    text = rendered(change(header)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if claim is None else claim % 2**64) + text + body


def of_safetensors(chance, data, others):
    """Headers that claim what is not so, or bytes."""
    if chance.random() < 0.4:
        return of_bytes(chance, data, others)
    metadata, tensors = split(data)
    if chance.random() < 0.3:
        tensors = of_tensors(chance, tensors)
    if chance.random() < 0.1:
        return joined(metadata, tensors, claim=chance.choice((*_NUMBERS, len(data), len(data) - 8)))
    return joined(metadata, tensors, lambda header: tree(chance, header) if chance.random() < 0.9 else header)


def of_tensors(chance, tensors):
    """Tensors renamed, missing, of another type or shape, with other values: each as long as it says."""
    tensors = dict(tensors)
    for _ in range(chance.choice((1, 1, 2))):
        if not tensors:
            break
        name, way = chance.choice(sorted(tensors)), chance.randrange(7)
        t = tensors[name]
        if way == 0:
            del tensors[name]
        elif way == 1:
            tensors[chance.choice((name + "2", "", "acc", "rows", chance.choice(sorted(tensors))))] = t
        elif way == 2:
            dtype = chance.choice(sorted(WIDTHS))
            elements = max(1, _count(t.shape))
            tensors[name] = replace(t, dtype=dtype, data=(t.data * 8)[: WIDTHS[dtype] * elements])
        elif way == 3:
            data = bytes(chance.choice((0, 0x7F, 0xFF, 0x80, chance.randrange(256))) for _ in range(64))
            tensors[name] = replace(t, data=(data * (len(t.data) // 64 + 1))[: len(t.data)])
        elif way == 4:
            tensors[name] = replace(t, data=of_bytes(chance, t.data, [t.data])[: len(t.data)].ljust(len(t.data), b"\0"))
        else:
            shape = chance.choice((t.shape[::-1], [_count(t.shape)], [1, *t.shape], [0, *t.shape[1:]], t.shape[:1], [],
                                   [n + 1 for n in t.shape], [0, chance.choice(_NUMBERS) % 2**63]))  # fmt: skip
            tensors[name] = sized(t.dtype, shape, t.data) or t
    return tensors


def sized(dtype, shape, data=b"", most=1 << 16):
    """A tensor of this shape, with as many of the bytes as it needs; None if that is too large for a small file."""
    size = _count(shape) * WIDTHS.get(dtype, 1)
    return Stored(dtype, list(shape), data[:size].ljust(size, b"\0")) if 0 <= size <= most else None


def _count(shape):
    out = 1
    for n in shape:
        out *= n
    return out


def sealed(header, tensors):
    """The bytes of ``kvcondense.files.sealed``, whatever the header is; its digests are right, if it has any."""
    digests = {}
    for name, t in tensors.items():
        found = xxhash.xxh3_128(f"torch.{_TORCH.get(t.dtype, t.dtype)} {t.shape}\n".encode())
        found.update(t.data)
        digests[name] = found.hexdigest()
    text = rendered({**header, "tensors": digests} if isinstance(header, dict) else header)
    try:
        whole = json.loads(text)
        digest = xxhash.xxh3_128_hexdigest(json.dumps(whole, sort_keys=True).encode())
        text = text[:-1] + f', "digest": "{digest}"}}' if isinstance(whole, dict) and "digest" not in whole else text
    except (ValueError, RecursionError):
        pass
    return joined({"kvcondense": text}, tensors)


def unsealed_parts(data):
    """(header without digests, tensors) of a sealed file."""
    metadata, tensors = split(data)
    header = json.loads(metadata["kvcondense"])
    return {k: v for k, v in header.items() if k not in ("digest", "tensors")}, tensors


def of_sealed(chance, data, digests=True):
    """A sealed file that somebody else's writer may have made: header and tensors are others, digests are right."""
    try:
        header, tensors = unsealed_parts(data)
        if chance.random() < 0.7:
            header = tree(chance, header)
        if chance.random() < 0.5:
            tensors = of_tensors(chance, tensors)
        return sealed(header, tensors) if digests else joined({"kvcondense": rendered(header)}, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # altered before
        return of_bytes(chance, data, [data])


@dataclass
class Piece:
    """A bundle's commit: its JSON without places, rows and state of each entry."""

    content: dict
    blobs: list


def pieces(data):
    """Commits of a bundle, the oldest first."""
    marks = [json.loads(data[i + 33 : i + 512]) for i in (0, 512) if data[i : i + 32].strip(b"\0")]
    at, out = max(marks, key=lambda m: m["number"]), []
    while at is not None:
        content = json.loads(data[at["at"] : at["at"] + at["bytes"]])
        cut = lambda e: data[e["at"] : e["at"] + e["bytes"]]  # noqa: E731
        out.insert(0, Piece(content, [[cut(e["rows"]), cut(e["state"])] for e in content["entries"]]))
        at = content["previous"]
    return out


def bundle(commits, change=lambda value: value, ends=lambda mark: mark):
    """The bytes of ``kvcondense.bundle``; ``change`` alters a commit when its places are known, ``ends`` a mark."""
    out, previous, marks = bytearray(1024), None, [None, None]
    for number, commit in enumerate(commits):

        def put(blob):
            out.extend(bytes(-len(out) % ALIGNED))
            out.extend(blob)
            return {"at": len(out) - len(blob), "bytes": len(blob), "digest": xxhash.xxh3_128_hexdigest(blob)}

        entries = [{"rows": put(rows), "state": put(state)} for rows, state in commit.blobs]
        text = rendered(change({**commit.content, "entries": entries, "previous": previous}))
        previous = put(text.encode("utf-8", "surrogatepass"))
        marks[number % 2] = ends({"number": number, **previous, "end": len(out)})
    for i, mark in enumerate(marks):
        if mark is not None:
            text = json.dumps({"bundle": 1, **mark}, sort_keys=True).encode()
            half = f"{xxhash.xxh3_128_hexdigest(text)} ".encode() + text.ljust(512 - 33)
            # The digest of a mark is of its text before it is filled up.
            out[512 * i : 512 * i + 512] = half[:512]
    return bytes(out)


def of_bundle(chance, data):
    """A bundle that somebody else's writer may have made."""
    commits = pieces(data)
    for _ in range(chance.choice((0, 1, 1, 2))):
        one = chance.choice(commits)
        blob = chance.choice(one.blobs)
        if chance.random() < 0.5:
            blob[1] = of_sealed(chance, blob[1])
        else:
            blob[0] = of_bytes(chance, blob[0], [blob[0], blob[1]])
    which = chance.randrange(len(commits))
    if chance.random() < 0.7:
        commits[which].content = tree(chance, {k: v for k, v in commits[which].content.items() if k != "entries"}, 2)
        if not isinstance(commits[which].content, dict):
            commits[which].content = {}
    late = chance.random()
    alter = (lambda content: tree(chance, content, 2)) if late < 0.2 else (lambda content: content)
    ends = (
        (lambda mark: {**mark, chance.choice(sorted(mark)): chance.choice(_NUMBERS)}) if late > 0.95 else (lambda m: m)
    )
    return bundle(commits, alter, ends)
