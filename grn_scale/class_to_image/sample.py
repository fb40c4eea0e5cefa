"""What `grn-scale sample` does with a class-to-image model: class ids -> a folder of pictures.

Writes one PNG a sample, refinement.png (how the first sample emerged from noise) and, last, samples.json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from grn_scale.atomic import write_bytes, write_json
from grn_scale.class_to_image.sampler import ImageMaps, generate
from grn_scale.class_to_image.source import load_trained
from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.load import to_dict
from grn_scale.errors import ConfigError
from grn_scale.sampling.film import Film
from grn_scale.sampling.output import FILM_STRIP, SUMMARY, check_unused, make_folder, progress_bar
from grn_scale.sampling.pictures import png_bytes
from grn_scale.sampling.source import Source, open_tokenizer
from grn_scale.sampling.video import decode_clips


@dataclass(frozen=True)
class ClassRequest:
    """What the command line asks for."""

    classes: tuple[int, ...]
    count: int
    """Samples of each class."""
    raw: bool
    """The trained weights, not their moving average."""


def sample_classes(source: Source, config: ClassConfig, request: ClassRequest) -> dict[str, Any]:
    """Sample what is asked for into the folder config.output; the content of samples.json.

    Sample n is draw n of config.seed. ConfigError for a class that the model does not know; UserError where the folder
    holds anything already, or the tokenizer is not the one the model was trained with.
    """
    known = source.class_model.num_classes
    for class_id in request.classes:
        if not 0 <= class_id < known:
            raise ConfigError(f"--class is {class_id}, but {source.checkpoint} knows the classes 0 .. {known - 1}")
    folder = Path(config.output)
    check_unused(folder)
    model, weights = load_trained(source, config, raw=request.raw)
    tokenizer = open_tokenizer(source, config, model.device)
    make_folder(folder)

    classes = [class_id for class_id in request.classes for _ in range(request.count)]
    settings = config.sampling
    film = Film(0, settings.steps)
    with progress_bar("sampling", settings.steps * len(classes)) as advance:
        def observe(maps: ImageMaps) -> None:
            film(maps)
            advance(sum(settings.steps - maps.step if n in maps.ended else 1 for n in maps.samples))
        result = generate(model, classes, settings, seed=config.seed, observe=observe)

    files = []
    with progress_bar("writing", len(classes)) as advance:
        for n, frames in enumerate(decode_clips(tokenizer, result.labels.unsqueeze(2), model.config)):
            files.append(f"{n:04d}.png")
            write_bytes(folder / files[-1], png_bytes(Image.fromarray(frames[0])))
            advance(1)
    height, width = frames.shape[1:3]
    strip = film.strip(tokenizer, model.config, f"class {classes[0]}")
    write_bytes(folder / FILM_STRIP, png_bytes(strip))
    summary = {
        "checkpoint": str(source.checkpoint), "step": source.state.get("step"), "weights": weights,
        "precision": config.train.precision, "device": str(model.device), "seed": config.seed,
        "settings": dataclasses.asdict(settings), "tokenizer_fingerprint": tokenizer.fingerprint,
        "model": to_dict(model.config), "task": "C2I", "frames": 1, "height": height, "width": width,
        "film_strip": FILM_STRIP,
        "samples": [{"file": file, "draw": n, "class_id": class_id, "steps": steps}
                    for n, (file, class_id, steps) in enumerate(zip(files, classes, result.steps.tolist()))]}
    write_json(folder / SUMMARY, summary)
    return summary
