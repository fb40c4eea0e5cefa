"""Tokenization from end to end beside its encoder alone, with as many workers: what decoding and writing cost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.perf.measure import spread

log = logging.getLogger("grn_scale.bench")
FREE_BOX = 8
"""Bytes of an MP4 box that says nothing: with it a copy of a file is another clip."""


def bench_fleet(config: Config, count: int, repeats: int) -> dict[str, Any]:
    """Clips a second of config.tokenize.workers workers, from end to end and of their encoders alone, in turn.

    count: clips, copies of those of config.data.manifest; each repeat runs over all, after one that does not count.
    The end-to-end rate counts from when the workers have loaded their models to the last shard.
    """
    if not config.data.manifest or not config.text.encoder:
        raise ConfigError("bench fleet needs data.manifest (MP4 files) and text.encoder")
    with tempfile.TemporaryDirectory(prefix="grn-bench-") as name:
        folder = Path(name)
        manifest = _copies(config, count, folder)
        config = replace(config, data=replace(config.data, manifest=str(manifest)))
        whole: list[float] = []
        alone: list[float] = []
        occupancy: dict[str, float] = {}
        for number in range(repeats):
            for measure in ((_end_to_end, _encode_alone) if number % 2 else (_encode_alone, _end_to_end)):
                log.info("repeat %d: %s", number + 1, measure.__name__.strip("_").replace("_", " "))
                if measure is _end_to_end:
                    status = _end_to_end(config, folder / f"tokens-{number}")
                    whole.append(status["clips_per_second"])
                    occupancy = status["occupancy"]
                else:
                    alone.append(_encode_alone(config, folder))
        return {"clips": count, "workers": config.tokenize.workers, "threads": config.tokenize.threads,
                "end_to_end_clips_per_second": spread(whole), "encoder_alone_clips_per_second": spread(alone),
                "share_of_the_encoder": spread([one / other for one, other in zip(whole, alone)]),
                "occupancy": occupancy}


def _copies(config: Config, count: int, folder: Path) -> Path:
    """A manifest of `count` different files: the given ones with bytes behind their end that mean nothing."""
    from grn_scale.data.manifest import load_manifest

    clips = load_manifest(config.data.manifest)
    lines = []
    for number in range(count):
        clip = clips[number % len(clips)]
        if clip.path.suffix != ".mp4" or clip.member:
            raise ConfigError(f"bench fleet copies MP4 files, but {clip.path} is none")
        path = folder / f"{number:06d}.mp4"
        shutil.copyfile(clip.path, path)
        with open(path, "ab") as file:
            for _ in range(number // len(clips)):
                file.write(FREE_BOX.to_bytes(4, "big") + b"free")
        lines.append(json.dumps({"path": path.name, "caption": f"clip {number}", "begin_frame": clip.begin_frame,
                                 "end_frame": clip.end_frame}))
    manifest = folder / "clips.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def _end_to_end(config: Config, output: Path) -> dict[str, Any]:
    """What `grn-scale tokenize` reports of a run into a new folder."""
    file = _written(replace(config, output=str(output)), output.with_suffix(".yaml"))
    done = subprocess.run([sys.executable, "-m", "grn_scale", "tokenize", "--config", str(file), "--json"],
                          stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(f"`grn-scale tokenize` ended with exit code {done.returncode}; its message is above")
    return json.loads(done.stdout)


def _encode_alone(config: Config, folder: Path) -> float:
    """Clips a second of the encoders."""
    workers = config.tokenize.workers
    file = _written(config, folder / "alone.yaml")
    processes = [subprocess.Popen(
        [sys.executable, "-m", "grn_scale.perf.encode_alone", str(file), str(part), str(workers)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(config.tokenize.threads)}) for part in range(workers)]
    try:
        if any(process.stdout.readline() != "ready\n" for process in processes):
            raise UserError("an encoding process did not start; its message is above")
        begin = time.perf_counter()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        clips = sum(int(process.stdout.readline()) for process in processes)
        return clips / (time.perf_counter() - begin)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _written(config: Config, path: Path) -> Path:
    from grn_scale.command_line import config_yaml

    path.write_text(config_yaml(config), encoding="utf-8")
    return path
