"""What the ranks of the text encoder's tests run: the encoder shared among them, beside the whole one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from grn_scale.batch import Draw, Sample
from grn_scale.config.schema import Config, ParallelConfig
from grn_scale.data.dataset_info import write_dataset
from grn_scale.data.index_parts import write_text_part, write_video_part
from grn_scale.data.schema import FORMAT_VERSION, Caption, DatasetInfo, IndexRow, TextRef
from grn_scale.data.shard_writer import write_shard
from grn_scale.data.text_payload import pack_states
from grn_scale.tokenizer.sharded_text import ShardedTextEncoder
from grn_scale.tokenizer.text import load_text_encoder, text_key, texts_of, with_text_states

CPU = torch.device("cpu")


def encode_own(folder: Path, texts: list[list[str]]) -> dict:
    """Twice the states of texts[rank] from the shared encoder, and from the whole one; bytes that each holds."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from grn_scale.parallel import groups

    groups.start(ParallelConfig())
    try:
        whole, shared = load_text_encoder(folder, 64), ShardedTextEncoder(folder, dist.group.WORLD, CPU)
        ids = [whole.token_ids(text) for text in texts[dist.get_rank()]]
        found = [shared.encode_ids(ids), shared.encode_ids(ids)]
        expected = whole.encode_ids(ids)
        return {"equal": all(torch.equal(a, b) for states in found for a, b in zip(states, expected, strict=True)),
                "texts": len(ids), "device": str(shared.device), "hidden_size": shared.hidden_size,
                "shared_bytes": shared.parameter_bytes,
                "whole_bytes": sum(parameter.nbytes for parameter in whole._model.encoder.block.parameters())}
    finally:
        parallel_state.destroy_model_parallel()


class Counted:
    """An encoder that counts the texts it is given."""

    def __init__(self, encoder):
        self._encoder, self.texts = encoder, 0
        self.hidden_size, self.device = encoder.hidden_size, encoder.device

    def encode_ids(self, texts):
        self.texts += len(texts)
        return self._encoder.encode_ids(texts)


def encode_divided(folder: Path, texts: list[str], parallel: ParallelConfig) -> dict:
    """States of the same texts on all ranks of a copy of the model; one sample is not valid, one has its states."""
    from megatron.core import parallel_state

    from grn_scale.parallel import groups
    from grn_scale.parallel.text_encoder import DividedTextEncoder, weights_group

    groups.start(parallel)
    try:
        whole = load_text_encoder(folder, 64)
        counted = Counted(ShardedTextEncoder(folder, weights_group(), CPU))
        encoder = DividedTextEncoder(counted)
        samples = samples_of([tuple(whole.token_ids(text)) for text in texts])
        samples[0] = replace(samples[0], valid=False)
        known = torch.ones(3, whole.hidden_size, dtype=torch.bfloat16)
        samples.append(replace(samples[0], text_ids=None, text_states=known, valid=True))
        filled = with_text_states(samples, encoder)
        expected = [torch.zeros_like(whole.encode(texts[:1])[0]), *whole.encode(texts[1:]), known]
        asked = counted.texts
        nothing = with_text_states([], encoder)
        return {"equal": all(torch.equal(sample.text_states, states)
                             for sample, states in zip(filled, expected, strict=True)),
                "encoded": asked, "nothing": nothing}
    finally:
        parallel_state.destroy_model_parallel()


def samples_of(texts: list[tuple[int, ...]]) -> list[Sample]:
    """One sample for each text (token ids), as a dataset without states gives it."""
    return [Sample(Draw(n, f"k{n}", n, (1, 2, 2), 1.0, "T2I", 0, len(ids)), np.zeros(2, np.uint8), None, text_ids=ids)
            for n, ids in enumerate(texts)]


def write_dataset_of_texts(folder: Path, encoder_folder: Path, captions: list[str], states: str) -> Path:
    """A dataset of random bits of 4 channels in 4 rounds, one clip for each caption; `states` as in its texts."""
    encoder = load_text_encoder(encoder_folder, 64)
    rng, rows, refs = np.random.default_rng(0), [], {}
    with write_shard(f"{folder}/text-000000.tar") as texts:
        for text in texts_of(["", *captions], 2, True):
            ids = encoder.token_ids(text)
            payload = None if states == "none" else pack_states(encoder.encode([text])[0], states)
            row = texts.add_text(text_key(text, encoder.fingerprint), ids, payload)
            rows.append(row)
            refs[text] = TextRef(row.key, row.tokens, "text-000000.tar")
    text_shard, rows = write_text_part(folder, texts.info, rows), []
    with write_shard(f"{folder}/video-000000.tar") as videos:
        for number, text in enumerate(captions):
            thw = (2 + number % 2, 2, 2)
            bits = rng.integers(0, 256, thw[0] * 4 * 16 // 8, dtype=np.uint8).tobytes()
            payload = videos.add_video(key_of(number), bits, {})
            caption = Caption("", {task: refs[f"<{task}>{text}"] for task in ("T2V", "I2V")})
            rows.append(IndexRow(0, number, key_of(number), payload.offset, payload.length, payload.xxh3, thw, 1.0,
                                 (caption,)))
    write_dataset(folder, DatasetInfo(
        format_version=FORMAT_VERSION, tokenizer_fingerprint="", latent_channels=4, rounds=4,
        text_fingerprint=encoder.fingerprint, text_hidden_size=encoder.hidden_size, text_states=states, task_tags=True,
        empty_text=refs[""], fps=16.0, text_shards=(text_shard,),
        video_shards=(write_video_part(folder, videos.info, rows, empty_tokens=1),)))
    return folder


def key_of(number: int) -> str:
    """Key of clip `number`."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def train(config: Config, ports: tuple[int, int]) -> None:
    """A training run from scratch. It leaves the pool's group, so that it and the next case meet at ports of their own.
    """
    from grn_scale.parallel import groups
    from grn_scale.pretrain.train import train_run

    if torch.distributed.is_initialized():
        groups.stop()
    os.environ["MASTER_PORT"] = str(ports[0])
    try:
        train_run(config, "none")
    finally:
        os.environ["MASTER_PORT"] = str(ports[1])
