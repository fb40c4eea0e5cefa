"""tokenize on real files, through its command line."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from grn_scale.data.dataset import Dataset
from grn_scale.data.manifest import ManifestError
from grn_scale.data_pipeline import tokenize_clips, verify
from grn_scale.errors import ConfigError, DoNotRequeue, UserError
from grn_scale.hbq import unpack_bits
from tests.helpers.clips import caption, write_clip, write_tokenizer
from tests.helpers.tokenize_setup import CLIPS, captions_of, content, stamps


def test_every_clip_gives_the_bits_of_its_frames_and_the_states_of_its_captions(prepared, made):
    from grn_scale.data.decode import read_clip
    from grn_scale.hbq import quantize_bits, to_token_major
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.text import load_text_encoder, tagged_caption

    dataset = Dataset.open(made)
    assert dataset.info.samples == CLIPS and dataset.shard_sizes == [3, 3, 2]
    model, encoder = load_tokenizer(prepared.tokenizer), load_text_encoder(prepared.encoder, 32)
    found = []
    for number in range(CLIPS):
        row = dataset.locate(number)
        about = json.loads(_member(made / f"video-{row.shard:06d}.tar", f"{row.key}.json"))
        clip = int(Path(about["id"]).stem)
        found.append(clip)
        height, width = about["bucket"]["height"], about["bucket"]["width"]
        assert row.thw == (3, height // 16, width // 16) and row.ratio_key == (0.5 if clip % 3 == 2 else 1.0)
        frames = read_clip(prepared.root / f"clips/{clip}.mp4", fps=16, max_frames=9, height=height, width=width)
        video = torch.from_numpy(frames).movedim(-1, 0)[None].float() / 127.5 - 1
        with torch.inference_mode():
            wanted = to_token_major(quantize_bits(model.encode(video), 4))[0]
        bits = unpack_bits(dataset.read_bits(row), (*row.thw, 16))
        assert (bits != wanted).float().mean() < 0.01  # a feature at a boundary may fall to either side
        (entry,) = row.captions
        assert set(entry.texts) == {"T2V", "I2V"}
        for task, ref in entry.texts.items():
            state = encoder.encode([tagged_caption(caption(clip), task, True)])[0]
            assert ref.tokens == len(state)
            torch.testing.assert_close(dataset.read_text(ref), state, rtol=0.02, atol=0.02)
    assert sorted(found) == list(range(CLIPS))
    empty = dataset.info.empty_text
    assert empty.tokens == 1 and torch.equal(dataset.read_text(empty), encoder.encode([""])[0])
    assert dataset.info.tokens == sum(np.prod(dataset.locate(i).thw) for i in range(CLIPS))
    status = json.loads((made / "status.json").read_text())
    assert status["state"] == "done" and status["clips"] == CLIPS and status["frames"] == 9 * CLIPS
    assert status["lines"] == status["lines_in_all"] == CLIPS and status["bottleneck"] in status["occupancy"]
    assert {"decode", "decode_wait", "encode", "write"} <= status["seconds"].keys()
    about = json.loads(_member(made / "video-000000.tar", f"{dataset.locate(0).key}.json"))
    assert about["source"]["codec"] == "h264" and about["source"]["rate_kind"] == "constant"


def _member(tar: Path, name: str) -> bytes:
    import tarfile

    with tarfile.open(tar) as opened:
        return opened.extractfile(name).read()


def test_two_runs_are_byte_identical_also_with_more_workers_and_decoders(prepared, made, capsys):
    again = prepared.run("again", **{"tokenize.decode_processes": 2, "tokenize.workers": 2})
    assert content(again) == content(made)
    assert {path.name.rpartition("-")[2] for path in (again / "workers").iterdir()} == {"0.json", "1.json"}


def test_a_second_run_makes_nothing_and_changes_nothing(prepared, made, capsys):
    before, tars = content(made), stamps(made, "*.tar")
    assert tokenize_clips.main([*prepared.arguments("made"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert content(made) == before and stamps(made, "*.tar") == tars
    assert summary["clips"] == 0 and summary["kept_chunks"] == 3


def test_a_task_that_starts_on_a_finished_job_ends_at_once_unless_a_file_is_gone(prepared, copied, monkeypatch):
    def work(*args):
        raise RuntimeError("at work")

    monkeypatch.setattr(tokenize_clips, "run_workers", work)
    before = {path: path.stat().st_mtime_ns for path in [*copied.glob("[!m]*.json*"), *copied.glob("*/*")]}
    prepared.run(str(copied))
    assert {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp} == set()
    (copied / "text-000001.tar").unlink()
    with pytest.raises(RuntimeError, match="at work"):
        prepared.run(str(copied))


def test_a_new_caption_makes_a_text_shard_and_the_former_state_stays_readable(prepared, copied):
    tars, before = stamps(copied, "*.tar"), Dataset.open(copied)
    old = captions_of(copied)
    lines = [dict(line) for line in prepared.lines]
    lines[4]["caption"] = "another caption"
    prepared.run(str(copied), lines)
    after = stamps(copied, "*.tar")
    assert tars.items() <= after.items()
    (new_shard,) = after.keys() - tars.keys()
    assert new_shard.startswith("text-000001-")
    new = captions_of(copied)
    assert new.keys() == old.keys() and sum(new[key] != old[key] for key in old) == 1
    assert not list(verify.find_damage(copied))
    former = Dataset.open(copied, before.snapshot)
    assert [former.locate(i) for i in range(CLIPS)] == [before.locate(i) for i in range(CLIPS)]
    for row in former.rows(1):
        former.read_text(row.captions[0].texts["T2V"])


def test_a_grown_manifest_leaves_finished_shards_alone(prepared, copied):
    write_clip(prepared.root / "clips/more.mp4", 11)
    tars, before = stamps(copied, "*.tar"), Dataset.open(copied).snapshot
    lines = [*prepared.lines, {"path": "clips/more.mp4", "caption": "more"}, {"path": "clips/0.mp4", "caption": "zero"}]
    prepared.run(str(copied), lines)
    after = stamps(copied, "*.tar")
    assert tars.items() <= after.items()
    # The last chunk grew; the new one holds only another caption of a clip in the first, and leaves the index.
    assert sorted(name[:12].rstrip(".t-") for name in after.keys() - tars.keys()) == [
        "text-000002", "text-000003", "video-000002", "video-000003"]
    dataset = Dataset.open(copied)
    assert dataset.shard_sizes == [3, 3, 3]
    assert sorted(len(keys) for keys in captions_of(copied).values()) == [1] * 8 + [2]
    assert not list(verify.find_damage(copied))
    assert Dataset.open(copied, before).shard_sizes == [3, 3, 2]


def test_a_clip_that_stands_twice_is_stored_once_with_all_its_captions(prepared):
    shutil.copy(prepared.root / "clips/0.mp4", prepared.root / "clips/copy.mp4")
    lines = [{"path": "clips/0.mp4", "caption": "first"}, {"path": "clips/copy.mp4", "caption": "second"},
             {"path": "clips/1.mp4",
              "caption": [{"type": "short", "content": "one"}, {"type": "long", "content": "1"}]},
             {"path": "clips/0.mp4", "caption": "first"}, {"path": "clips/0.mp4", "caption": "third"},
             {"path": "clips/0.mp4", "caption": "part", "begin_frame": 0, "end_frame": 8}]
    output = prepared.run("twice", lines)
    dataset = Dataset.open(output)
    assert dataset.info.samples == 3
    rows = [dataset.locate(i) for i in range(3)]
    assert sorted(tuple(c.type for c in row.captions) for row in rows) == [("",), ("", "", ""), ("short", "long")]
    assert sorted(row.thw[0] for row in rows) == [2, 3, 3]
    assert not list(verify.find_damage(output))


def test_an_image_has_the_image_tag_only_and_a_class_needs_no_caption(prepared):
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 30, 30)).save(prepared.root / "clips/red.png")
    lines = [{"path": "clips/red.png", "caption": "red"}, {"path": "clips/1.mp4", "class_id": 7}]
    dataset = Dataset.open(prepared.run("images", lines))
    image, video = sorted((dataset.locate(i) for i in range(2)), key=lambda row: row.thw)
    assert image.thw == (1, 2, 2) and set(image.captions[0].texts) == {"T2I"} and image.class_id is None
    assert video.captions == () and video.class_id == 7


def test_without_task_tags_all_tasks_share_one_text(prepared):
    dataset = Dataset.open(prepared.run("untagged", prepared.lines[:2], **{"model.task_tags": "false"}))
    for row in dataset.rows(0):
        assert len({ref.key for ref in row.captions[0].texts.values()}) == 1
    assert not dataset.info.task_tags and sum(s.samples for s in dataset.info.text_shards) == 3


def broken_lines(prepared) -> list[dict]:
    whole = (prepared.root / "clips/3.mp4").read_bytes()
    (prepared.root / "clips/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (prepared.root / "clips/noise.mp4").write_bytes(b"no video at all" * 50)
    return [prepared.lines[0], {"path": "clips/absent.mp4", "caption": "a"},
            {"path": "clips/noise.mp4", "caption": "b"},
            {"path": "clips/noise.mp4", "caption": "b again"}, {"path": "clips/cut.mp4", "caption": "c"},
            {"path": "clips/1.mp4", "caption": "&nbsp;"}, prepared.lines[2]]


def test_bad_clips_are_quarantined_with_their_reason_and_the_job_goes_on(prepared, capsys):
    output = prepared.root / "bad"
    arguments = prepared.arguments("bad", broken_lines(prepared), **{"tokenize.max_bad_fraction": 0.8})
    assert tokenize_clips.main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 2 and summary["duplicate_lines"] == 0
    entries = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [2, 3, 4, 5, 6]
    reasons = [entry["reason"] for entry in entries]
    assert reasons[0] == "missing" and reasons[1] == reasons[2] == "unreadable" and reasons[4] == "empty_caption"
    assert reasons[3] in ("truncated", "unreadable", "corrupt")
    assert sum(summary["quarantined"].values()) == 5
    assert Dataset.open(output).info.samples == 2 and not list(verify.find_damage(output))
    # A second run knows them without decoding again.
    assert tokenize_clips.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quarantined"] == summary["quarantined"]


def test_clips_that_failed_are_tried_again_on_request_only(prepared):
    hurried = {"tokenize.decode_timeout_seconds": 0.001, "tokenize.max_bad_fraction": 1}
    for _ in range(2):
        with pytest.raises(UserError, match="no line of .* gives a sample"):
            prepared.run("hurried", prepared.lines[:3], **hurried)
        hurried.pop("tokenize.decode_timeout_seconds", None)  # has no effect on clips that failed already
    assert '"timeout"' in (prepared.root / "hurried/quarantine.jsonl").read_text()
    arguments = prepared.arguments("hurried", prepared.lines[:3])
    assert tokenize_clips.main([*arguments, "--retry-quarantined"]) == 0
    assert Dataset.open(prepared.root / "hurried").info.samples == 3


def test_a_file_that_was_not_there_is_taken_in_by_the_next_run(prepared, made, monkeypatch):
    hidden = (prepared.root / "clips/4.mp4").rename(prepared.root / "aside.mp4")
    try:
        output = prepared.run("hidden", **{"tokenize.max_bad_fraction": 0.5})
        assert Dataset.open(output).info.samples == CLIPS - 1
        first = stamps(output, "*.tar")
        with monkeypatch.context() as patched:  # no worker looks where nothing has come back
            patched.setattr(tokenize_clips, "run_workers", None)
            prepared.run("hidden", **{"tokenize.max_bad_fraction": 0.5})
        assert stamps(output, "*.tar") == first
    finally:
        hidden.rename(prepared.root / "clips/4.mp4")
    prepared.run("hidden", **{"tokenize.max_bad_fraction": 0.5})
    assert Dataset.open(output).info.samples == CLIPS and not (output / "quarantine.jsonl").read_text()
    assert captions_of(output) == captions_of(made)
    assert first.items() <= stamps(output, "*.tar").items()


def test_too_many_bad_clips_stop_the_job_for_good(prepared):
    output = prepared.root / "too-bad"
    with pytest.raises(DoNotRequeue, match="max_bad_fraction") as caught:
        prepared.run("too-bad", broken_lines(prepared), **{"tokenize.max_bad_fraction": 0.3})
    assert caught.value.exit_code == 78
    # Which chunks come before the one that is too much is not settled.
    assert "empty_caption" in (output / "quarantine.jsonl").read_text()
    assert not (output / "dataset.json").exists() and not list(output.glob("*.partial"))


def test_a_run_that_fails_before_it_replaces_anything_leaves_the_finished_dataset(prepared, copied):
    before = content(copied)
    with pytest.raises(DoNotRequeue):
        prepared.run(str(copied), [*prepared.lines, {"path": "clips/absent.mp4", "caption": "absent"}])
    after = content(copied)
    assert all(after[name] == data for name, data in before.items()
               if not name.startswith(("sources", "quarantine", "generation", "finished")))
    assert not list(verify.find_damage(copied))


def test_all_clips_bad_is_an_error_even_where_that_is_allowed(prepared):
    with pytest.raises(UserError, match="no line of .* gives a sample"):
        prepared.run("all-bad", broken_lines(prepared)[1:4], **{"tokenize.max_bad_fraction": 1})


def test_a_foreign_output_and_other_settings_are_refused(prepared, made, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not made by `grn-scale tokenize`"):
        prepared.run(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="is a file"):
        prepared.run(str(tmp_path / "mine.txt"))
    before = content(made)
    with pytest.raises(UserError, match="latent_side 2 -> 4"):
        prepared.run("made", **{"tokenize.latent_side": 4})
    with pytest.raises(UserError, match="tokenizer .* -> "):
        prepared.run("made", **{"tokenizer.path": write_tokenizer(tmp_path / "other.safetensors", seed=1)})
    assert content(made) == before


@pytest.mark.parametrize("changes, message", [
    ({"model.latent_channels": 16}, "set model.latent_channels=4"),
    ({"model.text_hidden_size": 4096}, "set model.text_hidden_size=64"),
    ({"output": ""}, "output"),
    ({"text.encoder": ""}, "text.encoder"),
])
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(prepared, changes, message):
    with pytest.raises(ConfigError, match=message):
        tokenize_clips.main([*prepared.arguments("nothing"), *(f"{key}={value}" for key, value in changes.items())])
    assert not (prepared.root / "nothing").exists()


def test_bad_lines_are_quarantined_and_count_like_bad_clips(prepared):
    lines = [prepared.lines[0], {"path": "clips/1.mp4"}, {"caption": "no path"}, prepared.lines[3]]
    with pytest.raises(DoNotRequeue, match="2 of the manifest's 4 lines"):
        prepared.run("lines", lines)
    entries = [json.loads(line) for line in (prepared.root / "lines/quarantine.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(2, "no_caption"), (3, "no_path")]
    assert Dataset.open(prepared.run("lines", lines, **{"tokenize.max_bad_fraction": 0.5})).info.samples == 2


def test_clips_without_caption_are_kept_where_that_is_allowed(prepared):
    lines = [prepared.lines[0], {"path": "clips/1.mp4"}]
    output = prepared.run("uncaptioned", lines, **{"tokenize.allow_empty_captions": "true"})
    assert sorted(len(row.captions) for row in Dataset.open(output).rows(0)) == [0, 1]


def test_a_manifest_that_cannot_be_read_is_refused_before_anything_is_written(prepared):
    arguments = prepared.arguments("nothing")
    (prepared.root / "clips.jsonl").write_text("\n\n")
    with pytest.raises(ManifestError, match="no clip"):
        tokenize_clips.main(arguments)
    assert not (prepared.root / "nothing").exists()


def test_flipped_clips_and_members_of_tars_are_samples(prepared):
    import tarfile

    with tarfile.open(prepared.root / "clips/some.tar", "w") as tar:
        tar.add(prepared.root / "clips/2.mp4", "inside.mp4")
    lines = [prepared.lines[2], {**prepared.lines[2], "flip": True},
             {"path": "clips/some.tar/inside.mp4", "caption": "in a tar"}]
    dataset = Dataset.open(prepared.run("flipped", lines))
    assert dataset.info.samples == 2  # the member has the content of the file
    plain, flipped = (unpack_bits(dataset.read_bits(row), (*row.thw, 16)) for row in dataset.rows(0))
    assert plain.shape == flipped.shape and not torch.equal(plain, flipped)
    assert sorted(len(row.captions) for row in dataset.rows(0)) == [1, 2]


@pytest.mark.parametrize("states, other", [("none", "none"), ("int8", "int8")])
def test_text_states_may_be_left_out_or_made_small(prepared, made, states, other):
    dataset = Dataset.open(prepared.run(f"states-{states}", **{"text.states": states}))
    assert dataset.info.text_states == other
    ref = dataset.locate(0).captions[0].texts["T2V"]
    if states == "none":
        whole = Dataset.open(made)
        assert dataset.read_text_ids(ref) == whole.read_text_ids(whole.locate(0).captions[0].texts["T2V"])
    else:
        state = dataset.read_text(ref).float()
        wanted = Dataset.open(made).read_text(Dataset.open(made).locate(0).captions[0].texts["T2V"]).float()
        assert (state - wanted).norm() < 0.02 * wanted.norm()


def test_shards_go_to_object_storage_and_are_read_from_there(prepared, made, tmp_path):
    import fsspec

    url = f"memory://{tmp_path.name}/tokens"
    arguments = [argument for argument in prepared.arguments("unused") if not argument.startswith("output=")]
    assert tokenize_clips.main([*arguments, f"output={url}"]) == 0
    files = fsspec.filesystem("memory")
    for name, data in content(made).items():
        if name.endswith((".tar", ".parquet")) or name == "dataset.json":
            assert files.cat_file(f"/{tmp_path.name}/tokens/{name}") == data
    remote, local = Dataset.open(url), Dataset.open(made)
    row = local.locate(4)
    assert remote.locate(4) == row and (remote.read_bits(row) == local.read_bits(row)).all()


_open = open


def test_a_full_disk_stops_with_one_message_and_the_next_run_goes_on(prepared, made, monkeypatch):
    output = prepared.run("full", prepared.lines[:3])
    with monkeypatch.context() as patched, pytest.raises(UserError, match="video-000001.tar: no space left"):
        # The second shard is opened as /dev/full, where every write fails with ENOSPC.
        patched.setattr(builtins, "open", lambda file, *args, **named: _open(
            "/dev/full" if "video-000001.tar" in str(file) else file, *args, **named))
        prepared.run("full")
    assert not (output / "video-000001.tar").exists() and not list(output.glob("*.partial"))
    prepared.run("full")
    assert content(made).items() <= content(output).items()  # and the state that had one shard
