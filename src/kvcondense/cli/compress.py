"""``kvcondense compress``, as it is typed: hidden states of a layer through the compressors of a real checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import FilePageTokens, IndexerFormat, Strict, TensorScale, Verify, one_of, positive, whole

EXAMPLE = "Example: kvcondense compress --checkpoint DIR --layer 2 --hidden h.safetensors --out cache.safetensors"


def compress(
    checkpoint: Annotated[Path, typer.Option(help="Model directory: config.json and safetensors or GGUF files.")],
    layer: Annotated[
        int, typer.Option(help="Layer whose compressors to run (main and, in CSA layers, indexer).", **whole(0))
    ],
    hidden: Annotated[Path, typer.Option(help="Safetensors file with the layer's hidden states [T, D].")],
    out: Annotated[Path, typer.Option(help="Result: rows, live state and header, as safetensors.")],
    chunk: Annotated[int, typer.Option(help="Tokens per step.", **whole(1))] = 1024,
    limit: Annotated[int | None, typer.Option(help="Stop after this many tokens.", **whole(1))] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sequence that --out holds.")] = False,
    verify: Verify = True,
    save_every: Annotated[
        float, typer.Option(help="Seconds after which what is done is saved, again and again.", **positive("SECONDS"))
    ] = 300.0,
    first_position: Annotated[
        int | None,
        typer.Option(help="Position of the file's first token (default: its metadata, else see --resume).", **whole(0)),
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the hidden states in the file.")] = None,
    format: Annotated[
        str, typer.Option(help="Cache format of the rows; see kvcondense info --formats.", **one_of(names.FORMATS))
    ] = "bf16",
    indexer_format: IndexerFormat = None,
    page_tokens: FilePageTokens = names.PAGE_TOKENS,
    tensor_scale: TensorScale = None,
    strict: Strict = True,
    rounding: Annotated[
        str,
        typer.Option(
            help="Rounding profile: reference, fused (fp32 throughout) or latent (V4.1 in vLLM).",
            **one_of(names.ROUNDINGS),
        ),
    ] = "reference",
    rotate: Annotated[
        bool, typer.Option("--rotate/--no-rotate", help="Hadamard rotation of the indexer's rows.")
    ] = True,
    backend: Annotated[str, typer.Option(help="Backend, or auto.", **one_of(names.BACKENDS, "auto"))] = "auto",
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Stream hidden states through a layer's compressors and write cache rows, live state and header.

    The result does not depend on --chunk, nor on whether it was made in one go or with --resume: the files are equal
    byte for byte. --out is replaced whole, every --save-every seconds and at the end. Ctrl-C saves the chunks that are
    done.

    With --resume, a hidden file that says where it starts (--first-position, or its metadata) must continue the
    sequence. One that does not say so holds the whole sequence if the last compressed token stands in it at its place;
    otherwise it holds further tokens.
    """
