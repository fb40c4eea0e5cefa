"""Damaged and hostile files: one clear error, nothing is run, nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grn_scale.cli import main
from grn_scale.convert import torch_file
from grn_scale.errors import UserError
from tests.unit.test_convert import state_of

GOOD = b"\x80\x02}."
"""A pickle of an empty dict."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(source: str, capsys, form: str = "official") -> str:
    """The message, after checking that the file was refused and left no trace."""
    before = sorted(Path().rglob("*"))
    assert main(["convert", "--input", source, "--from", form, "--to", "native", "--output", "out",
                 "--layout", "v1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert main(["inspect", source]) == 1
    capsys.readouterr()
    assert sorted(Path().rglob("*")) == before
    return message


def archive(path: str, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in records.items():
            file.writestr(name, data)
    return path


def torch_archive(path: str, data: bytes, **records: bytes) -> str:
    return archive(path, {"a/data.pkl": data, "a/version": b"3\n", "a/byteorder": b"little", **records})


def resaved(source: str, target: str, **changed: bytes) -> str:
    """A torch file with some records replaced (named by their last part), as if stored so."""
    with zipfile.ZipFile(source) as file:
        records = {name: file.read(name) for name in file.namelist() if ".format_version" not in name}
    return archive(target, {name: changed.get(name.rpartition("/")[2], data) for name, data in records.items()})


class Runs:
    """Pickles as a call that leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("run-by-the-file",)


class Exits:
    def __reduce__(self):
        return eval, ("1 / 0",)


class Allocates:
    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("bad", [Runs(), Exits(), Allocates()])
def test_a_pickle_that_would_run_code_is_refused_by_name(bad, capsys):
    torch.save({**state_of("bit_hd28"), "x": bad}, "bad.pth")
    message = refused("bad.pth", capsys)
    assert "could run code" in message
    assert not Path("run-by-the-file").exists()


def test_allowed_globals_called_in_a_wrong_way_run_nothing(capsys):
    torch_archive("bad.pth", b"\x80\x02cargparse\nNamespace\n(Vx\nVy\ntR.")
    refused("bad.pth", capsys)
    torch_archive("bad2.pth", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(Vx\nVy\ntR.")
    refused("bad2.pth", capsys)


@pytest.mark.parametrize("keep", [0, 3, 30, 1000, 0.5, 0.9, 0.999])
def test_a_truncated_torch_file_is_refused(keep, capsys):
    torch.save(state_of("bit_hd28"), "whole.pth")
    data = Path("whole.pth").read_bytes()
    Path("cut.pth").write_bytes(data[:int(keep * len(data)) if keep < 1 else keep])
    refused("cut.pth", capsys)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(keep, capsys):
    save_file(state_of("bit_hd28"), "whole.safetensors")
    data = Path("whole.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:int(keep * len(data)) if keep < 1 else keep])
    refused("cut.safetensors", capsys)


def test_a_compressed_record_is_refused_before_it_is_unpacked(capsys):
    archive("bomb.pth", {"a/data.pkl": b"\0" * 50_000_000}, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused("bomb.pth", capsys)


def test_a_pickle_of_unreasonable_size_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch_file, "LARGEST_PICKLE_BYTES", 1000)
    torch.save(state_of("bit_hd28"), "big.pth")
    assert "only names and shapes" in refused("big.pth", capsys)


def test_two_records_of_one_name_are_refused(capsys):
    with pytest.warns(UserWarning), zipfile.ZipFile("twice.pth", "w") as file:
        file.writestr("a/data.pkl", GOOD)
        file.writestr("a/data.pkl", GOOD)
    refused("twice.pth", capsys)
    archive("case.pth", {"a/data.pkl": GOOD, "a/DATA.pkl": GOOD})
    refused("case.pth", capsys)


def test_a_tensor_that_claims_more_than_is_stored_is_refused(capsys):
    torch.save(state_of("bit_hd28"), "whole.pth")
    resaved("whole.pth", "short.pth", **{"0": b"1234"})
    assert "reaches out of the bytes" in refused("short.pth", capsys)
    state = state_of("bit_hd28")
    state["head.norm.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, "expanded.pth")
    assert "head.norm.weight reaches out" in refused("expanded.pth", capsys)


def test_a_flipped_bit_in_a_tensor_is_found(capsys):
    torch.save(state_of("bit_hd28"), "GRN_T2I_2B.pth")
    data = bytearray(Path("GRN_T2I_2B.pth").read_bytes())
    data[data.index(state_of("bit_hd28")["text_proj.weight"].numpy().tobytes()) + 100] ^= 1
    Path("GRN_T2I_2B.pth").write_bytes(data)
    Path("m.yaml").write_text("{latent_channels: 8, rounds: 4}")
    for target in ("native", "hf", "official"):
        assert main(["convert", "--input", "GRN_T2I_2B.pth", "--from", "official", "--to", target, "--output", "out",
                     "--model", "m.yaml"]) == 1
        assert "checksum" in capsys.readouterr().err
        assert not list(Path().glob("out*"))
    assert main(["inspect", "GRN_T2I_2B.pth"]) == 1


def test_a_foreign_byte_order_is_refused(capsys):
    torch.save(state_of("bit_hd28"), "whole.pth")
    assert "big-endian" in refused(resaved("whole.pth", "big.pth", byteorder=b"big"), capsys)


@pytest.mark.parametrize("content", [[1, 2], "text", torch.zeros(3), {}, {"a": 1}, {1: torch.zeros(2)},
                                     {"trainer": {}}, {"trainer": {"gpt_fsdp": 3}}, {"vae": {"a": "b"}},
                                     {"word_embed.weight": torch.zeros(2, dtype=torch.complex64)}])
def test_a_torch_file_that_holds_something_else_is_refused(content, capsys):
    torch.save(content, "other.pth")
    refused("other.pth", capsys)


def test_old_torch_files_and_other_archives_are_refused(capsys):
    torch.save(state_of("bit_hd28"), "old.pth", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refused("old.pth", capsys)
    archive("plain.pth", {"readme.txt": b"hello"})
    assert "not one that torch.save writes" in refused("plain.pth", capsys)
    Path("pickle.pth").write_bytes(pickle.dumps({"a": 1}))
    refused("pickle.pth", capsys)
    refused("absent.pth", capsys)


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 1 << 62) + b"{}",
    struct.pack("<Q", 20_000_000) + b" " * 100,
    header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
    header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
    header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"1234"),
    header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
    header({"a": 3}), header([]), header({}),
    struct.pack("<Q", 8) + b"\xff" * 8,
    struct.pack("<Q", 100_000) + b"[" * 100_000,
    struct.pack("<Q", 14) + b'{"a":1,"a":2} ',
])
def test_a_malformed_safetensors_header_is_refused(content, capsys):
    Path("bad.safetensors").write_bytes(content)
    refused("bad.safetensors", capsys)


@pytest.mark.parametrize("index", [
    {"weight_map": {"a": "../../secret.safetensors"}}, {"weight_map": {"a": "/etc/x.safetensors"}},
    {"weight_map": {"a": "absent.safetensors"}}, {"weight_map": {"b": "part.safetensors"}}, {"weight_map": {}},
    {"weight_map": {"a": 3}}, {"weight_map": [1]}, {}, [], "x"])
def test_a_malformed_index_is_refused(index, capsys):
    Path("hf").mkdir()
    save_file({"a": torch.zeros(2)}, "hf/part.safetensors")
    Path("hf/model.safetensors.index.json").write_text(json.dumps(index))
    refused("hf", capsys, "hf")


def test_an_index_of_unreasonable_size_is_not_parsed(capsys):
    Path("hf").mkdir()
    with open("hf/model.safetensors.index.json", "wb") as file:
        file.truncate(1 << 34)
    assert "not read" in refused("hf", capsys, "hf")


def test_a_damaged_checkpoint_is_refused(capsys):
    torch.save(state_of("bit_hd28"), "GRN_T2I_2B.pth")
    Path("m.yaml").write_text("{latent_channels: 8, rounds: 4}")
    assert main(["convert", "--input", "GRN_T2I_2B.pth", "--from", "official", "--to", "native", "--output", "run",
                 "--model", "m.yaml"]) == 0
    data = Path("run/step-00000000/model/rank-00000.safetensors")
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    assert "checksum" in refused("run", capsys, "native")


def test_shapes_that_no_tokenizer_has_are_refused(capsys):
    names = ["encoder.conv1.weight", "encoder.downsamples.0.downsamples.0.residual.2.weight", "conv2.weight",
             "decoder.head.0.gamma"]
    for shape in ((), (0,), (3, 0), (7, 5)):
        torch.save({name: torch.zeros(shape) for name in names}, "tok.ckpt")
        assert main(["convert", "--input", "tok.ckpt", "--from", "official", "--to", "native", "--output", "out"]) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_an_encrypted_record_is_refused_in_one_message(tmp_path):
    path = tmp_path / "locked.pth"
    torch.save({"word_embed.weight": torch.zeros(2)}, path)
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # each record's own header, and the directory's
        start = data.find(mark)
        while start >= 0:
            data[start + flags] |= 1
            start = data.find(mark, start + 4)
    path.write_bytes(data)
    with pytest.raises(UserError, match="locked.pth is truncated or damaged"):
        torch_file.open_torch_file(path)
