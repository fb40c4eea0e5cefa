"""Labelled pictures of clips: the film strip of a refinement and the contact sheet of many samples."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grn_scale.sampling.video import spread

TEXT_PIXELS = 14
LINE_PIXELS = 18
GAP = 4
MARGIN = 12
INK, PAPER = (30, 30, 30), (255, 255, 255)


def film_strip(rows: Sequence[tuple[str, np.ndarray]], title: str, *, columns: int = 9,
               cell_pixels: int = 96) -> Image.Image:
    """Picture with one row for each (label, clip), columns for frames spread over the clip.

    Clips are uint8 RGB [T, H, W, 3] of one shape; a cell is at least cell_pixels high.
    """
    frames, height, width = rows[0][1].shape[:3]
    shown = spread(frames, columns)
    scale = _scale(height, cell_pixels)
    cell_w, cell_h = round(width * scale), round(height * scale)
    font = _font()
    left = MARGIN + max(round(font.getlength(line)) for label, _ in rows for line in label.split("\n")) + MARGIN
    grid_width = len(shown) * (cell_w + GAP) - GAP
    title_lines = wrap(title, left + grid_width - MARGIN, font)
    top = MARGIN + LINE_PIXELS * (len(title_lines) + 1) + GAP
    image = Image.new("RGB", (left + grid_width + MARGIN, top + len(rows) * (cell_h + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    _write(draw, title_lines, MARGIN, MARGIN, font)
    for column, frame in enumerate(shown):
        x = left + column * (cell_w + GAP)
        draw.text((x, top - LINE_PIXELS), f"frame {frame + 1}" if column == 0 else f"{frame + 1}", INK, font)
        for row, (_, clip) in enumerate(rows):
            image.paste(_resized(clip[frame], cell_w, cell_h), (x, top + row * (cell_h + GAP)))
    for row, (label, _) in enumerate(rows):
        lines = label.split("\n")
        y = top + row * (cell_h + GAP) + max(0, (cell_h - LINE_PIXELS * len(lines)) // 2)
        _write(draw, lines, MARGIN, y, font)
    return image


def contact_sheet(clips: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 4, title: str = "",
                  cell_pixels: int = 80) -> Image.Image:
    """Picture of many clips in a grid: first, middle and last frame of each side by side, its caption below.

    Clips are uint8 RGB [T, H, W, 3], of any shapes; a frame is brought to a height of at least cell_pixels, a larger
    one to the smallest whole fraction that is.
    """
    font = _font()
    tiles = [_tile(clip, cell_pixels) for clip in clips]
    tile_w, tile_h = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    tile_w = max(tile_w, 2 * cell_pixels)
    texts = [wrap(caption, tile_w, font) for caption in captions]
    step_x, step_y = tile_w + MARGIN, tile_h + GAP + LINE_PIXELS * max(map(len, texts)) + MARGIN
    columns = min(columns, len(tiles))
    title_lines = wrap(title, columns * step_x - MARGIN, font) if title else []
    top = MARGIN + LINE_PIXELS * len(title_lines)
    grid_rows = -(-len(tiles) // columns)
    image = Image.new("RGB", (MARGIN + columns * step_x, top + grid_rows * step_y), PAPER)
    draw = ImageDraw.Draw(image)
    _write(draw, title_lines, MARGIN, MARGIN // 2, font)
    for i, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
        x, y = MARGIN + i % columns * step_x, top + i // columns * step_y
        image.paste(tile, (x, y))
        _write(draw, lines, x, y + tile_h + GAP, font)
    return image


def png_bytes(image: Image.Image) -> bytes:
    """PNG file of a picture, the same bytes for the same pixels."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=False)
    return file.getvalue()


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of `text` of at most `width` pixels, broken between words (a longer word has a line of its own)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _tile(clip: np.ndarray, cell_pixels: int) -> Image.Image:
    frames, height, width = clip.shape[:3]
    scale = _scale(height, cell_pixels)
    w, h = round(width * scale), round(height * scale)
    shown = sorted({0, frames // 2, frames - 1})
    tile = Image.new("RGB", (len(shown) * (w + GAP) - GAP, h), PAPER)
    for i, frame in enumerate(shown):
        tile.paste(_resized(clip[frame], w, h), (i * (w + GAP), 0))
    return tile


def _scale(height: int, cell_pixels: int) -> float:
    """Factor that brings a frame's height near to cell_pixels, at least there: a whole one, or one over a whole one."""
    return -(-cell_pixels // height) if height < cell_pixels else 1 / (height // cell_pixels)


def _resized(frame: np.ndarray, width: int, height: int) -> Image.Image:
    # Enlarged pixels stay sharp squares: nothing is shown that the model did not make.
    image = Image.fromarray(np.ascontiguousarray(frame))
    return image.resize((width, height), Image.Resampling.NEAREST if width >= image.width else Image.Resampling.LANCZOS)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font inside Pillow: pictures do not depend on what the machine has installed."""
    return ImageFont.load_default(TEXT_PIXELS)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: ImageFont.ImageFont) -> None:
    for i, line in enumerate(lines):
        draw.text((x, y + i * LINE_PIXELS), line, INK, font)
