"""Coverage-guided fuzzing of the readers: `python tests/fuzz/fuzz_readers.py --seconds 60 [TARGET ...]`.

Each target runs in a process of its own, from real files and within 10 s and 512 MiB per execution. Prints
executions and outcome; exit code 1 if an execution ended in any other way than the documented ones, its input
and traceback are then kept. Needs the extra `fuzz`.
"""

import argparse
import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Followed per target: what reads the bytes, not torch and not the network that is built before.
FOLLOWED = {
    "image": ("lightning_n2uq.datamodules._data.decode", "PIL."),
    "payload": ("lightning_n2uq.compression.",),
    "checkpoint": ("lightning_n2uq.checkpointing.", "torch._weights_only_unpickler", "zipfile"),
    "resume": ("lightning_n2uq.checkpointing.", "torch._weights_only_unpickler", "zipfile"),
    "official": ("lightning_n2uq.interop.", "torch._weights_only_unpickler"),
    "safetensors": ("lightning_n2uq.export.", "json.", "safetensors."),
    "config": ("lightning_n2uq.cli.", "yaml."),
    "report": ("lightning_n2uq.report.", "json.", "csv"),
}
NAMES = tuple(FOLLOWED)
MEMORY = 2**29


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="per target (default: 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted({*options.targets} - {*NAMES}):
        parser.error(f"targets: got {', '.join(unknown)}, allowed {', '.join(NAMES)}")
    if options.inside:
        return execute(options.targets[0], Path(options.inside), options.seconds, options.seed)
    return int(sum(start(name, options.seconds, options.seed) for name in options.targets or NAMES) > 0)


def start(name, seconds, seed):
    """Fuzz one target in a process of its own; returns whether something was found."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    begin = time.monotonic()
    with (folder / "log").open("w") as log:
        ended = subprocess.run(
            [*command, "--inside", str(folder)], stdout=log, stderr=log, env=environment,
            timeout=seconds + 300, check=False,
        )  # fmt: skip
    text = (folder / "log").read_text(errors="replace")
    found = re.findall(r"Done (\d+) (?:runs )?in|^#(\d+)\s", text, re.MULTILINE)
    runs = max((int(a or b) for a, b in found), default=0)
    covered = re.findall(r"cov: (\d+)", text)
    bad = ended.returncode != 0 or runs == 0
    outcome = f"FAILED (exit code {ended.returncode}), see {folder}" if bad else "nothing found"
    print(
        f"{name:<12} {runs:>9} executions in {time.monotonic() - begin:4.0f} s, "
        f"{covered[-1] if covered else 0:>5} branches, {outcome}",
        flush=True,
    )
    if not bad:
        shutil.rmtree(folder)
    return bad


def functions(prefixes):
    """Functions and methods of the modules that are imported by now."""
    modules = [
        m for key, m in sys.modules.items() if f"{key}.".startswith(prefixes) or key.startswith(prefixes)
    ]
    owners = [(module, module.__name__) for module in modules]
    owners += [(c, name) for m, name in owners for c in vars(m).values() if isinstance(c, type)]
    members = [(vars(owner).values(), name) for owner, name in owners]
    plain = [getattr(f, "__func__", f) for values, name in members for f in values]
    found = {id(f): f for f in plain if inspect.isfunction(f) and f.__module__.startswith(prefixes)}
    return found.values()


def execute(name, folder, seconds, seed):
    """Body of that process: never returns."""
    import atheris
    from fuzz_bounds import limited
    from fuzz_targets import TARGETS, outcome

    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).handlers = [logging.NullHandler()]
    target, corpus = TARGETS[name], folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(target.seeds()):
        outcome(target, data)  # imports and caches, before memory is limited
        (corpus / f"seed{i}").write_bytes(data)
    for function in functions(FOLLOWED[name]):
        atheris.instrument_func(function)

    def attempt(data):
        with limited(MEMORY):
            outcome(target, data)

    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=65536"]
    atheris.Setup(
        [
            name,
            str(corpus),
            *limits,
            f"-seed={seed}",
            f"-artifact_prefix={folder}/found-",
            "-print_final_stats=1",
        ],
        attempt,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
