"""The ``kvcondense`` command: verify, conformance, compress, convert, plan, explain, bench, tune, aot, warm, info."""

from __future__ import annotations

import sys

import typer

from kvcondense.cli import aot, bench, compress, conformance, convert, explain, info, plan, tune, verify, warm
from kvcondense.cli.output import fit, width
from kvcondense.errors import KvCondenseError

app = typer.Typer(
    name="kvcondense",
    help="The DeepSeek-V4 KV compressor: check it, run it on a checkpoint, see what this machine can do.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.command("conformance", epilog=conformance.EXAMPLE)(conformance.conformance)
app.command("compress", epilog=compress.EXAMPLE)(compress.compress)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("explain", epilog=explain.EXAMPLE)(explain.explain)
app.command("bench", epilog=bench.EXAMPLE)(bench.bench)
app.command("tune", epilog=tune.EXAMPLE)(tune.tune)
app.command("aot", epilog=aot.EXAMPLE)(aot.aot)
app.command("warm", epilog=warm.EXAMPLE)(warm.warm)
app.command("info", epilog=info.EXAMPLE)(info.info)


def main() -> None:
    """Entry point: errors raised on purpose, and files that cannot be used, end with exit status 2 and one line."""
    try:
        app()
    except (KvCondenseError, OSError) as error:
        sys.stderr.write(fit(f"error: {error}", width()) + "\n")
        sys.exit(2)
