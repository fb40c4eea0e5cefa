"""What a GPU and its host must hold for a run: the phases load, step and save, and what no tensor accounts for.

The dry run counts the bytes that tensors ask for. The rest is what the CUDA driver, the communication libraries and the
allocator take; those figures are assumptions, listed by name with the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grn_scale.config.schema import Config
from grn_scale.planning.grn_memory import StageMemory
from grn_scale.planning.hardware import load_efficiencies

MIB = 1 << 20


@dataclass(frozen=True)
class Assumed:
    """Bytes beside tensors. Not measured for grn_scale yet: change them to what `nvidia-smi` shows on your machine."""

    context: int = 600 * MIB
    """CUDA context with the kernels of torch, cuBLAS and cuDNN loaded, of one process."""
    workspace: int = 64 * MIB
    """cuBLAS asks for 32 MiB a stream on Hopper (cuBLAS manual, cublasSetWorkspace); computation and communication."""
    communicator: int = 256 * MIB
    """NCCL's buffers of one communicator: 4 MiB (NCCL_BUFFSIZE) x 2 directions x up to 32 channels."""


TEXT_ENCODER = {"layers": 24, "width": 4096, "inner": 10240}
"""The UMT5-XXL encoder (its config.json: d_model, d_ff, num_layers; gated, so three inner matrices)."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank of a stage."""

    stage: int
    phases: dict[str, int]
    """On the GPU: load, step, save."""
    beside: dict[str, int]
    """Of the step, what is no tensor of the engine: text encoder, communication, context, fragmentation."""
    host: dict[str, int]
    """In the memory of the node, for this process: load, step and save."""

    @property
    def most(self) -> int:
        """In the phase that takes most."""
        return max(self.phases.values())


def budget(config: Config, world_size: int, processes_per_node: int, memory: StageMemory,
           assumed: Assumed = Assumed()) -> Budget:
    """Phases of a rank whose training step holds `memory`."""
    sizes, parallel = memory.bytes, config.parallel
    groups = (parallel.tensor, parallel.pipeline, parallel.context,
              world_size // (parallel.tensor * parallel.pipeline), parallel.tensor * parallel.pipeline, world_size)
    moving = sizes["activations"] + sizes["buffers"] + sizes["batches"]
    beside = {"text encoder": text_encoder_bytes(config, processes_per_node),
              "communication": assumed.communicator * sum(size > 1 for size in groups),
              "context": assumed.context + assumed.workspace,
              "fragmentation": math.ceil(load_efficiencies().fragmentation * moving)}
    always = beside["text encoder"] + beside["context"]
    on_gpu = sum(sizes[name] for name in ("weights", "optimizer", "average"))
    phases = {
        # weights are drawn and copied into DeepSpeed's flat tensors, then come masters, moments and average
        "load": always + max(2 * sizes["weights"], on_gpu + memory.state.gradients_first),
        "step": sum(beside.values()) + sizes["peak"],
        # the state goes to the host from where it lies
        "save": always + beside["communication"] + on_gpu + memory.state.gradients_first + sizes["buffers"]}
    # a copy of masters, moments and average, page-locked and kept all through the run (`checkpoint.staging`)
    state = sizes["optimizer"] + sizes["average"] + memory.state.host
    copied = state if config.train.background_save else 0
    # an offloaded optimizer has this rank's gradients beside it, in fp32
    gradients = 4 * memory.parameters // groups[3] if memory.state.host else 0
    return Budget(memory.stage, phases, beside, {
        "load": _drawn(config) + memory.state.host, "step": copied + memory.state.host + gradients,
        "save": copied + memory.state.host})


def text_encoder_bytes(config: Config, processes_per_node: int) -> int:
    """Of the frozen text encoder, where the dataset holds token ids only (text.states=none): a slice of all layers, and
    two layers at a time as a whole (`grn_scale.tokenizer.sharded_text`), in bf16."""
    if config.text.states != "none":
        return 0
    width, inner = TEXT_ENCODER["width"], TEXT_ENCODER["inner"]
    layer = 2 * (4 * width * width + 3 * width * inner)
    return layer * TEXT_ENCODER["layers"] // processes_per_node + 2 * layer


def _drawn(config: Config) -> int:
    """Host bytes of drawing the largest tensor by its name in fp32, and this rank's part of it."""
    model = config.model
    largest = 4 * model.hidden_size * max(model.ffn_hidden_size, model.hidden_size, model.text_hidden_size)
    return 2 * largest
