"""grn-scale bench: how fast this machine tokenizes, reads shards and trains, and how well packs are made, as JSON.

    grn-scale bench                                                   all of these, each in a process of its own
    grn-scale bench tokenize --config configs/runs/demo.yaml data.manifest=clips.jsonl
    grn-scale bench tokenizer --widths 32,48 tokenize.latent_side=40 tokenize.max_frames=17 data.manifest=clips.jsonl
    grn-scale bench fleet --clips 24 data.manifest=clips.jsonl text.encoder=encoder/ tokenize.workers=2
    grn-scale bench data --config configs/runs/demo.yaml data.dataset=tokens/
    grn-scale bench packing --lengths clip_lengths.csv                rules for packs and ranks beside each other
    grn-scale bench plan --samples 100000000                          planning of a dataset of any size
    grn-scale bench train --config configs/runs/demo.yaml             also under torchrun or srun
    grn-scale bench checkpoint --megabytes 400 --ranks 2              how long training waits for a save
    grn-scale bench gpu --tokens 16384,40960                          kernels, and how much of a GPU training uses
    grn-scale bench gpu --hardware machine.yaml                       rates for `grn-scale plan --gpu machine.yaml`

Where the configuration names no manifest or dataset, inputs of the configured size are made in a temporary folder.
"packing" and "plan" do not depend on the configuration.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grn_scale.command_line import CommandParser, nearest, run, start_logging
from grn_scale.config.schema import Config
from grn_scale.errors import EXIT_FAILED, ConfigError
from grn_scale.perf.bench_checkpoint import bench_checkpoint
from grn_scale.perf.bench_data import bench_data
from grn_scale.perf.bench_fleet import bench_fleet
from grn_scale.perf.bench_gpu import DEFAULT_CONFIG as GPU_CONFIG
from grn_scale.perf.bench_gpu import bench_gpu
from grn_scale.perf.bench_hardware import bench_hardware, write_hardware
from grn_scale.perf.bench_packing import bench_packing
from grn_scale.perf.bench_plan import bench_plan
from grn_scale.perf.bench_tokenize import bench_tokenize
from grn_scale.perf.bench_tokenizer import bench_tokenizer
from grn_scale.perf.bench_train import bench_train
from grn_scale.perf.measure import peak_memory, surroundings

log = logging.getLogger("grn_scale.bench")
BENCHMARKS = ("tokenize", "tokenizer", "data", "packing", "plan", "train", "checkpoint", "fleet", "gpu")
ON_REQUEST = ("fleet", "gpu")
"""Not among those that run without a name: one needs a manifest and a text encoder, the other a GPU for its sizes."""
DEFAULT_SAMPLES = {"data": 4096, "plan": 1_000_000}
DEFAULT_CONFIG = "configs/runs/demo.yaml"


def measure(name: str, config: Config, *, clips: int, samples: int, repeats: int,
            widths: str | None = None, lengths: str | None = None, megabytes: int = 400,
            ranks: int = 1, tokens: Sequence[int] = (), rates: bool = False) -> dict[str, Any]:
    """One benchmark with all it depends on: results, peak memory, configuration, hardware, versions, date.

    clips: in each repeat of "tokenize" and "fleet"; samples: read in each repeat of "data", or of the index of "plan";
    widths: of random weights in "tokenizer"; lengths: CSV file of clip lengths for "packing"; megabytes: of state that
    each of the `ranks` processes of "checkpoint" saves; tokens: lengths of the packs of "gpu"; rates: of products,
    memory and links in place of training steps, for "gpu".
    """
    from grn_scale.config.load import to_dict

    if name == "tokenize":
        results = bench_tokenize(config, clips, repeats)
    elif name == "tokenizer":
        results = bench_tokenizer(config, widths, repeats)
    elif name == "data":
        results = bench_data(config, samples, repeats)
    elif name == "packing":
        results = bench_packing(lengths)
    elif name == "plan":
        results = bench_plan(samples)
    elif name == "fleet":
        results = bench_fleet(config, clips, repeats)
    elif name == "checkpoint":
        results = bench_checkpoint(megabytes, ranks, repeats, config.train.threads)
    elif name == "gpu" and rates:
        results = bench_hardware(config, repeats)
    elif name == "gpu":
        results = bench_gpu(config, tokens, repeats)
    else:
        results = bench_train(config, repeats)
    return {"benchmark": name, "results": results, "peak_memory": peak_memory(), **surroundings(),
            "config": to_dict(config)}


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale bench argv...`; the JSON goes to stdout."""
    named = bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]
    if named and argv[0] not in BENCHMARKS:
        raise ConfigError(f"grn-scale bench {argv[0]}: {nearest(argv[0], BENCHMARKS)}; without a name all of them run")
    parser = CommandParser("bench", f"Measure {', '.join(BENCHMARKS)} (the first argument; all of them without one). "
                           f"The result is JSON. Without --config the sizes are those of {DEFAULT_CONFIG}, for gpu of "
                           f"{GPU_CONFIG}.",
                           "grn-scale bench train --config configs/runs/demo.yaml --repeats 10")
    parser.set_defaults(config=GPU_CONFIG if argv[:1] == ["gpu"] else DEFAULT_CONFIG)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each number (default: 5)")
    parser.add_argument("--clips", type=int, default=256, metavar="N",
                        help="in each repeat of tokenize and fleet (default: 256)")
    parser.add_argument("--samples", type=int, metavar="N", help="bench data: read in each repeat (default: 4096); "
                        "bench plan: of the index (default: 1000000)")
    parser.add_argument("--widths", metavar="DIM,DEC_DIM", help="bench tokenizer with random weights of the official "
                        "architecture in these widths, where tokenizer.path has none")
    parser.add_argument("--lengths", metavar="FILE", help="bench packing with the clips of a CSV file with the columns "
                        "t, h, w (latent cells) and text_tokens, instead of a made mix")
    parser.add_argument("--megabytes", type=int, default=400, metavar="N",
                        help="bench checkpoint: state of each process (default: 400)")
    parser.add_argument("--ranks", type=int, default=1, metavar="1|2", help="bench checkpoint: processes (default: 1)")
    parser.add_argument("--tokens", default="16384,40960", metavar="N,N,..",
                        help="bench gpu: lengths of the packs (default: 16384,40960)")
    parser.add_argument("--hardware", type=Path, metavar="FILE.yaml", help="bench gpu: measure rates in place of "
                        "training steps, and write them for grn-scale plan --gpu FILE.yaml; also under torchrun or "
                        "srun, and of a CPU where there is no GPU")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON: no progress on stderr")
    rest = argv[1:] if named else argv
    config, options = parser.parse_command(rest)
    if min(options.repeats, options.clips, 1 if options.samples is None else options.samples) < 1:
        raise ConfigError("--repeats, --clips and --samples must be at least 1")
    if options.hardware and (argv[:1] != ["gpu"] or options.hardware.suffix != ".yaml"):
        raise ConfigError(f"--hardware {options.hardware}: `grn-scale bench gpu` alone takes it, with a name that ends "
                          "in .yaml")
    tokens = _numbers(options.tokens)
    start_logging(logging.WARNING if options.json else logging.INFO)
    if not named:
        return _each_alone(rest)
    log.info("measuring %s", argv[0])
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, but stdout is the result
        report = measure(argv[0], config, clips=options.clips, repeats=options.repeats, widths=options.widths,
                         samples=options.samples or DEFAULT_SAMPLES.get(argv[0], 1), lengths=options.lengths,
                         megabytes=options.megabytes, ranks=options.ranks, tokens=tokens,
                         rates=options.hardware is not None)
    if int(os.environ.get("RANK", "0")) == 0:
        if options.hardware:
            write_hardware(options.hardware, report["results"], f"{report['date'][:10]}, torch "
                           f"{report['versions']['torch']}, {options.repeats} repeats")
        print(json.dumps(report, indent=1))
    return 0


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(numbers) != text.count(",") + 1 or min(numbers) < 1:
        raise ConfigError(f"--tokens is {text}, but must be positive numbers with commas between, e.g. 16384,40960")
    return numbers


def _each_alone(arguments: Sequence[str]) -> int:
    """Run all benchmarks, one after the other in processes of their own, so that each peak of memory is its own."""
    reports = {}
    for name in BENCHMARKS:
        if name in ON_REQUEST:
            continue
        done = subprocess.run([sys.executable, "-m", "grn_scale", "bench", name, *arguments], stdout=subprocess.PIPE,
                              text=True, check=False)
        if done.returncode:
            log.error("`grn-scale bench %s` ended with exit code %d", name, done.returncode)
            return done.returncode if done.returncode > 0 else EXIT_FAILED
        reports[name] = json.loads(done.stdout)
    print(json.dumps(reports, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
