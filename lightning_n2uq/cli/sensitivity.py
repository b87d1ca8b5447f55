"""`n2uq sensitivity`: scores every layer and writes a policy of mixed bits that meets a budget."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_n2uq.cli.arguments import with_saved_config, without_checkpoint
from lightning_n2uq.cli.command_parser import command_parser
from lightning_n2uq.cli.quiet import quiet_lightning
from lightning_n2uq.cli.shorthands import long_names
from lightning_n2uq.convert import Sensitivity, allocate_bits, sensitivity
from lightning_n2uq.convert.allocation import COSTS, read_budget
from lightning_n2uq.convert.scores import MEASURES
from lightning_n2uq.convert.scoring import BATCHES, BITS
from lightning_n2uq.convert.widths import widths
from lightning_n2uq.utils.validation import check_integer

EXAMPLES = """
  n2uq sensitivity --config digits/float.yaml --ckpt_path runs/.../best.ckpt --budget bitops=uniform:3
  n2uq sensitivity --config FILE --scores sensitivity/scores.json --budget mean_bits=2.5

Other options are those of n2uq fit.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command's own options."""
    p = command_parser("sensitivity", __doc__, EXAMPLES)
    p.add_argument(
        "--budget",
        help=f"NAME=VALUE, NAME one of {', '.join(COSTS)}, VALUE a number, uniform:4 (what 4 bits in all "
        "layers cost) or 0.9*uniform:4; without it layers are only scored",
    )
    p.add_argument("--bits", nargs="+", default=list(BITS), help="widths to try: 4, or weights/inputs, 2/4")
    p.add_argument("--by", choices=MEASURES, help="what to add up (default: kl where there is one)")
    p.add_argument("--batches", type=int, default=BATCHES, help="batches of the training data to use")
    p.add_argument("--scores", metavar="FILE", help="take the scores of an earlier call, its scores.json")
    p.add_argument("--weight_quantizer", help="the policy's method (default: the config's; n2uq for float)")
    p.add_argument("--activation_quantizer", help="likewise")
    p.add_argument("--device", default="cpu", help="where to score, such as cuda")
    p.add_argument("-o", "--output", default="sensitivity", metavar="FOLDER", help="where files are written")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options, rest = parser().parse_known_args(long_names(list(argv)))
    if not any(part.startswith(("--config", "-c", "--ckpt_path", "--model")) for part in rest):
        raise ValueError("config: got none, n2uq sensitivity --config FILE --ckpt_path FILE --budget ...")
    widths(options.bits)
    check_integer("batches", options.batches, 1)
    if options.budget is not None:
        read_budget(options.budget)
    known = read_scores(options.scores) if options.scores is not None else None
    quiet_lightning()
    from lightning_n2uq.cli.building import build
    from lightning_n2uq.cli.sensitivity_files import write_picture, write_policy
    from lightning_n2uq.cli.sensitivity_subject import Subject

    subject = Subject(build(rest), options)
    folder = Path(options.output)
    found = known
    if found is None:
        found = sensitivity(
            subject.network,
            subject.batches(options.batches, options.device),
            options.bits,
            subject.policy,
            subject.loss,
            options.batches,
            subject.example,
            subject.forward,
            progress=True,
        )
    folder.mkdir(parents=True, exist_ok=True)
    if known is None:
        (folder / "scores.json").write_text(found.to_json() + "\n", encoding="utf-8")
    print(found)
    chosen = None
    if options.budget is not None:
        chosen = allocate_bits(found, options.budget, options.by)
        print(f"\n{chosen}\n")
        for line in write_policy(
            folder, chosen, subject, shlex.join(["n2uq", "fit", *without_checkpoint(with_saved_config(rest))])
        ):
            print(line)
    print(write_picture(folder / "scores.png", found, options.by, chosen))
    return 0


def read_scores(path: str) -> Sensitivity:
    """Returns the scores in a file; `ValueError` where it holds none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"scores: cannot read {path!r} ({reason})") from error
    return Sensitivity.from_mapping(values)
