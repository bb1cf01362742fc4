"""The command line: ``python -m functional_hess report [package.module:problem]``.

Turns what a user can have got wrong into one sentence on stderr and exit status 2. An exception of the user's own code keeps
its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from functional_hess.chunking import MemoryLimitError, parse_bytes
from functional_hess.guards import MissingDerivativeError, RandomnessError
from functional_hess.products import MODES
from functional_hess.report import ReportError, as_table, digits_problem, load_problem, model_report, require_extras
from functional_hess.transforms import DependenceError

__all__ = ["main"]

DESCRIPTION = """\
Computes the exact Hessian of a loss, checks it, and writes report.json, blocks.png (a heat map by parameter block) and
spectrum.png (the eigenvalues) into a folder; prints the figures as a table.

Without PROBLEM: trains a small classifier with a LayerNorm on scikit-learn's bundled digits, which takes seconds.
With PROBLEM: a function problem() of yours that returns (f, params) or (f, params, args), where f(params, *args) is a scalar
tensor and params any tree of tensors. Modules in the current directory are found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with _current_directory_importable():
            return _report(arguments)
    except MemoryLimitError as error:
        return _refuse(f"{_first_sentence(error)}; report on fewer leaves (functional_hess.partition) or free memory.")
    except (ReportError, MissingDerivativeError, RandomnessError, DependenceError) as error:
        return _refuse(str(error))


def _report(arguments: argparse.Namespace) -> int:
    spec, progress = arguments.problem, not arguments.quiet
    require_extras("matplotlib", *(["tqdm"] if progress else []), *(["sklearn"] if spec is None else []))
    problem = digits_problem(seed=arguments.seed, progress=progress) if spec is None else load_problem(spec)
    facts = model_report(
        problem,
        arguments.out,
        mode=arguments.mode,
        chunk_size=arguments.chunk_size,
        memory_limit=arguments.memory_limit,
        seed=arguments.seed,
        progress=progress,
    )
    print(as_table(facts))
    print(f"\nwritten: report.json, blocks.png, spectrum.png in {arguments.out}")
    return 0


def _refuse(message: str) -> int:
    print(f"functional_hess: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _first_sentence(error: BaseException) -> str:
    return str(error).split(". ")[0].rstrip(".")


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(here)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m functional_hess", description="Second-order calculus for PyTorch functions.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="the exact Hessian of a model's loss, with checks, spectrum and pictures",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("problem", nargs="?", metavar="PROBLEM", help="package.module:problem; by default the digits")
    report.add_argument(
        "--out", metavar="DIR", default="functional_hess_report", help="the folder to write (default: %(default)s)"
    )
    report.add_argument("--mode", choices=("auto", "fastest", *MODES), default="auto", help="mode of differentiation")
    report.add_argument("--chunk-size", type=_rows, default="auto", metavar="ROWS", help="rows at a time, or auto (default)")
    report.add_argument("--memory-limit", type=_bytes, metavar="BYTES", help="refuse what needs more, such as 4GiB")
    report.add_argument("--seed", type=int, default=0, help="of the random directions, and of the digits' training (default: 0)")
    report.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _rows(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be 'auto' or a positive number of rows, got {text!r}")
    return text if text == "auto" else int(text)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of bytes or a text such as 4GiB, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
