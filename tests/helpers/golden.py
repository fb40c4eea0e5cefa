"""The reference's recorded text/video training cases (tests/golden) in our terms: model, pack, batch.

A recording is data: every shape is read from it, so another one of the same form takes this one's place.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from grn_scale import hbq
from grn_scale.batch import Draw, Pack, Sample
from grn_scale.config.schema import ModelConfig, NoiseConfig
from grn_scale.data.plan import sample_weights
from grn_scale.model.pack import PackedBatch, assemble

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "grn_t2iv_cases.json").read_text())
GAMMA = {"v1": 0.0, "v2": 0.5}
"""Layout -> power of the predicted tokens that the recorded final_loss weighs a sample with."""
LOGITS, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-3
"""The recording's tolerances: absolute, absolute, relative."""


def golden_config(name: str, layout: str) -> ModelConfig:
    c = CASES["models"][name]
    return ModelConfig(
        hidden_size=c["embed_dim"], num_layers=c["depth"], num_heads=c["num_heads"],
        ffn_hidden_size=c["mlp_intermediate"], num_chunks=c["block_chunks"], text_hidden_size=c["text_channels"],
        latent_channels=c["latent_dim"], rounds=c["hbq_round"],
        label_form="bit" if c["refine_mode"] == "bit" else "index", layout=layout)


@lru_cache
def _stored(file: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / file)


def golden_state(name: str) -> dict[str, torch.Tensor]:
    """Recorded weights of a model under their official names."""
    prefix = name + "/"
    return {key.removeprefix(prefix): value for key, value in _stored("grn_t2iv_state.safetensors").items()
            if key.startswith(prefix)}


@dataclass(frozen=True)
class GoldenCase:
    """One pack that the reference was run on."""

    layout: str
    case: str
    """Model and kind of samples, as in "bit_hd24/i2v"."""

    @property
    def model(self) -> str:
        return self.case.split("/")[0]

    @property
    def config(self) -> ModelConfig:
        return golden_config(self.model, self.layout)

    @property
    def samples(self) -> list[dict]:
        """Shape, text length, ratio key and kind of each sample."""
        return CASES[self.layout][self.case]["samples"]

    def __getitem__(self, name: str) -> torch.Tensor:
        return _stored(f"grn_t2iv_{self.layout}.safetensors")[f"{self.case}/{name}"]

    def of(self, sample: int, name: str) -> torch.Tensor:
        return self[f"s{sample}/{name}"]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The case's tensors whose name begins with the prefix, by the rest of their name."""
        prefix = f"{self.case}/{prefix}"
        return {key.removeprefix(prefix): value for key, value in
                _stored(f"grn_t2iv_{self.layout}.safetensors").items() if key.startswith(prefix)}

    def mixed(self, sample: int) -> torch.Tensor:
        """uint8 [D, t, h, w] that the network reads, in natural order, a given first frame clean."""
        mixed, clean = self.of(sample, "mixed_labels")[0], self.of(sample, "labels")[0]
        given = int(self.samples[sample]["first_frame_condition"])
        return torch.cat((clean[:, :given], mixed[:, given:]), dim=1)

    def pack(self) -> Pack:
        """The samples as a plan would draw them."""
        draws = []
        for i, s in enumerate(self.samples):
            task = "I2V" if s["first_frame_condition"] else "T2I" if s["thw"][0] == 1 else "T2V"
            draws.append(Draw(i, f"s{i}", i, tuple(s["thw"]), s["ratio_key"], task, -1, s["text_len"]))
        return Pack(0, 0, tuple(draws))

    @property
    def budget(self) -> int:
        """Smallest legal token budget, with at least one row of padding."""
        return (self.pack().tokens // 128 + 1) * 128

    def batch(self, gamma: float, length: int | None = None) -> PackedBatch:
        """What training makes of the samples, with the recorded corruption in the place of ours."""
        config, pack = self.config, self.pack()
        samples = []
        for i, draw in enumerate(pack.draws):
            labels = self.of(i, "labels")[0]
            bits = labels if config.label_form == "bit" else hbq.index_to_bits(labels, config.rounds, dim=0)
            packed = torch.frombuffer(bytearray(hbq.pack_bits(hbq.to_token_major(bits))), dtype=torch.uint8).numpy()
            samples.append(Sample(draw, packed, self.of(i, "text")))
        batch = assemble(samples, sample_weights([pack], gamma), config=config, noise=NoiseConfig(), seed=0,
                         length=length or self.budget, device=torch.device("cpu"))
        mixed = torch.cat([self.mixed(i).flatten(1).t() for i in range(len(samples))])
        level = torch.cat([self.of(i, "pt_used").float() for i in range(len(samples))])
        return dataclasses.replace(batch, input=dataclasses.replace(batch.input, labels_VD=mixed, level_N=level))

    def weights(self, gamma: float) -> torch.Tensor:
        """fp32 [N]: the rule of the recording, from the recorded numbers of predicted tokens."""
        tokens = torch.tensor([len(self.of(i, "target")[0]) for i in range(len(self.samples))])
        return tokens.double().pow(gamma).div(tokens.double().pow(gamma).sum()).float()


ALL_CASES = [GoldenCase(layout, case) for layout in GAMMA for case in CASES[layout]]


def case_id(case: GoldenCase) -> str:
    return f"{case.layout}/{case.case}"
