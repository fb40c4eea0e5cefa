"""The clips that benchmarks of the tokenizer work on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.config.schema import Config

if TYPE_CHECKING:
    from grn_scale.data.decode import DecodeRequest


def clip_requests(config: Config, count: int, folder: Path) -> list[DecodeRequest]:
    """Up to `count` clips of the manifest, or clips made for the purpose."""
    from grn_scale.data.buckets import bucket
    from grn_scale.data.decode import DecodeRequest
    from grn_scale.data.manifest import read_manifest
    from grn_scale.demo import shapes
    from grn_scale.demo.clips import encode_h264

    settings = config.tokenize
    if config.data.manifest:
        return [DecodeRequest.of(clip, settings) for clip in itertools.islice(read_manifest(
            config.data.manifest, allow_empty_captions=settings.allow_empty_captions), count)]
    side = bucket(1.0, settings.latent_side).height
    requests = []
    for number, attributes in zip(range(count), itertools.cycle(shapes.training())):
        path = folder / f"{number:06d}.mp4"
        path.write_bytes(encode_h264(shapes.render(attributes, number, side, settings.max_frames),
                                     max(1, round(settings.fps))))
        requests.append(DecodeRequest(str(path), settings.fps, settings.max_frames, latent_side=settings.latent_side))
    return requests
