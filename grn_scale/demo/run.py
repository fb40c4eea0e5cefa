"""grn-scale demo: the whole job on clips it makes itself, on a CPU, by the commands that a user would type.

    grn-scale demo
    grn-scale demo --output demo64 --config configs/runs/demo64.yaml --clips 10240

Every command is printed before it runs and can be copied. A second run goes on where the first one stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_layout
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config
from grn_scale.demo.stages import Stages
from grn_scale.errors import ConfigError

DEFAULT_CONFIG = "configs/runs/demo.yaml"
OWN_KEYS = ("output", "data.manifest", "data.dataset", "text.encoder")
"""Set by the demo itself, to places inside its output folder."""
FREE_SECTIONS = ("sampling", "logging", "parallel", "zero", *OWN_KEYS)
FREE_TRAIN_KEYS = ("threads", "keep_last", "checkpoint_every", "validate_every", "nonfinite_limit")
"""May differ between two runs in one folder: no artifact is wrong afterwards."""
T2V_PROMPTS = 3


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale demo argv...`; a stage that fails gives its own."""
    parser = CommandParser("demo", "Run the whole job on a CPU: clips -> token shards -> training -> sampled videos, "
                           "and measure what came out. Values given as key.sub=value go to every command that reads "
                           "the configuration.", "grn-scale demo --output demo_out train.steps=800")
    parser.set_defaults(config=DEFAULT_CONFIG)
    parser.add_argument("--output", default="demo_out", metavar="DIR", help="folder for everything (default: demo_out)")
    parser.add_argument("--clips", type=int, default=5120, metavar="N", help="training clips to make (default: 5120)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="training processes (default: 2)")
    parser.add_argument("--prompts", type=int, default=128, metavar="N",
                        help="held-out prompts that the conditional accuracy is measured on (default: all 128)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="clips sampled for each prompt (default: 4)")
    config, options = parser.parse_command(argv)
    for key in OWN_KEYS:
        if any(override.partition("=")[0] == key for override in options.overrides):
            raise ConfigError(f"{key} is what the demo sets itself; --output DIR says where everything goes")
    if min(options.clips, options.processes, options.prompts, options.seeds) < 1:
        raise ConfigError("--clips, --processes, --prompts and --seeds must be at least 1")
    check_layout(config, options.processes)
    start_logging()
    demo(config, options.config, options.overrides, Path(options.output), clips=options.clips,
         processes=options.processes, prompts=options.prompts, seeds=options.seeds)
    return 0


def demo(config: Config, config_file: str, overrides: list[str], out: Path, *, clips: int, processes: int, prompts: int,
         seeds: int) -> None:
    """Run all stages into the folder `out`; see `main`. Raises StageFailed at the first that fails."""
    settings = {name: section for name, section in to_dict(config).items() if name not in FREE_SECTIONS}
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in FREE_TRAIN_KEYS}
    stages = Stages(out, {"clips": clips, "config": settings})
    python = [sys.executable, "-m"]
    grn_scale = [*python, "grn_scale"]
    media, encoder, tokens, trained = out / "clips", out / "text_encoder", out / "tokens", out / "run"
    samples, measured = out / "samples", out / "measured"
    configured = ["--config", config_file, *overrides, f"text.encoder={encoder}"]

    stages.run("clips", [
        *python, "grn_scale.demo.prepare", "clips", "--output", media, "--clips", str(clips), "--side",
        str(16 * config.tokenize.latent_side), "--frames", str(config.tokenize.max_frames)],
        makes=media / "train.jsonl")
    stages.run("text encoder", [
        *python, "grn_scale.demo.prepare", "text-encoder", "--manifest", media / "train.jsonl", "--output", encoder],
        makes=encoder / "config.json", new_folder=encoder)
    stages.run("manifest", [*grn_scale, "manifest", "validate", media / "train.jsonl"], makes=media / "train.jsonl")
    stages.run("tokenize", [
        *grn_scale, "tokenize", *configured, f"data.manifest={media / 'train.jsonl'}", f"output={tokens}"],
        makes=tokens / "dataset.json")
    stages.run("verify", [*grn_scale, "verify", tokens], makes=tokens / "dataset.json")
    stages.run("reconstruction", [
        *python, "grn_scale.demo.reconstruction", *configured, "--manifest", f"held_out={media / 'held_out.jsonl'}",
        "--manifest", f"real={media / 'real.jsonl'}", f"output={measured}"], makes=measured / "reconstruction.json")
    stages.run("train", [
        *python, "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "grn_scale", "train", *configured, f"data.dataset={tokens}", f"output={trained}", "--resume", "auto"],
        makes=trained / f"step-{config.train.steps:08d}")
    held_out = [json.loads(line) for line in (media / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    sample = [*grn_scale, "sample", *configured, "--run", trained]
    stages.run("sample videos", [
        *sample, *(f"--prompt={clip['caption']}" for clip in held_out[:T2V_PROMPTS]), f"output={samples / 'text'}"],
        makes=samples / "text" / "samples.json", new_folder=samples / "text")
    stages.run("continue a picture", [
        *sample, f"--prompt={held_out[0]['caption']}", "--first-frame", media / held_out[0]["path"],
        f"output={samples / 'picture'}"],
        makes=samples / "picture" / "samples.json", new_folder=samples / "picture")
    stages.run("accuracy", [
        *python, "grn_scale.demo.accuracy", *configured, "--run", trained, "--prompts", str(prompts), "--seeds",
        str(seeds), f"output={measured}"], makes=measured / "accuracy.json")

    from grn_scale.demo.summary import SUMMARY, print_summary, summarize
    from grn_scale.train.metrics import plot_metrics

    result = summarize(out, {
        "clips and manifests": media, "text encoder": encoder, "token shards": tokens,
        "checkpoints and metrics": trained, "curves": plot_metrics(trained), "sampled videos": samples,
        "contact sheet": measured / "contact_sheet.png", "measurements": measured, "this summary": out / SUMMARY,
    }, stages.records, trained, measured)
    print()
    print_summary(result)


if __name__ == "__main__":
    sys.exit(run(main))
