"""Rank arithmetic: the same as megatron-core's, for any number of ranks, without a process group."""

import itertools

import pytest

from grn_scale.parallel.dims import Coordinate, Dims, adopt_srun, tasks_per_node


@pytest.mark.parametrize("dims", [
    Dims(1, 1, 1, 1, 1), Dims(24, 2, 1, 4, 3), Dims(4096, 8, 2, 64, 4), Dims(6000, 6, 1, 125, 8)])
def test_rank_and_coordinate_are_inverse_and_groups_partition_the_world(dims):
    for rank in range(dims.world):
        assert dims.rank(dims.coordinate(rank)) == rank
    step = max(1, dims.world // 50)
    for rank in range(0, dims.world, step):
        for group, size in ((dims.tensor_group, dims.tensor), (dims.data_group, dims.data),
                            (dims.context_group, dims.context), (dims.pipeline_group, dims.pipeline),
                            (dims.pack_group, dims.tensor * dims.context * dims.pipeline),
                            (dims.replica_group, dims.context * dims.data)):
            members = group(rank)
            assert len(set(members)) == size and rank in members
            assert all(group(member) == members for member in members[:3])


def test_tensor_ranks_are_neighbours_and_stages_lie_furthest_apart():
    dims = Dims.of_world(16, tensor=2, pipeline=2)
    assert dims.data == 4
    assert dims.tensor_group(5) == [4, 5]
    assert dims.data_group(1) == [1, 3, 5, 7]
    assert dims.pipeline_group(1) == [1, 9]
    assert dims.pack_group(0) == [0, 1, 8, 9]
    assert dims.coordinate(11) == Coordinate(tensor=1, context=0, data=1, pipeline=1)
    assert Dims.of_world(16, tensor=2, pipeline=2, context=2).context_group(1) == [1, 3]


def test_groups_are_those_of_megatron_core():
    from megatron.core.parallel_state import RankGenerator

    for tensor, context, pipeline, data in itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2, 5)):
        theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
        ours = Dims(tensor * context * pipeline * data, tensor, context, data, pipeline)
        for token, group in (("tp", ours.tensor_group), ("dp", ours.data_group), ("pp", ours.pipeline_group),
                             ("cp", ours.context_group), ("tp-cp-pp", ours.pack_group), ("dp-cp", ours.replica_group)):
            assert {tuple(sorted(g)) for g in theirs.get_ranks(token)} == {tuple(group(r)) for r in range(ours.world)}


def test_degrees_that_do_not_make_the_world_are_refused():
    with pytest.raises(ValueError, match="2 x 1 x 3 x 1, but the world is 7"):
        Dims.of_world(7, tensor=2, pipeline=1)
    with pytest.raises(ValueError, match="rank 4 does not exist in a world of 4"):
        Dims(4, 2, 1, 2, 1).coordinate(4)


def test_processes_of_srun_get_what_torchrun_would_give_them():
    srun = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4",
            "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_JOB_ID": "30123"}
    given = dict(srun)
    adopt_srun(given)
    assert given == {**srun, "RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "1",
                     "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "15123"}
    placed = {**srun, "MASTER_ADDR": "node1", "MASTER_PORT": "9"}
    adopt_srun(placed)
    assert (placed["MASTER_ADDR"], placed["MASTER_PORT"]) == ("node1", "9")
    # one process, also with a shell of its own, and processes of torchrun are left as they are
    for untouched in ({}, {**srun, "SLURM_STEP_NUM_TASKS": "1"}, {**srun, "WORLD_SIZE": "16"}):
        after = dict(untouched)
        adopt_srun(after)
        assert after == untouched
    assert tasks_per_node("8(x3),2(x1),1") == [8, 8, 8, 2, 1]
