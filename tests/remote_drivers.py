"""A driver that does one thing wrong: ``remote_drivers.py FAULT REQUEST``. It needs no package, and starts at once."""

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


def message(header, data=b""):
    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + data
    return struct.pack("<Q", len(body)) + body


def done(**more):
    return {"__metadata__": {"kvcondense": "1", "kind": "done", **more}}


def entry(dtype, shape, size):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def say(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@fault
def hang():
    sys.stderr.write("waiting for a lock\n")
    sys.stderr.flush()
    time.sleep(1000)


@fault
def segv():
    sys.stderr.write("about to fall\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


@fault
def leaves():
    sys.stderr.write("\n".join([*(f"line {i} " + "x" * 5000 for i in range(100)), "no more memory", ""]))
    sys.exit(3)


@fault
def closes():
    os.close(1)
    time.sleep(1000)


@fault
def prints():
    say(b"Hello, world!\n")


@fault
def empty():
    say(struct.pack("<Q", 0))


@fault
def huge():
    say(struct.pack("<Q", 1 << 40))


@fault
def endless():
    say(struct.pack("<Q", 1 << 30))
    while True:
        say(bytes(1 << 12))
        time.sleep(0.01)


@fault
def noise():
    say(struct.pack("<Q", 100) + bytes(range(100)))


@fault
def long_header():
    say(struct.pack("<Q", 64) + struct.pack("<Q", 1 << 30) + bytes(56))


@fault
def no_json():
    say(struct.pack("<Q", 24) + struct.pack("<Q", 16) + b"{" * 16)


@fault
def outside():
    say(message({**done(), "rows": entry("BF16", [2, 64], 256)}, bytes(16)))


@fault
def version():
    say(message({"__metadata__": {"kvcondense": "2", "kind": "done"}}))


@fault
def kind():
    say(message({"__metadata__": {"kvcondense": "1", "kind": "step"}}))


@fault
def missing():
    say(message(done()))


@fault
def surplus():
    say(message({**done(), "extra": entry("F32", [1], 4)}, bytes(4)))


@fault
def dtype():
    say(message({**done(), "rows": entry("I64", [1, 64], 512)}, bytes(512)))


@fault
def shape():
    say(message({**done(), "rows": entry("BF16", [1, 65], 130)}, bytes(130)))


@fault
def twice():
    say(message(done()) * 2)


@fault
def refuses():
    say(message({"__metadata__": {"kvcondense": "1", "kind": "error", "error": "not on a Friday"}}))


@fault
def chatters():
    """Nothing wrong."""
    sys.stderr.write("noise " * 100_000)
    say(message(done()))


def running(marker):
    """Processes whose command line has ``marker``; and children of ours that have ended and were not waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if marker.encode() in words or (stat[0] == "Z" and int(stat[1]) == os.getpid()):
            found.append((folder.name, words, stat[0]))
    return found


def faulty(fault, request="step", marker="remote_drivers"):
    """The command."""
    return f"{sys.executable} -S -E {__file__} {fault} {request} {marker}"


def main():
    name, at, capabilities = sys.argv[1], sys.argv[2], os.environ.get("CAPABILITIES", '{"specs": ["csa"]}')
    while head := sys.stdin.buffer.read(8):
        size = struct.unpack("<Q", head)[0]
        if name == "deaf" and size > 1 << 18:
            time.sleep(1000)
        body = sys.stdin.buffer.read(size)
        header = json.loads(body[8 : 8 + struct.unpack("<Q", body[:8])[0]])
        asked = header["__metadata__"]["kind"]
        if asked == at and name in FAULTS:
            FAULTS[name]()
        elif asked == "hello":
            say(message(done(name=name, capabilities=capabilities)))
        elif asked == "rows":
            count = header["slots"]["shape"][0]
            say(message({**done(), "rows": entry("BF16", [count, 64], count * 128)}, bytes(count * 128)))
        else:
            say(message(done()))


if __name__ == "__main__":
    main()
