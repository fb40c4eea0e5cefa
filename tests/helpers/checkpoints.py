"""Small named tensors that the checkpoint tests save and load."""

import json
import os
import pickletools
import sys
import traceback

import pytest
import torch

from grn_scale.checkpoint.chunks import whole


def weights(fill=0.0):
    return {"blocks.0.weight": torch.arange(30.0).reshape(6, 5) + fill,
            "blocks.0.bias": (torch.arange(6.0) + fill).bfloat16(),
            "word_embed.weight": torch.arange(24.0).reshape(2, 3, 4).bfloat16() - fill,
            "scale": torch.tensor(0.5 + fill)}


def chunks(tensors):
    return [whole(name, tensor) for name, tensor in tensors.items()]


def empty_like(tensors):
    return {name: torch.full_like(tensor, -7) for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def no_pickle_in(folder):
    """Fail unless each file below the folder is JSON, or safetensors with nothing besides header and tensors."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"COMPLETE", "metadata.json", "state.json"}
    for file in files:
        data = file.read_bytes()
        assert not data.startswith((b"PK", *(b"\x80" + bytes([version]) for version in range(2, 6)))), file
        if file.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            data = data[8:8 + length]
            header = json.loads(data)
            assert 8 + length + max(entry["data_offsets"][1] for entry in header.values()) == file.stat().st_size
        else:
            assert file.suffix == ".json" or file.name == "COMPLETE", file
        json.loads(data)
        with pytest.raises(ValueError):
            list(pickletools.genops(data))


def in_child(action):
    """Exit status of a forked child that runs `action`."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # threads of the parent do not live in the child: waiting for them would hang
        try:
            action()
        except BaseException:  # a child of the test must not return into pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def at_event(wanted, part, action):
    """Run `action` the first time that this process is about to do `wanted` (an audit event) to a path with `part`."""
    done = []

    def hook(event, arguments):
        if event == wanted and not done and part in str(arguments[0]):
            done.append(event)
            action()

    sys.addaudithook(hook)
