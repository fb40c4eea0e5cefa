"""`grn-scale train`: the one place that composes a training run.

    torchrun --nproc-per-node 2 -m grn_scale train --config configs/runs/demo.yaml data.dataset=tokens/ output=runs/a

Start it alone, under torchrun or under srun; the layout follows from parallel.* and the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.atomic import drop_unfinished_line, write_json
from grn_scale.command_line import CommandParser, run, save_config, start_logging
from grn_scale.config.check import check_layout, check_output, check_set, check_training
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config
from grn_scale.errors import EXIT_REQUEUE, ConfigError
from grn_scale.parallel.dims import adopt_srun, world_size_from_environment

if TYPE_CHECKING:
    import torch

    from grn_scale.batch import Pack, Sample
    from grn_scale.checkpoint.origin import Origin
    from grn_scale.class_to_image.batch import ClassBatch
    from grn_scale.data.mixture import Mixture
    from grn_scale.data.plan import Plan
    from grn_scale.data.schema import DatasetInfo
    from grn_scale.model.pack import PackedBatch
    from grn_scale.tokenizer.text import IdsEncoder

SURROUNDINGS = "surroundings.json"
"""In the run folder: hardware and versions of the first process, of the last start."""

log = logging.getLogger("grn_scale.train")


def main(argv: list[str]) -> int:
    adopt_srun()
    config, options = command_parser("auto" if "SLURM_JOB_ID" in os.environ else "none").parse_command(argv)
    start_logging()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node: the others would only say the same
        check_before_start(config, options.resume, world_size_from_environment())
    return 0 if train_run(config, options.resume) else EXIT_REQUEUE


def command_parser(resume: str) -> CommandParser:
    """Parser of the command's arguments; `resume` is what --resume is without it."""
    from grn_scale.config.class_schema import SCHEMAS

    parser = CommandParser("train", "Pretrain a GRN on token shards, on any number of processes. With a model of "
                           "configs/class/ it makes images by class, else video from text.",
                           "grn-scale train --config configs/runs/demo.yaml data.dataset=tokens/ output=runs/first",
                           schema=SCHEMAS)
    parser.add_argument("--resume", default=resume, metavar="none|auto|must|PATH",
                        help="which checkpoint to continue from (default: none, under Slurm auto)")
    return parser


def check_before_start(config: Config, resume: str, world_size: int) -> None:
    """Refuse what cannot run on `world_size` processes, before any process group or model is built."""
    from grn_scale.checkpoint.origin import check_origin
    from grn_scale.data.loader import check_step_size
    from grn_scale.data.mixture import Mixture
    from grn_scale.data.plan import Plan
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.train.metrics import check_wandb
    from grn_scale.train.resuming import goes_on
    from grn_scale.train.rollback import check_rollback

    check_set(config, *([] if config.data.mixture else ["data.dataset"]), "output")
    check_output(config.output)
    check_layout(config, world_size)
    check_rollback(config)
    if config.init.from_ and not goes_on(config.output, resume):
        check_origin(config.init.from_, config.init.weights)
    check_wandb(config.logging)
    mixture = Mixture.open(config.data)
    check_training(config, mixture.info)
    check_step_size(Plan.of(mixture, config.data, config.seed), config.data.packs_per_step)
    check_samples(config, mixture)
    mixture.datasets[0].check_tokenizer(load_tokenizer(config.tokenizer.path).fingerprint)
    if encodes_texts(config, mixture.infos):
        check_text_encoder(config, mixture.infos)


def train_run(config: Config, resume: str) -> bool:
    """Train to config.train.steps, from scratch or from a checkpoint, and leave the run folder behind.

    False where the run was asked to stop before, and wants to be started again.
    """
    import torch

    from grn_scale.checkpoint.background import BackgroundSaver
    from grn_scale.checkpoint.checkpoint import read_state, resolve_resume
    from grn_scale.checkpoint.ranks import Ranks
    from grn_scale.data.ledger import LEDGER
    from grn_scale.data.loader import PackLoader, check_step_size
    from grn_scale.data.packing import Cost
    from grn_scale.data.plan import Plan
    from grn_scale.data.ramp import packs_of_step
    from grn_scale.data.stream import open_plan
    from grn_scale.parallel import groups
    from grn_scale.perf.measure import surroundings
    from grn_scale.planning.hardware import peak_flops
    from grn_scale.slurm.preflight_devices import driver_version
    from grn_scale.train.bad_samples import BadSamples
    from grn_scale.train.checkpoints import reserve_host_memory, restore, restore_before, save_state, start
    from grn_scale.train.job import job
    from grn_scale.train.loop import Run, train
    from grn_scale.train.memory import PeakMemory
    from grn_scale.train.metrics import MetricsLog, past_of_spikes
    from grn_scale.train.probe import Probe
    from grn_scale.train.profiling import StepProfiler
    from grn_scale.train.progress import TrainingProgress
    from grn_scale.train.resuming import check_resume
    from grn_scale.train.rollback import Rollbacks
    from grn_scale.train.spikes import SpikeJudge
    from grn_scale.train.stragglers import Stragglers

    torch.set_num_threads(config.train.threads or threads_per_process())
    with job(config) as (device, heart, stop, errors_told), contextlib.ExitStack() as leaving:
        from grn_scale.parallel.engine import TrainEngine

        folder, first = Path(config.output), torch.distributed.get_rank() == 0
        checkpoint = resolve_resume(resume, folder, groups.host())
        saved = check_resume(checkpoint, config) if checkpoint else None
        plan, data = open_plan(config.data, config.seed, saved, functools.partial(newest_data, config))
        plan.check_state(data)
        check_step_size(plan, config.data.packs_per_step)
        mixture = plan.mixture
        check_samples(config, mixture)
        origin = None if checkpoint or not config.init.from_ else weights_to_start_from(config, mixture.info)
        bad_samples = BadSamples(folder, config.data.bad_sample_limit, data.skip, Ranks(groups.host()))
        validated = config.train.validate_every > 0
        held_out = Plan.of(mixture, config.data, config.seed, split="validation") if validated else None
        data_rank, data_size = groups.data_parallel()
        engine = TrainEngine(config, device)
        leaving.callback(engine.close)
        position = (restore(engine, checkpoint, data) if checkpoint
                    else start(engine, origin, data, partial=config.init.partial))
        encoder = text_encoder(config, device) if encodes_texts(config, mixture.infos) else None
        assemble = assembler(config, encoder, device)
        cost = Cost.of_shape(config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size)
        loader = PackLoader(plan, position.data, packs_per_step=functools.partial(packs_of_step, config.data),
                            cost=cost, gamma=config.loss.gamma, step=position.step, dp_rank=data_rank,
                            dp_size=data_size, renew=functools.partial(grown_plan, config))
        validation = validation_batches(held_out, config, data_rank, data_size, assemble) if held_out else []
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, folder)
            write_json(folder / SURROUNDINGS, {**surroundings(), "driver": driver_version() or None})
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        total_peak = peak and peak * torch.distributed.get_world_size()
        with (loader,
              BackgroundSaver(folder, keep_last=config.train.keep_last, keep_every=config.train.keep_every,
                              background=config.train.background_save) as saver,
              MetricsLog(folder, position.step, config.logging, writes=first, config=to_dict(config)) as metrics,
              TrainingProgress(config.train.steps, position.step, shown=first) as progress,
              StepProfiler(config.profile, folder, range(position.step + 1, config.train.steps + 1),
                           records=first) as profiler,
              errors_told()):  # before the checkpoint in flight is waited for
            ledger = folder / LEDGER if first and config.data.ledger else None
            if ledger:
                drop_unfinished_line(ledger)
            heart.saving = lambda: saver.busy
            reserve_host_memory(saver, engine)
            lineage = read_state(checkpoint).get("origin") if checkpoint else origin and origin.to_dict()
            save = functools.partial(save_state, saver, engine, mixture.info, config, lineage)
            losses, gone_back = Ranks(groups.host()).first(lambda: past_of_spikes(folder, config.spikes.window))
            go_back = functools.partial(restore_before, saver, engine, config)
            rollbacks = Rollbacks(config.spikes, go_back, metrics, progress, gone_back)
            stragglers = Stragglers(config.watchdog, data_rank, Probe(device), PeakMemory(device),
                                    groups.gather_objects, progress.warn)
            finished = train(
                Run(config, engine, loader, functools.partial(assemble, drop=True), validation, bad_samples, ledger,
                    metrics, progress, save, SpikeJudge(config.spikes, losses), rollbacks, stop, heart, stragglers,
                    profiler, functools.partial(step_flops, config), total_peak), position)
            heart.enter("end", heart.now.step)  # the last checkpoint is being written
            return finished


def threads_per_process() -> int:
    """Cores of this machine divided by its processes."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def assembler(config: Config, encoder: IdsEncoder | None,
              device: torch.device) -> Callable[[Sequence[Sequence[Sample]], dict[int, float]], list]:
    """What turns the samples of a step's micro-batches and its loss weights into the batches on the device.

    Processes that share a copy of the model agree on which samples are bad, before the texts of the others are encoded
    where the dataset holds ids only. A class is dropped only with drop=True: of captions the plan has decided already,
    and held-out draws go without it.
    """
    from grn_scale.class_to_image import batch as images
    from grn_scale.config.class_schema import ClassConfig
    from grn_scale.model import pack
    from grn_scale.parallel import groups
    from grn_scale.tokenizer.text import with_text_states

    common = {"config": config.model, "noise": config.noise, "seed": config.seed, "device": device}
    part = groups.context_parallel()

    def assemble(micro_batches: Sequence[Sequence[Sample]], weights: dict[int, float], drop: bool = False) -> list:
        samples = [sample for micro_batch in micro_batches for sample in micro_batch]
        valid = groups.agree([sample.valid for sample in samples])
        samples = [replace(sample, valid=flag) for sample, flag in zip(samples, valid)]
        if encoder is not None:
            samples = with_text_states(samples, encoder)
        rest = iter(samples)
        return [one([next(rest) for _ in micro_batch], weights, drop) for micro_batch in micro_batches]

    def one(samples: Sequence[Sample], weights: dict[int, float], drop: bool) -> PackedBatch | ClassBatch:
        if isinstance(config, ClassConfig):
            return images.assemble(samples, weights, class_of=lambda draw: draw.class_id,
                                   class_drop=config.data.caption_drop if drop else 0.0, **common)
        return pack.assemble(samples, weights, length=config.data.token_budget, part=part, **common)

    return assemble


def encodes_texts(config: Config, datasets: Iterable[DatasetInfo]) -> bool:
    """Whether the text encoder runs in training: some dataset holds token ids only, and the model reads text."""
    from grn_scale.config.class_schema import ClassConfig

    return not isinstance(config, ClassConfig) and any(info.text_states == "none" for info in datasets)


def text_encoder(config: Config, device: torch.device) -> IdsEncoder:
    """The frozen text encoder, cut among the processes."""
    from grn_scale.parallel.text_encoder import DividedTextEncoder, weights_group
    from grn_scale.tokenizer.sharded_text import ShardedTextEncoder

    return DividedTextEncoder(ShardedTextEncoder(config.text.encoder, weights_group(), device))


def check_text_encoder(config: Config, datasets: Iterable[DatasetInfo]) -> None:
    """ConfigError unless text.encoder is the one the datasets were made with. Reads all its weights."""
    from grn_scale.tokenizer.text import load_text_tokenizer

    if not config.text.encoder:
        raise ConfigError("text.encoder is not set, but the dataset holds token ids without text states, so that the "
                          "text encoder runs in training: give the folder of the encoder it was tokenized with, or "
                          "tokenize again with text.states=bf16")
    fingerprint = load_text_tokenizer(config.text.encoder, config.text.max_tokens).fingerprint
    for info in datasets:
        if info.text_fingerprint != fingerprint:
            raise ConfigError(f"the dataset was made with the text encoder {info.text_fingerprint[:16]}..., but "
                              f"text.encoder and text.max_tokens={config.text.max_tokens} give {fingerprint[:16]}...: "
                              "set both as they were when it was tokenized, or tokenize again")


def newest_data(config: Config) -> str:
    """Name of the newest state of the datasets, as the first process sees it: all processes take the same."""
    from grn_scale.data.mixture import newest_snapshot
    from grn_scale.parallel import groups

    first = int(os.environ.get("RANK", "0")) == 0
    return groups.gather_objects(newest_snapshot(config.data) if first else "")[0]


def grown_plan(config: Config, plan: Plan) -> Plan | None:
    """The plan of the datasets as they are when an epoch begins; None where they are still those of `plan`."""
    from grn_scale.data.stream import renewed

    grown = renewed(plan, config.data, config.seed, functools.partial(newest_data, config))
    if grown is not None:
        check_training(config, grown.mixture.info)
        check_samples(config, grown.mixture)
    return grown


def check_samples(config: Config, mixture: Mixture) -> None:
    """UserError naming a sample that a class-to-image model cannot train on; one pass over the index. Text-to-video
    models take them all."""
    import numpy as np

    from grn_scale.class_to_image.batch import check_image
    from grn_scale.config.class_schema import ClassConfig

    if not isinstance(config, ClassConfig):
        return
    for dataset in mixture.datasets:
        for shard in range(len(dataset.info.video_shards)):
            columns = dataset.columns(shard)
            fits = (columns.thw == (1, config.model.grid, config.model.grid)).all(axis=1)
            fits &= (columns.class_id >= 0) & (columns.class_id < config.model.num_classes)
            for i in np.flatnonzero(~fits)[:1].tolist():
                class_id = int(columns.class_id[i])
                check_image(columns.keys[i].decode(), tuple(columns.thw[i].tolist()),
                            None if class_id == -1 else class_id, config.model)


def step_flops(config: Config, packs: Sequence[Pack]) -> tuple[int, int]:
    """FLOPs of training on a step's packs: what the model needs, and what the devices carry out. Validation and the
    text encoder are left out of both."""
    from grn_scale.class_to_image.flops import image_flops, image_hardware_flops
    from grn_scale.config.class_schema import ClassConfig
    from grn_scale.perf.flops import hardware_flops, model_flops

    draws = [draw for pack in packs for draw in pack.draws]
    if isinstance(config, ClassConfig):
        return len(draws) * image_flops(config.model), len(draws) * image_hardware_flops(config.model)
    lengths = [(draw.visual_tokens, draw.predicted_tokens, draw.text_tokens, draw.tokens) for draw in draws]
    rows = len(packs) * config.data.token_budget
    return model_flops(config.model, lengths), hardware_flops(config.model, config.parallel, lengths, rows)


def validation_batches(plan: Plan, config: Config, data_rank: int, data_size: int,
                       assemble: Callable) -> list[PackedBatch]:
    """This rank's share of the first data.validation_packs held-out packs (fewer where there are not so many), filled
    with empty packs so that every rank and pipeline stage has the same number.

    A held-out sample that cannot be read is logged and counts 0 in each evaluation (`validation_bad_samples`).
    """
    from grn_scale.data.loader import read_pack
    from grn_scale.data.plan import sample_weights

    unit = data_size * (config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1)
    packs = plan.first_packs(config.data.validation_packs)
    packs += [replace(packs[0], position=-1, draws=())] * (-len(packs) % unit)
    weights = sample_weights(packs, config.loss.gamma)
    return assemble([read_pack(plan.mixture, pack) for pack in packs[data_rank::data_size]], weights)


def weights_to_start_from(config: Config, info: DatasetInfo) -> Origin:
    """What init.from names. ConfigError where it was trained as another model, or on data of another tokenizer or text
    encoder; with init.partial each difference is logged instead."""
    from grn_scale.checkpoint.origin import find_origin
    from grn_scale.checkpoint.ranks import Ranks
    from grn_scale.class_to_image.load import fixed_tensors
    from grn_scale.config.class_schema import ClassConfig
    from grn_scale.parallel import groups
    from grn_scale.train.resuming import model_changes

    origin = find_origin(config.init.from_, config.init.weights, Ranks(groups.host()))
    differences = model_changes(origin.model, config, origin.path)
    reads_text = not isinstance(config, ClassConfig)
    for name in ("tokenizer_fingerprint", *(["text_fingerprint"] if reads_text else [])):
        then, now = origin.state.get("dataset", {}).get(name), getattr(info, name)
        if then not in (None, now):
            differences.append(f"{name} of the data {then[:16]}... -> {now[:16]}...")
    if differences and not config.init.partial:
        raise ConfigError(f"init.from: {origin.path} is of another model ({'; '.join(differences)}): set the "
                          "configuration as it was there, or init.partial=true to take what fits all the same")
    for difference in differences:
        log.info("%s is of another model: %s", origin.path.name, difference)
    return origin if reads_text else origin.without(fixed_tensors(config.model))


if __name__ == "__main__":
    raise SystemExit(run(main))
