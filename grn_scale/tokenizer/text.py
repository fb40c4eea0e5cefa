"""Captions -> token ids -> text states: cleaning, task tags, and the frozen UMT5 encoder.

Spec: GRN reference, section 5 ("Text encoder", "Captions"). Only the states of a caption's true length are
kept. The sentencepiece model is read directly: it is the file the weights were trained with, it parses no
special token out of a caption, and it needs no conversion.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grn_scale.batch import TASKS
from grn_scale.config.data_schema import MOST_TEXT_TOKENS
from grn_scale.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5EncoderModel

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SPIECE = "spiece.model"


def clean_caption(text: str) -> str:
    """`text` with broken unicode repaired, HTML unescaped twice and white space collapsed."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def tagged_caption(caption: str, task: str, task_tags: bool) -> str:
    """The text that is encoded for a cleaned caption: the tag stands directly before it, without a space.

    The empty caption has no tag, and neither has any caption of a model without task tags. A caption that begins with
    the task's tag, as prompts for the official code do, keeps that one. UserError for an unknown task.
    """
    if task not in TASKS:
        raise UserError(f"task is {task!r}, but must be one of {', '.join(TASKS)}")
    tag = f"<{task}>"
    return f"{tag}{caption}" if task_tags and caption and not caption.startswith(tag) else caption


def text_key(text: str, fingerprint: str) -> str:
    """Key of a text entry (64 hex digits): sha256 over the tagged, cleaned caption and the encoder's fingerprint."""
    return hashlib.sha256(f"{text}\0{fingerprint}".encode()).hexdigest()


class TextEncoder:
    """A frozen UMT5 encoder with its tokenizer. Made by `load_text_encoder`."""

    def __init__(self, model: UMT5EncoderModel, pieces: SentencePieceProcessor, max_tokens: int, fingerprint: str):
        self._model = model
        self._pieces = pieces
        self.max_tokens = max_tokens
        self.fingerprint = fingerprint
        """sha256 (hex) over weights, tokenizer model and max_tokens."""
        self.hidden_size: int = model.config.d_model
        self._end = model.config.eos_token_id

    def token_ids(self, text: str) -> list[int]:
        """Ids of `text`, cut to max_tokens, the end token always last; the empty text is the end token alone."""
        return self._pieces.encode(text)[: self.max_tokens - 1] + [self._end]

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch: int = 32) -> list[torch.Tensor]:
        """States of each text: bf16 [n, hidden_size] on the CPU, n its true length in tokens.

        Texts of one length run together, so there is no padding and nothing to mask; equal texts run once.
        The order of `texts` does not matter: what runs together is a function of their set and of `batch`.
        """
        ids = [tuple(self.token_ids(text)) for text in texts]
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for entry in sorted(set(ids)):
            by_length.setdefault(len(entry), []).append(entry)
        device = self._model.device
        states: dict[tuple[int, ...], torch.Tensor] = {}
        for length in sorted(by_length):
            entries = by_length[length]
            for first in range(0, len(entries), batch):
                together = entries[first : first + batch]
                hidden = self._model(input_ids=torch.tensor(together, device=device)).last_hidden_state
                states.update(zip(together, hidden.to(torch.bfloat16).cpu().unbind()))
        # Entries that ran together share memory until each has its own.
        return [states[entry].clone() for entry in ids]


def load_text_encoder(folder: str | Path, max_tokens: int, device: str | torch.device = "cpu") -> TextEncoder:
    """Text encoder of a Hugging Face folder: config.json, safetensors weights and spiece.model, local files only.

    The precision is the stored one. Raises UserError naming what the folder lacks or what cannot be read, and where
    max_tokens is not between 1 and MOST_TEXT_TOKENS.
    """
    import sentencepiece
    from safetensors import SafetensorError
    from transformers import UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not 1 <= max_tokens <= MOST_TEXT_TOKENS:
        raise UserError(f"text.max_tokens is {max_tokens}, but the model has positions for 1 to {MOST_TEXT_TOKENS} "
                        "text tokens: longer captions are cut")
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"text.encoder: no folder {str(folder)!r}; give the Hugging Face folder of a UMT5 encoder")
    weights = _weight_files(folder)
    for name in ("config.json", SPIECE):
        if not (folder / name).is_file():
            raise UserError(f"text.encoder: {folder} has no {name}; a UMT5 folder holds config.json, "
                            f"{WEIGHTS} and {SPIECE}")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / SPIECE))
    except RuntimeError as error:
        raise UserError(f"text.encoder: {folder / SPIECE} is no sentencepiece model: {error}") from error
    try:
        model, report = UMT5EncoderModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"text.encoder: {folder} cannot be loaded as a UMT5 encoder: {error}") from error
    if report["missing_keys"]:
        raise UserError(f"text.encoder: {folder} lacks weights of a UMT5 encoder: {sorted(report['missing_keys'])[:3]}")
    if pieces.get_piece_size() > model.config.vocab_size:
        raise UserError(f"text.encoder: {folder / SPIECE} has {pieces.get_piece_size()} pieces, but the weights know "
                        f"{model.config.vocab_size}; they do not belong together")
    fingerprint = _fingerprint([*weights, folder / SPIECE], max_tokens)
    return TextEncoder(model.eval().requires_grad_(False).to(device), pieces, max_tokens, fingerprint)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise UserError(f"text.encoder: {folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; other weight formats "
                        "are not read, because loading them can run code")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"text.encoder: {index} is no safetensors index: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"text.encoder: {folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names")
    return [folder / name for name in names]


def _fingerprint(files: Sequence[Path], max_tokens: int) -> str:
    total = hashlib.sha256(f"max_tokens={max_tokens}".encode())
    for file in files:
        with open(file, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
