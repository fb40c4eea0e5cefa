"""A small UMT5 text encoder for the demo: random weights, and the words of the demo's captions as its pieces.

The encoder is frozen in training, so it needs no training of its own as long as different words get
different states; a random projection of word embeddings gives that. It is no language model: words that are
not in `captions` are spelled letter by letter.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import torch

from grn_scale.batch import TASKS
from grn_scale.errors import UserError
from grn_scale.tokenizer.text import SPIECE, clean_caption

HIDDEN_SIZE = 64


def train_pieces(captions: Iterable[str]) -> bytes:
    """Sentencepiece model (serialised) in which each word of `captions` and each task tag is one piece.

    A function of the set of words alone: sorted input, one thread.
    """
    import sentencepiece

    words = sorted({word for caption in captions for word in clean_caption(caption).split()})
    if not words:
        raise UserError("the demo's text encoder needs captions with at least one word, but got none")
    # A word is preceded by the space mark, except directly behind a tag. Printable ASCII spells all other words.
    pieces = [f"<{task}>" for task in TASKS] + ["▁" + word for word in words] + words
    letters = [chr(code) for code in range(33, 127)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(letters), model_writer=model, model_type="unigram", user_defined_symbols=pieces,
        vocab_size=len(pieces) + 2 * len(letters), hard_vocab_limit=False, character_coverage=1.0,
        normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return model.getvalue()


def build_text_encoder(captions: Iterable[str], folder: str | Path, seed: int = 0) -> Path:
    """Writes a Hugging Face folder (config.json, model.safetensors, spiece.model, tokenizer files) and returns it.

    Two builds from the same captions and seed are byte-identical. Raises UserError where `folder` holds files
    already.
    """
    import sentencepiece
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel
    from transformers.utils import logging

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give a new folder for the demo's text encoder")
    folder.mkdir(parents=True, exist_ok=True)
    spiece = train_pieces(captions)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]

    config = UMT5Config(
        vocab_size=len(scored), d_model=HIDDEN_SIZE, d_kv=16, num_heads=4, d_ff=128, num_layers=2,
        num_decoder_layers=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dtype="float32",
        architectures=["UMT5EncoderModel"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    # The same pieces as tokenizer.json, for those who load the folder with transformers.
    T5Tokenizer(vocab=scored, extra_ids=0).save_pretrained(folder)
    (folder / SPIECE).write_bytes(spiece)
    return folder
