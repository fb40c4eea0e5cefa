"""From the configuration to what shards depend on."""

from __future__ import annotations

from grn_scale.config.data_schema import TextConfig
from grn_scale.config.schema import Config
from grn_scale.data_pipeline.chunks import VideoSettings
from grn_scale.data_pipeline.encode_texts import TextSettings
from grn_scale.tokenizer.text import TextEncoder, TextTokenizer, load_text_encoder, load_text_tokenizer
from grn_scale.tokenizer.video import VideoTokenizer


def video_settings(config: Config, tokenizer: VideoTokenizer) -> VideoSettings:
    """What the bits of clips depend on."""
    return VideoSettings(
        tokenizer=tokenizer.fingerprint, latent_channels=tokenizer.latent_channels, rounds=config.model.rounds,
        fps=config.tokenize.fps, max_frames=config.tokenize.max_frames, latent_side=config.tokenize.latent_side)


def text_settings(config: Config, encoder: TextEncoder | TextTokenizer) -> TextSettings:
    """What text entries depend on; config.text.states must be settled (not auto)."""
    return TextSettings(encoder.fingerprint, encoder.hidden_size, encoder.max_tokens, config.model.task_tags,
                        config.text.states)


def load_text(config: TextConfig, device: str) -> TextEncoder | TextTokenizer:
    """The text encoder, or its tokenizer alone where no states are to be stored."""
    if config.states == "none":
        return load_text_tokenizer(config.encoder, config.max_tokens)
    return load_text_encoder(config.encoder, config.max_tokens, device)
