"""What weights are, as plain values: their tensors and fingerprint, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grn_scale.checkpoint.index import DTYPE_NAMES
from grn_scale.checkpoint.stored import StoredWeights
from grn_scale.config.load import to_dict
from grn_scale.convert.contents import Contents
from grn_scale.tokenizer.load import fingerprint

BLOCK = 1 << 22
"""Elements that are compared at a time."""


def describe(contents: Contents) -> dict[str, Any]:
    """JSON values: path, form, kind, step, model (the configuration that travels with the weights), and for each set of
    weights its tensors, parameters, bytes, dtypes and fingerprint. Reads every tensor once."""
    return {
        "path": str(contents.path), "form": contents.form, "kind": contents.kind, "step": contents.step,
        "model": None if contents.config is None else to_dict(contents.config),
        "weights": {name: _describe(weights) for name, weights in contents.sets.items()}}


def _describe(weights: StoredWeights) -> dict[str, Any]:
    values = weights.values_by_name
    parameters: dict[str, int] = {}
    for value in values.values():
        dtype = DTYPE_NAMES[value.dtype]
        parameters[dtype] = parameters.get(dtype, 0) + value.parameters
    return {
        "fingerprint": fingerprint(weights), "parameters": weights.parameters, "bytes": weights.bytes,
        "dtypes": parameters,
        "tensors": {name: {"dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape)}
                    for name, value in values.items()}}


def differences(a: Contents, b: Contents) -> dict[str, Any]:
    """JSON values: `identical`, and for each pair of sets of weights what `compare` gives.

    Sets of one name are compared; where one side holds a single set, that one with each of the other side.
    """
    if len(a.sets) == 1 or len(b.sets) == 1:
        pairs = [(x, y) for x in a.sets for y in b.sets]
    else:
        pairs = [(name, name) for name in a.sets if name in b.sets]
    compared = {x if x == y else f"{x} - {y}": compare(a.sets[x], b.sets[y]) for x, y in pairs}
    return {
        "a": str(a.path), "b": str(b.path), "kinds": [a.kind, b.kind], "steps": [a.step, b.step],
        "identical": list(a.sets) == list(b.sets) and not any(map(_any_difference, compared.values())),
        "weights": compared}


def compare(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """only_a, only_b: names; shapes, dtypes: name -> both; values: name -> largest absolute difference (null where a
    value is NaN on one side only), of tensors whose shapes agree; equal: how many tensors agree in all."""
    found: dict[str, Any] = {
        "only_a": sorted(a.keys() - b.keys()), "only_b": sorted(b.keys() - a.keys()),
        "shapes": {}, "dtypes": {}, "values": {}, "equal": 0}
    for name in sorted(a.keys() & b.keys()):
        x, y = a[name], b[name]
        if x.shape != y.shape:
            found["shapes"][name] = [list(x.shape), list(y.shape)]
            continue
        if x.dtype != y.dtype:
            found["dtypes"][name] = [DTYPE_NAMES[x.dtype], DTYPE_NAMES[y.dtype]]
        if x.dtype == y.dtype and _same_bytes(x, y):
            found["equal"] += 1
            continue
        largest = _largest_difference(x, y)
        if x.dtype == y.dtype or largest != 0:
            found["values"][name] = largest
    return found


def _any_difference(compared: Mapping[str, Any]) -> bool:
    return any(compared[part] for part in ("only_a", "only_b", "shapes", "dtypes", "values"))


def _same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    x, y = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (x, y))
    return all(torch.equal(a, b) for a, b in zip(x.split(BLOCK), y.split(BLOCK)))


def _largest_difference(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Over all elements, in fp64; equal infinities and NaN in both count 0. None where NaN stands in one."""
    largest = 0.0
    for a, b in zip(x.reshape(-1).split(BLOCK), y.reshape(-1).split(BLOCK)):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        distance = torch.where(same, 0.0, (a - b).abs())
        if bool(distance.isnan().any()):
            return None
        largest = max(largest, float(distance.max()) if distance.numel() else 0.0)
    return largest
