"""The plain torch model against recorded tensors of the reference (golden/manifest.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grn_scale.config.schema import ModelConfig
from grn_scale.model import GRN, Sample

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "grn_t2iv_cases.json").read_text())


def golden_config(name: str, layout: str) -> ModelConfig:
    c = CASES["models"][name]
    return ModelConfig(
        hidden_size=c["embed_dim"], num_layers=c["depth"], num_heads=c["num_heads"],
        ffn_hidden_size=c["mlp_intermediate"], num_chunks=c["block_chunks"], text_hidden_size=c["text_channels"],
        latent_channels=c["latent_dim"], rounds=c["hbq_round"],
        label_form="bit" if c["refine_mode"] == "bit" else "index", layout=layout)


@pytest.mark.parametrize("layout,case", [(v, c) for v in ("v1", "v2") for c in CASES[v]])
def test_logits_equal_the_reference(layout: str, case: str) -> None:
    name = case.split("/")[0]
    weights = load_file(GOLDEN / "grn_t2iv_state.safetensors")
    record = load_file(GOLDEN / f"grn_t2iv_{layout}.safetensors")
    model = GRN(golden_config(name, layout))
    model.load_state_dict({k.removeprefix(name + "/"): v for k, v in weights.items() if k.startswith(name + "/")})
    described = CASES[layout][case]["samples"]
    samples = []
    for i, sample in enumerate(described):
        def get(key: str) -> torch.Tensor:
            return record[f"{case}/s{i}/{key}"]
        labels = get("mixed_labels")[0]
        if sample["first_frame_condition"]:
            labels = torch.cat((get("labels")[0][:, :1], labels[:, -(labels.shape[1] - 1):]), dim=1)
        samples.append(Sample(labels, get("text"), float(get("pt_used")), sample["ratio_key"],
                              sample["first_frame_condition"]))
    with torch.no_grad():
        outputs = model.logits(samples)
    for i, logits in enumerate(outputs):
        torch.testing.assert_close(logits, record[f"{case}/s{i}/logits"], atol=1e-4, rtol=0)
