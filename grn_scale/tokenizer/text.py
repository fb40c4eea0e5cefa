"""Captions -> token ids -> text states: cleaning, task tags, tokenizer, and the frozen UMT5 encoder in one process.

Spec: GRN reference, section 5 ("Text encoder", "Captions"). Only the states of a caption's true length are
kept. The sentencepiece model is read directly: it is the file the weights were trained with, it parses no
special token out of a caption, and it needs no conversion.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from grn_scale.batch import TASKS, Sample
from grn_scale.config.data_schema import MOST_TEXT_TOKENS
from grn_scale.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5Config, UMT5EncoderModel

BATCH_TEXTS = 32
"""Texts of one length that run together."""
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SPIECE = "spiece.model"
FOLDER_HOLDS = f"a UMT5 folder holds config.json, {WEIGHTS} and {SPIECE}"


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


def tasks_of(latent_frames: int) -> tuple[str, ...]:
    """Tasks a clip of so many latents can be trained as. Image-to-video needs a frame after the first."""
    return ("T2I",) if latent_frames == 1 else ("T2V", "I2V")


def texts_of(captions: Iterable[str], latent_frames: int, task_tags: bool) -> list[str]:
    """The texts that are encoded for a clip's cleaned captions: each once, in order. The empty caption is not added."""
    return list(dict.fromkeys(tagged_caption(caption, task, task_tags)
                              for caption in captions for task in tasks_of(latent_frames)))


def text_key(text: str, fingerprint: str) -> str:
    """Key of a text entry (64 hex digits): sha256 over the tagged, cleaned caption and the encoder's fingerprint."""
    return hashlib.sha256(f"{text}\0{fingerprint}".encode()).hexdigest()


class TextTokenizer:
    """Texts -> token ids, with the facts about the encoder they are for. Made by `load_text_tokenizer`."""

    def __init__(self, pieces: SentencePieceProcessor, config: UMT5Config, max_tokens: int, fingerprint: str):
        self.max_tokens = max_tokens
        self.fingerprint = fingerprint
        """sha256 (hex) over weights, tokenizer model and max_tokens."""
        self.hidden_size: int = config.d_model
        self._pieces = pieces
        self._end = config.eos_token_id

    def token_ids(self, text: str) -> list[int]:
        """Ids of `text`, cut to max_tokens, the end token always last; the empty text is the end token alone."""
        return self._pieces.encode(text)[: self.max_tokens - 1] + [self._end]


class IdsEncoder(Protocol):
    """A text encoder that is given token ids: whole in one process, or shared among several."""

    hidden_size: int
    device: torch.device

    def encode_ids(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """States of the ids of each text: bf16 [n, hidden_size] on the device."""


class TextEncoder:
    """A frozen UMT5 encoder with its tokenizer, whole in this process. Made by `load_text_encoder`."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: TextTokenizer):
        self._model = model
        self.tokenizer = tokenizer
        self.token_ids = tokenizer.token_ids
        self.max_tokens = tokenizer.max_tokens
        self.fingerprint = tokenizer.fingerprint
        self.hidden_size = tokenizer.hidden_size
        self.device: torch.device = model.device

    def encode(self, texts: Sequence[str], batch: int = BATCH_TEXTS) -> list[torch.Tensor]:
        """States of each text: bf16 [n, hidden_size] on the CPU, n its true length in tokens."""
        return [states.cpu() for states in self.encode_ids([self.token_ids(text) for text in texts], batch)]

    @torch.inference_mode()
    def encode_ids(self, texts: Sequence[Sequence[int]], batch: int = BATCH_TEXTS) -> list[torch.Tensor]:
        """States of the token ids of each text: bf16 [n, hidden_size] on the encoder's device.

        The order of `texts` does not matter: what runs together is a function of their set and of `batch`.
        """
        states: dict[tuple[int, ...], torch.Tensor] = {}
        for together in equal_length_batches(texts, batch):
            hidden = self._model(input_ids=torch.tensor(together, device=self.device)).last_hidden_state
            states.update(zip(together, hidden.to(torch.bfloat16).unbind()))
        # Entries that ran together share memory until each has its own.
        return [states[tuple(entry)].clone() for entry in texts]


def with_text_states(samples: Sequence[Sample], encoder: IdsEncoder) -> list[Sample]:
    """The samples with the states of their `text_ids`; zeros where a sample is not valid. All lie on one device.

    Samples that share a text share its states. Runs the encoder once, also where no sample has ids.
    """
    asked = [sample.text_ids for sample in samples if sample.valid and sample.text_ids is not None]
    known = dict(zip(asked, encoder.encode_ids(asked)))

    def states_of(sample: Sample) -> torch.Tensor:
        if sample.text_ids is None:
            return sample.text_states.to(encoder.device)
        if sample.valid:
            return known[sample.text_ids]
        return torch.zeros(len(sample.text_ids), encoder.hidden_size, dtype=torch.bfloat16, device=encoder.device)

    return [replace(sample, text_states=states_of(sample)) for sample in samples]


def equal_length_batches(texts: Iterable[Sequence[int]], batch: int) -> list[list[tuple[int, ...]]]:
    """The different texts (token ids), at most `batch` of one length together: no padding, and nothing to mask."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for entry in sorted({tuple(text) for text in texts}):
        by_length.setdefault(len(entry), []).append(entry)
    return [by_length[length][first : first + batch] for length in sorted(by_length)
            for first in range(0, len(by_length[length]), batch)]


def load_text_tokenizer(folder: str | Path, max_tokens: int) -> TextTokenizer:
    """Tokenizer of a Hugging Face folder of a UMT5 encoder, whose weights are hashed but not loaded.

    Raises UserError naming what the folder lacks or what cannot be read, and where max_tokens is not between 1 and
    MOST_TEXT_TOKENS.
    """
    import sentencepiece

    if not 1 <= max_tokens <= MOST_TEXT_TOKENS:
        raise UserError(f"text.max_tokens is {max_tokens}, but the model has positions for 1 to {MOST_TEXT_TOKENS} "
                        "text tokens: longer captions are cut")
    folder = Path(folder)
    config = read_text_config(folder)
    weights = weight_files(folder)
    if not (folder / SPIECE).is_file():
        raise UserError(f"text.encoder: {folder} has no {SPIECE}; {FOLDER_HOLDS}")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / SPIECE))
    except RuntimeError as error:
        raise UserError(f"text.encoder: {folder / SPIECE} is no sentencepiece model: {error}") from error
    if pieces.get_piece_size() > config.vocab_size:
        raise UserError(f"text.encoder: {folder / SPIECE} has {pieces.get_piece_size()} pieces, but the weights know "
                        f"{config.vocab_size}; they do not belong together")
    return TextTokenizer(pieces, config, max_tokens, _fingerprint([*weights, folder / SPIECE], max_tokens))


def load_text_encoder(folder: str | Path, max_tokens: int, device: str | torch.device = "cpu") -> TextEncoder:
    """Text encoder of a Hugging Face folder: config.json, safetensors weights and spiece.model, local files only.

    The precision is the stored one. Raises UserError as `load_text_tokenizer` does, and for weights that are not those
    of a UMT5 encoder.
    """
    from safetensors import SafetensorError
    from transformers import UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_text_tokenizer(folder, max_tokens)
    try:
        model, report = UMT5EncoderModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"text.encoder: {folder} cannot be loaded as a UMT5 encoder: {error}") from error
    if report["missing_keys"]:
        raise UserError(f"text.encoder: {folder} lacks weights of a UMT5 encoder: {sorted(report['missing_keys'])[:3]}")
    return TextEncoder(model.eval().requires_grad_(False).to(device), tokenizer)


def read_text_config(folder: Path) -> UMT5Config:
    """config.json of a UMT5 encoder's folder. UserError where there is none, or of another model."""
    from transformers import UMT5Config

    if not folder.is_dir():
        raise UserError(f"text.encoder: no folder {str(folder)!r}; give the Hugging Face folder of a UMT5 encoder")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"text.encoder: {folder} has no config.json; {FOLDER_HOLDS}")
    try:
        return UMT5Config.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"text.encoder: {folder} cannot be loaded as a UMT5 encoder: config.json: {error}") from error


def weight_files(folder: Path) -> list[Path]:
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
