"""tokenize into a bucket of a server that speaks S3."""

from __future__ import annotations

import json
import logging

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import tokenize_clips, verify
from grn_scale.storage import Storage
from tests.helpers.s3_server import s3_server
from tests.helpers.tokenize_setup import content

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


def test_a_bucket_gets_the_bytes_of_a_local_run_and_a_second_run_finds_them(prepared, made, capsys):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request
    with s3_server() as bucket:
        url = f"{bucket}/tokens"
        arguments = [argument for argument in prepared.arguments("unused") if not argument.startswith("output=")]
        assert tokenize_clips.main([*arguments, f"output={url}"]) == 0
        storage = Storage.of(url)
        for name, data in content(made).items():
            if name.endswith((".tar", ".parquet")) or name in ("dataset.json", "quarantine.jsonl"):
                assert storage.read(name) == data
        assert len(storage.names("workers/")) == 1 and storage.names("leases/") == []
        assert not list(verify.find_damage(storage))
        remote, local = Dataset.open(url), Dataset.open(made)
        for number in range(local.info.samples):
            row = local.locate(number)
            assert remote.locate(number) == row and (remote.read_bits(row) == local.read_bits(row)).all()
        capsys.readouterr()
        assert tokenize_clips.main([*arguments, f"output={url}", "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["clips"] == 0 and summary["kept_chunks"] == 3
