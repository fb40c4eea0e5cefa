"""Pictures, upright and in RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

from grn_scale.data.media_file import Media
from grn_scale.data.video_index import DecodeError, VideoInfo, require_file

LYING = range(5, 9)
"""EXIF orientations of pictures whose rows are shown as columns."""


def probe_image(media: Media) -> VideoInfo:
    """Facts of an image file, from its header: one frame with fps 0. DecodeError: missing, unreadable, truncated."""
    with _opened(media) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in LYING:
            width, height = height, width
        return VideoInfo(width=width, height=height, fps=0.0, frames=1, duration=0.0, rotation=0, constant_rate=True,
                         codec=(image.format or "").lower(), pixel_aspect=1.0, pixel_format=image.mode)


def read_image(media: Media) -> np.ndarray:
    """The picture upright, uint8 RGB [height, width, 3]. DecodeError: missing, unreadable, truncated."""
    with _opened(media) as image:
        return np.asarray(_opaque(ImageOps.exif_transpose(image)))


@contextmanager
def _opened(media: Media) -> Iterator[Image.Image]:
    require_file(media)
    try:
        with media.open() as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise DecodeError("missing", str(error)) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise DecodeError(reason, f"{media}: {error}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """RGB image; what is transparent becomes white, not whatever colour hides under it."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
