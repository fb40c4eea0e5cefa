"""Networks that samples are compared by: TorchScript files, and torchvision's where it is installed."""

from __future__ import annotations

import argparse

import pytest
import torch

from grn_scale.command_line import CommandParser
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.network import FeatureNetwork, add_options, load_network
from tests.helpers.evaluation import CLASSES, FEATURES, write_network

CPU = torch.device("cpu")


def options(*words: str) -> argparse.Namespace:
    parser = CommandParser("x", "", "", configured=False)
    add_options(parser)
    return parser.parse_options(list(words))


def network(*words: str) -> FeatureNetwork:
    return load_network(options("--features", *words), CPU)


def test_torchscript_file_gives_features_and_probabilities_by_its_arguments(tmp_path):
    file = str(write_network(tmp_path / "n.pt"))
    x = torch.rand(3, 3, 16, 16)
    features, scores = network(file, "--feature-arguments", "return_features=true")(x)
    assert features.shape == (3, FEATURES) and scores is None
    again, scores = network(file, "--feature-arguments", "return_features=true", "--score-arguments", "",
                            "--score-form", "probabilities")(x)
    assert torch.equal(again, features) and scores.shape == (3, CLASSES)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    settings = network(file).settings
    assert settings["network"] == "n.pt" and len(settings["fingerprint"]) == 64


def test_what_a_torchscript_network_cannot_do_is_told(tmp_path):
    file = str(write_network(tmp_path / "n.pt"))
    with pytest.raises(UserError, match="cannot take"):
        network(file, "--feature-arguments", "no_such=true")(torch.rand(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="must be like"):
        network(file, "--feature-arguments", "return_features=1")
    with pytest.raises(ConfigError, match="belongs to torchvision"):
        network(file, "--feature-layer", "fc")
    (tmp_path / "text.pt").write_bytes(b"no archive")
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt", "missing.pt"):
        with pytest.raises(UserError, match=f"cannot read .*{name} as TorchScript"):
            network(str(tmp_path / name))


def test_features_that_are_no_row_a_sample_are_refused():
    net = FeatureNetwork(lambda x: (x, None), "logits", None, {"network": "n"}, CPU)
    with pytest.raises(UserError, match=r"\[2, 3, 4, 4\], but must be a row for each"):
        net(torch.rand(2, 3, 4, 4))
    assert net(torch.rand(2, 3, 1, 1))[0].shape == (2, 3)


def test_features_are_computed_without_tf32_and_the_switches_are_put_back():
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before, seen = [part.allow_tf32 for part in switches], []
    net = FeatureNetwork(lambda x: (seen.extend(part.allow_tf32 for part in switches) or x, None), "logits", None,
                         {"network": "n"}, CPU)
    try:
        for part in switches:
            part.allow_tf32 = True
        net(torch.rand(2, 3))
        assert seen == [False, False] and all(part.allow_tf32 for part in switches)
    finally:
        for part, allowed in zip(switches, before):
            part.allow_tf32 = allowed


def torchvision_models():
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"needs torchvision: {error}")
    return models


def test_torchvision_network_gives_what_goes_into_its_last_linear_and_the_classes(tmp_path):
    models = torchvision_models()
    torch.manual_seed(0)
    module = models.get_model("resnet18", weights=None).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    net = network("torchvision:resnet18", "--feature-weights", str(tmp_path / "weights.pth"))
    x = torch.rand(2, 3, 64, 64)
    features, scores = net(x)
    with torch.inference_mode():
        torch.testing.assert_close(module.fc(features).softmax(1), scores)
    assert features.shape == (2, 512) and net.preprocessing.resize == (224, 224)
    assert net.preprocessing.mean == (0.485, 0.456, 0.406) and net.settings["feature_layer"] == "fc"
    video = models.get_model("r3d_18", weights=None).eval()
    torch.save(video.state_dict(), tmp_path / "video.pth")
    clips = network("torchvision:r3d_18", "--feature-weights", str(tmp_path / "video.pth"))
    assert clips(torch.rand(1, 3, 8, 32, 32))[0].shape == (1, 512) and clips.preprocessing.resize == (112, 112)
    with pytest.raises(UserError, match="cannot load"):
        network("torchvision:resnet18", "--feature-weights", str(tmp_path / "video.pth"))
    with pytest.raises(ConfigError, match="no module 'head'"):
        network("torchvision:resnet18", "--feature-weights", str(tmp_path / "weights.pth"), "--feature-layer", "head")
    with pytest.raises(ConfigError, match="no network 'resnet19'"):
        network("torchvision:resnet19")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_from_a_file_get_the_input_that_they_were_trained_with(tmp_path, name):
    models = torchvision_models()
    torch.manual_seed(0)
    module = models.get_model(name, weights=None, init_weights=False, transform_input=True).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    net = network(f"torchvision:{name}", "--feature-weights", str(tmp_path / "weights.pth"))
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(net(x)[1], module(x).softmax(1))
    assert net.settings["transform_input"] is True


def test_missing_or_unfitting_torchvision_is_told_with_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=r'pip install "grn-scale\[torchvision\]"'):
        network("torchvision:inception_v3")
