"""A folder with all that tokenize needs, the command over it, and looks at what it made."""

from __future__ import annotations

from pathlib import Path

from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import tokenize_clips
from tests.helpers.clips import caption, write_clip, write_manifest, write_text_encoder, write_tokenizer

CLIPS = 8


class TokenizeSetup:
    """Clips, manifest, tokenizer and text encoder in one folder, and the command over them."""

    def __init__(self, root: Path, clips: int = CLIPS):
        self.root = root
        self.lines = [{"path": f"clips/{i}.mp4", "caption": caption(i)} for i in range(clips)]
        for i in range(clips):
            # Two shapes, so that batches of one bucket are interleaved in the manifest.
            write_clip(root / f"clips/{i}.mp4", i, frames=9, width=64 if i % 3 == 2 else 32)
        self.tokenizer = write_tokenizer(root / "tokenizer.safetensors")
        self.encoder = write_text_encoder(root / "encoder", CLIPS)

    def arguments(self, output: str, lines: list[dict] | None = None, **changes) -> list[str]:
        manifest = write_manifest(self.root / "clips.jsonl", self.lines if lines is None else lines)
        settings = {
            "data.manifest": manifest, "output": self.root / output, "tokenizer.path": self.tokenizer,
            "text.encoder": self.encoder, "text.max_tokens": 32, "model.latent_channels": 4,
            "model.text_hidden_size": 64, "tokenize.fps": 16, "tokenize.max_frames": 9, "tokenize.latent_side": 2,
            "tokenize.shard_samples": 3, "tokenize.batch_clips": 2, "tokenize.max_bad_fraction": 0, **changes}
        return [f"{key}={value}" for key, value in settings.items()]

    def run(self, output: str, lines: list[dict] | None = None, **changes) -> Path:
        assert tokenize_clips.main(self.arguments(output, lines, **changes)) == 0
        return self.root / output


def content(folder: Path) -> dict[str, bytes]:
    """All that belongs to the dataset, and the records of its chunks: not the status, the configuration (it names the
    folder) and the cut of the manifest (which has its time)."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("status.json", "config.yaml", "manifest.json")
            and path.parent.name != "workers"}


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def captions_of(folder: Path) -> dict[str, list[str]]:
    """Key -> keys of its T2V texts."""
    dataset = Dataset.open(folder)
    return {row.key: [c.texts["T2V"].key for c in row.captions]
            for shard in range(len(dataset.shard_sizes)) for row in dataset.rows(shard)}
