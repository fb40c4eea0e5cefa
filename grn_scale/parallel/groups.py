"""Process groups: torch.distributed and megatron's parallel state, and the view of it that DeepSpeed wants."""

from __future__ import annotations

import datetime
import os
import resource

import torch
import torch.distributed as dist

from grn_scale.config.schema import ParallelConfig
from grn_scale.errors import UserError
from grn_scale.parallel import cpu_seam

TIMEOUT = datetime.timedelta(minutes=60)
"""A collective that takes longer means that a process is lost. The watchdog speaks long before, and says which."""
STORE_TIMEOUT = datetime.timedelta(seconds=30)
HOST_TIMEOUT = datetime.timedelta(minutes=60)
"""Over the host group processes also wait for each other's files: a checkpoint is read back and hashed meanwhile."""

GLOO_GROUPS = 2
"""Those of all processes: for objects, and for saves in the background."""
OTHER_FILES = 512
"""What a process opens besides: shards, libraries, other groups."""

_host: dist.ProcessGroup | None = None


def start(parallel: ParallelConfig) -> torch.device:
    """Join the job: process groups and megatron's parallel state. Returns this process's device.

    UserError where a node has more processes than GPUs.
    """
    global _host
    cpu_seam.quiet_warnings()
    cpu_seam.install()
    cpu_seam.quiet_deepspeed()
    from megatron.core import parallel_state

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", _local_gpu())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "MASTER_PORT" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            # one process without a launcher: no port has to be agreed on
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
            os.environ["MASTER_PORT"] = "0"
    _allow_connections(dist.get_world_size())
    if _host is None:
        # a dry run (fake_world.py) has one group that talks to nobody, for everything
        pretended = dist.get_backend() == dist.Backend.FAKE
        _host = dist.group.WORLD if pretended else dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo",
                               dist_init_required=False, verbose=False)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False)
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # Nothing of ours draws from these generators, but sequence parallelism forks them.
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return device


def _allow_connections(world: int) -> None:
    """Make room for the connections of the gloo groups, each of which joins every process with every other one.

    UserError where the system does not allow so many open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = GLOO_GROUPS * world + OTHER_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else hard
    if needed > allowed:
        raise UserError(f"a job of {world} processes needs {needed} open files in each, but the hard limit is {hard}: "
                        "raise it (ulimit -Hn, LimitNOFILE of slurmd), or start fewer processes")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _local_gpu() -> int:
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= count:
        raise UserError(f"process {rank} of this node has no GPU: the node shows {count}; start at most {count} "
                          "processes a node, or look at CUDA_VISIBLE_DEVICES")
    return rank


def host() -> dist.ProcessGroup:
    """All processes over gloo: for Python objects and checkpoints, which must not pass through GPU collectives."""
    assert _host is not None, "groups.start comes first"
    return _host


def data_parallel() -> tuple[int, int]:
    """(rank, size) of this process among the copies of the model: those that read different packs."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def context_parallel() -> tuple[int, int]:
    """(rank, size) of this process among those that hold the parts of one sequence."""
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()


def agree(flags: list[bool]) -> list[bool]:
    """Each flag as far as all processes that read the same packs raise it."""
    from megatron.core import parallel_state

    groups = [group for group in (parallel_state.get_model_parallel_group(),
                                  parallel_state.get_context_parallel_group()) if dist.get_world_size(group) > 1]
    if not groups or not flags:
        return flags
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shared = torch.tensor(flags, dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(shared, op=dist.ReduceOp.MIN, group=group)
    return [bool(flag) for flag in shared.tolist()]


def gather_objects(value: object) -> list:
    """`value` of every process, in rank order, on every process."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=host())
    return values


def side_store() -> dist.Store:
    """A connection of its own to the store where the job's processes met, for threads beside training; a store of its
    own where the process is alone. Its calls raise torch.distributed.DistError once the keeper of the store is gone."""
    if dist.get_world_size() == 1:
        return dist.HashStore()
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, timeout=STORE_TIMEOUT)


def stop() -> None:
    """Leave the job; the process may start another one."""
    global _host
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _host = None


class DeepSpeedTopology:
    """The `mpu` object of DeepSpeed.

    "Model parallel" means two things to it: the rank says which copy of a replicated parameter counts in the
    gradient norm (tensor-parallel rank 0), the group is what the norm is summed over (tensor x pipeline). "Data
    parallel" are all processes that hold the same weights, those with other parts of the same sequence included:
    gradients are averaged and optimizer states divided over them.
    """

    def get_model_parallel_rank(self) -> int:
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        from megatron.core import parallel_state

        return dist.get_world_size(parallel_state.get_model_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group(with_context_parallel=True)
