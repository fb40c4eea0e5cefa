"""What differs between DeepSpeed's ZeRO stages, in one place.

0 replicates everything; 1 divides the optimizer's state, 2 also the gradients, 3 also the weights. Stages 0 and 1 run
under megatron's pipeline schedules, which only call backward; stages 2 and 3 reduce each gradient as it appears and
have to see every forward and backward pass of the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

from grn_scale.config.schema import Config
from grn_scale.parallel.fragments import Fragment

DeepSpeed = deepspeed.DeepSpeedEngine

BUCKET = 50_000_000
"""Elements that are reduced or gathered in one collective. DeepSpeed holds two such buffers, in fp32 200 MB each; its
own default of ten times as many takes 2 to 4 GB of every GPU."""


def sees_every_pass(stage: int) -> bool:
    """Whether the model must be called through DeepSpeed (and so without pipeline stages)."""
    return stage >= 2


def deepspeed_config(config: Config, replicas: int, parameters: Collection[torch.nn.Parameter]) -> dict:
    """DeepSpeed's configuration. replicas: processes that hold the same weights; parameters: of this process."""
    stage, offload = config.zero.stage, config.zero.offload_optimizer
    # a larger parameter would be reduced outside of the buffers, a larger buffer never fills
    largest, total = max(p.numel() for p in parameters), sum(p.numel() for p in parameters)
    # DeepSpeed gathers from even positions
    bucket = 2 * math.ceil(min(max(BUCKET, largest), total) / 2)
    zero = {"stage": stage, "overlap_comm": sees_every_pass(stage), "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket}
    if sees_every_pass(stage):
        # vectors stay whole: gathering such small ones again and again costs latency only
        zero["stage3_param_persistence_threshold"] = max((p.numel() for p in parameters if p.dim() <= 1), default=0) + 1
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_batch_size": replicas, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        # without ZeRO the engine clips by itself
        "gradient_clipping": config.optimizer.clip_norm if stage > 0 else 0.0,
        "steps_per_print": None, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # masters, moments and accumulated gradients in fp32; each gradient is taken over as soon as it is there
        settings |= {"bf16": {"enabled": True, "immediate_grad_update": True},
                     "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return settings


def owned_fragments(parameters: Mapping[str, torch.nn.Parameter], shapes: Mapping[str, tuple[int, ...]],
                    engine: DeepSpeed) -> list[Fragment]:
    """What this rank owns of the named local parameters, in their order; a rank may own nothing of one."""
    if engine.zero_optimization_stage() == 3:
        found = (_partition(name, shapes[name], parameter, engine.optimizer) for name, parameter in parameters.items())
    else:
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        found = (_fragment(name, shapes[name], parameter, flats) for name, parameter in parameters.items())
    return [fragment for fragment in found if fragment]


def _fragment(name: str, shape: tuple[int, ...], parameter: torch.nn.Parameter, flats: list[torch.Tensor],
              ) -> Fragment | None:
    """Stages 0 to 2: a range of a flat partition, or the parameter itself."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        local, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = next(flat for flat in flats if _holds(flat, mapping.hp_fragment))
        return Fragment(name, shape, local.start, local.numel, flat, partition.start)
    if any(parameter is flat for flat in flats):
        return Fragment(name, shape, 0, parameter.numel(), parameter, 0)
    return None


def _holds(flat: torch.Tensor, view: torch.Tensor) -> bool:
    # by identity, not by address: in a dry run no tensor has one
    return flat.untyped_storage()._cdata == view.untyped_storage()._cdata


def _partition(name: str, shape: tuple[int, ...], parameter: torch.nn.Parameter, optimizer: object) -> Fragment | None:
    """Stage 3: each parameter is cut into equal ranges, the last of them padded."""
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * padded
    numel = min(padded, parameter.ds_numel - start)
    if numel <= 0:
        return None
    return Fragment(name, shape, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def publish_masters(engine: DeepSpeed) -> None:
    """Make the weights that the network computes with those of the fp32 masters. A collective of the replicas."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        gather_persistent(engine)


def gather_persistent(engine: DeepSpeed) -> None:
    """Stage 3: bring the parameters together that stay whole. A step that DeepSpeed skips leaves them divided, and then
    the next forward pass does not fit the trace it follows."""
    if engine.zero_optimization_stage() == 3 and (whole := engine.optimizer.persistent_parameters):
        whole[0].all_gather(whole)


def held_gradients(engine: DeepSpeed) -> list[torch.Tensor]:
    """The tensors in which this rank keeps gradients between backward and update (stages 0 to 2)."""
    plain = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    partitions = getattr(engine.optimizer, "averaged_gradients", {}).values()
    return [*plain, *getattr(engine.optimizer, "fp32_groups_gradients_flat", ()),
            *(gradient for partition in partitions for gradient in partition or ())]


def drop_gradients(engine: DeepSpeed) -> None:
    """Forget what has been accumulated since the last update."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    engine.zero_grad()
    if hasattr(optimizer, "clear_hp_grads"):
        optimizer.clear_hp_grads()
    if engine.zero_optimization_stage() == 3:
        optimizer.averaged_gradients = {}
    elif sees_every_pass(engine.zero_optimization_stage()):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def after_skipped_step(engine: DeepSpeed) -> None:
    """Bring in order what DeepSpeed leaves behind when it skips a step, or when gradients were dropped."""
    optimizer = engine.optimizer
    gather_persistent(engine)
    if engine.zero_optimization_stage() == 2 and optimizer.cpu_offload:
        # else the next gradients are added to those of the skipped step
        optimizer.reset_cpu_buffers()
        optimizer.averaged_gradients, optimizer.micro_step_id = {}, -1


def release(engine: DeepSpeed) -> None:
    """Take its hooks off and forget the model where DeepSpeed keeps it globally."""
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]
