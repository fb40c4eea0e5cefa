"""The network whose features and class scores samples are compared by: one that the user names.

A TorchScript file (as the field exchanges I3D for FVD and Inception for FID), or `torchvision:NAME`. A TorchScript
file is a program: it cannot run Python, but use files of people you trust.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.preprocessing import Preprocessing

TORCHVISION = "torchvision:"
SCALE_INPUT = ("inception_v3", "googlenet")
"""Networks of torchvision that turn its usual input into the one they were trained with, as transform_input says."""
FORMS = ("logits", "probabilities")


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network on its device: batch -> features fp32 [n, d] and class probabilities fp32 [n, C]."""

    forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
    """Features, and class scores or None."""
    score_form: str
    preprocessing: Preprocessing
    """The defaults that suit it."""
    settings: dict[str, Any]
    """What the features depend on beside the preprocessing."""
    device: torch.device

    @torch.inference_mode()
    def __call__(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both on the CPU; None where the network gives no class scores. UserError where it cannot take the batch."""
        try:
            with full_fp32():
                features, scores = self.forward(batch)
        except RuntimeError as error:  # also what TorchScript raises for arguments it does not have
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.settings['network']} cannot take {list(batch.shape)}: {reason}; see --input, "
                            "--resize, --clip-frames, --feature-arguments and --score-arguments") from error
        features = _rows(features, len(batch), "features")
        if scores is not None:
            scores = _rows(scores, len(batch), "class scores")
            scores = scores.softmax(1) if self.score_form == "logits" else scores
        return features, scores


@contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 in products and convolutions of the block: features must not depend on which GPU makes them."""
    parts = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, allowed in zip(parts, before):
            part.allow_tf32 = allowed


def _rows(values: Any, samples: int, what: str) -> torch.Tensor:
    """fp32 [samples, d] on the CPU of values [samples, d, 1, ...]."""
    if not isinstance(values, torch.Tensor) or values.ndim < 2 or values.shape[0] != samples or (
            values[0].numel() != values.shape[1]):
        found = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise UserError(f"the network's {what} for {samples} samples are {found}, but must be a row for each, "
                        f"[{samples}, d]; see --feature-arguments and --feature-layer")
    return values.reshape(samples, -1).float().cpu()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load_network` reads."""
    parser.add_argument("--features", metavar="NETWORK", help="compare by the features of this network: a TorchScript "
                        f"file, or {TORCHVISION}NAME")
    parser.add_argument("--feature-weights", metavar="FILE|default", default="default", help="weights of a torchvision "
                        "network (safetensors or .pth), or torchvision's own, which it downloads (default: these)")
    parser.add_argument("--feature-layer", metavar="NAME", help="module of a torchvision network whose input is the "
                        "features (default: its last Linear)")
    parser.add_argument("--feature-arguments", metavar="NAME=BOOL,...", default="", help="arguments that make a "
                        "TorchScript network give features, like return_features=true,rescale=true,resize=true")
    parser.add_argument("--score-arguments", metavar="NAME=BOOL,...", help="arguments that make it give class scores "
                        "('' for none); without this option there are scores only where it gives (features, scores)")
    parser.add_argument("--score-form", choices=FORMS, default="logits",
                        help="what the class scores are (default: logits)")


def load_network(options: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    """The network of --features on the device. UserError or ConfigError where it cannot be had."""
    name = options.features
    if name.startswith(TORCHVISION):
        return _torchvision(name.removeprefix(TORCHVISION), options, device)
    return _torchscript(Path(name), options, device)


def _torchscript(file: Path, options: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    for option, plain in (("feature_layer", None), ("feature_weights", "default")):
        if getattr(options, option) != plain:
            raise ConfigError(f"--{option.replace('_', '-')} belongs to {TORCHVISION}NAME, but --features is {file}")
    features = _arguments("--feature-arguments", options.feature_arguments)
    scores = None
    if options.score_arguments is not None:
        scores = _arguments("--score-arguments", options.score_arguments)
    try:
        data = file.read_bytes()
        with warnings.catch_warnings():
            # Deprecated for new networks; the field's reference networks come in no other form.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(file), map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--features: cannot read {file} as TorchScript: {reason}; give a file that torch.jit.save "
                        f"wrote, or {TORCHVISION}NAME") from error
    settings = {"network": file.name, "fingerprint": hashlib.sha256(data).hexdigest(), "feature_arguments": features,
                "score_arguments": scores, "score_form": options.score_form}
    return FeatureNetwork(partial(_call_script, module, features, scores), options.score_form, Preprocessing(),
                          settings, device)


def _call_script(module: torch.jit.ScriptModule, features: dict[str, bool], scores: dict[str, bool] | None,
                 batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = module(batch, **features)
    if isinstance(found, (tuple, list)) and len(found) == 2 and scores is None:
        return found[0], found[1]
    return found, None if scores is None else module(batch, **scores)


def _arguments(option: str, text: str) -> dict[str, bool]:
    """Names and truth values of a text like a=true,b=false."""
    values = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if not name.isidentifier() or value not in ("true", "false"):
            raise ConfigError(f"{option} holds {part!r}, but must be like return_features=true,resize=false")
        values[name] = value == "true"
    return values


def _torchvision(name: str, options: argparse.Namespace, device: torch.device) -> FeatureNetwork:
    if options.feature_arguments or options.score_arguments is not None:
        raise ConfigError("--feature-arguments and --score-arguments belong to a TorchScript file; a torchvision "
                          "network gives the input of --feature-layer and its class scores")
    try:
        from torchvision.models import get_model, get_model_weights
    except ImportError as error:
        raise UserError(f"--features {TORCHVISION}{name} needs torchvision ({error}); "
                        "pip install \"grn-scale[torchvision]\"") from error
    except RuntimeError as error:  # what a build for another torch raises on import
        raise UserError(f"this torchvision was built for another torch than {torch.__version__} ({error}); install the "
                        "one of the same release and the same index (CPU or CUDA)") from error
    try:
        weights = get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"--features: torchvision has no network {name!r} with weights of its own") from error
    own = options.feature_weights == "default"
    # Inception and GoogLeNet spend a minute on initial values that are overwritten unless told not to, and scale their
    # input for the weights they were published with only where torchvision itself loads these.
    special = {"init_weights": False, "transform_input": True} if name in SCALE_INPUT and not own else {}
    module = get_model(name, weights=weights if own else None, **special)
    if not own:
        _fill(module, Path(options.feature_weights))
    module = module.eval().requires_grad_(False).to(device)
    layer = options.feature_layer or _last_linear(module, name)
    if layer not in dict(module.named_modules()):
        raise ConfigError(f"--feature-layer: {name} has no module {layer!r}; its last are "
                          f"{', '.join([key for key, _ in module.named_modules()][-5:])}")
    tuned = weights.transforms()
    size = tuple(tuned.crop_size) * (2 if len(tuned.crop_size) == 1 else 1)
    preprocessing = Preprocessing(resize=size, resize_mode=tuned.interpolation.value, value_range="0..1",
                                  mean=tuple(tuned.mean), std=tuple(tuned.std))
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    settings = {"network": f"{TORCHVISION}{name}", "fingerprint": digest.hexdigest(), "feature_layer": layer,
                "weights": str(weights) if own else Path(options.feature_weights).name,
                "score_form": options.score_form}
    if name in SCALE_INPUT:
        settings["transform_input"] = module.transform_input
    return FeatureNetwork(partial(_call_module, module, layer), options.score_form, preprocessing, settings, device)


def _call_module(module: torch.nn.Module, layer: str,
                 batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    seen: list[torch.Tensor] = []
    hook = module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        scores = module(batch)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise UserError(f"--feature-layer {layer} ran {len(seen)} times for one batch: name a module that runs once")
    return seen[0], scores


def _last_linear(module: torch.nn.Module, name: str) -> str:
    linear = [key for key, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        raise ConfigError(f"{name} has no Linear to take the features before: give --feature-layer NAME")
    return linear[-1]


def _fill(module: torch.nn.Module, file: Path) -> None:
    """Load weights into the module; UserError where the file cannot be read or holds others than the module's."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except Exception as error:  # torch.load names no classes for what a damaged file may raise; told with its reason
        reason = str(error).strip().splitlines()
        raise UserError(f"--feature-weights: cannot load {file}: {' '.join(reason[:6]) or type(error).__name__}"
                        ) from error
