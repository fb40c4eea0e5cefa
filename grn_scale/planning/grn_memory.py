"""Memory of a rank of each pipeline stage in a training step, counted from the configuration.

The categories are those of the dry run (`grn_scale.parallel.dry_run.CATEGORIES`), which builds the rank and measures
it; this takes milliseconds and no torch. A step is replayed task by task in the order of megatron's schedule, because
what is in flight (Narayanan et al. 2021, arXiv:2104.04473, section 2.2) and how much of the gradients is there already
decide together where the peak is.
"""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.schema import Config
from grn_scale.planning.grn_activations import Activations, Kept, KernelForms
from grn_scale.planning.grn_pack import batch_bytes, full_pack
from grn_scale.planning.grn_parameters import Chunk, stage_chunks
from grn_scale.planning.grn_state import State, state
from grn_scale.planning.schedule import Schedule, Task


@dataclass(frozen=True)
class StageMemory:
    """What a rank of one pipeline stage holds."""

    stage: int
    ranks: int
    """How many ranks are like this one."""
    parameters: int
    bytes: dict[str, int]
    """By category of `dry_run.CATEGORIES`."""
    state: State


def step_memory(config: Config, world_size: int, forms: KernelForms | None = None,
                micro_batches: int | None = None) -> tuple[StageMemory, ...]:
    """By pipeline stage, of a legal text/video layout.

    forms: kernels (None: those that the configuration chooses on a GPU); micro_batches: how many a step has (None: as
    many as `data.packs_per_step` gives; the dry run takes no more than fill the pipeline).
    """
    parallel = config.parallel
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    copies = replicas // parallel.context
    if micro_batches is None:
        micro_batches = config.data.packs_per_step // copies
    forms = forms or KernelForms.of_gpu(config.kernels)
    pack = full_pack(config)
    batches = batch_bytes(config, pack) * (config.data.packs_per_step // copies)
    found = []
    for stage in range(parallel.pipeline):
        chunks = stage_chunks(config.model, parallel, stage)
        kept = state(config, [block for chunk in chunks for block in chunk.blocks], replicas)
        activations = Activations(config, pack, forms, kept.cast)
        most, buffers = _Replay(config, stage, chunks, kept, activations).run(micro_batches)
        held = kept.weights + kept.gradients + kept.optimizer + kept.average + buffers
        sizes = {"weights": kept.weights, "gradients": kept.gradients, "optimizer": kept.optimizer,
                 "average": kept.average, "batches": batches, "buffers": buffers, "activations": max(0, most - held),
                 "peak": max(most, held + kept.update) + batches}
        parameters = sum(block.count for chunk in chunks for block in chunk.blocks)
        found.append(StageMemory(stage, world_size // parallel.pipeline, parameters, sizes, kept))
    return tuple(found)


class _Replay:
    """One stage's tasks, with bytes instead of seconds."""

    def __init__(self, config: Config, stage: int, chunks: tuple[Chunk, ...], kept: State, activations: Activations,
                 ) -> None:
        self.parallel, self.stage, self.state, self.act = config.parallel, stage, kept, activations
        self.chunks = chunks
        gathered = activations.b * activations.R if activations.split else 0
        self.steady = kept.weights + kept.optimizer + kept.average + kept.assembled + gathered
        """megatron's one buffer for gathered rows among it."""
        # the schedule still refers to what came last from the stage before, and to the gradient that went back
        received = 2 * activations.hidden * sum(chunk.embedding is None for chunk in chunks)
        self.buffers = gathered + kept.assembled + received
        self.parts = [self._parts(chunk) for chunk in chunks]

    def _parts(self, chunk: Chunk) -> list[tuple[Kept, int]]:
        """(activations, elements of weights) of the blocks of a chunk, first to last."""
        rows, parts = self.act.hidden, []
        if chunk.head is None and not self.act.forms.drops_outputs:
            parts.append((Kept(rows, rows), 0))  # what was sent on stays until the backward pass is over
        if chunk.embedding is not None:
            parts.append((self.act.embedding(), chunk.embedding.count))
        for number, layer in enumerate(chunk.layers):
            # the schedule keeps what a chunk received, whatever its first layer does
            input_stays = self.act.keeps_input or (number == 0 and chunk.embedding is None)
            parts.append((self.act.layer(layer.matrices).with_more(rows * input_stays), layer.count))
        if chunk.head is not None:
            parts.append((self.act.head(), chunk.head.count))
        return parts

    def run(self, micro_batches: int) -> tuple[int, int]:
        """(most bytes in forward and backward, bytes of buffers held after it); batches are not counted."""
        order = Schedule(self.parallel.pipeline, self.parallel.virtual_pipeline, micro_batches).of_stage(self.stage)
        begun = [False] * len(self.parts)
        gradients, flight, peak = self.state.gradients_first, 0, 0
        referred = _Referred(self.act.hidden, [chunk.embedding is None for chunk in self.chunks])
        for task in order:
            beside = referred.begin(task)
            if not task.backward:
                # the model's forward refers to the embedded rows until the last layer is done
                embedded = self.act.b * self.act.R if self.chunks[task.chunk].embedding else 0
                held = self.steady + gradients + beside + (0 if self.act.keeps_input else embedded)
                for part, _ in self.parts[task.chunk]:
                    peak = max(peak, held + flight + part.forward)
                    flight += part.kept
                continue
            chunk, done, filled = self.chunks[task.chunk], 0, 0
            for part, count in reversed(self.parts[task.chunk]):
                flight -= part.kept
                # the gradient that came from the stage behind stays, too; the first layer counts it as its own
                came = self.act.hidden if done and chunk.head is None else 0
                held = self.steady + self.state.bucket + flight + beside + came
                peak = max(peak, held + gradients + part.backward)
                vectors = count - sum(elements for elements, _ in part.arrivals)
                for elements, there in (*part.arrivals, (vectors, 0)):
                    if filled + elements > self.state.bucket_elements:  # what was there before goes to the others
                        gradients += self._divided(done, gradients)
                        peak = max(peak, held + gradients + there + self.state.reduced * filled)
                        filled = 0
                    if not (begun[task.chunk] or self.state.partition or self.state.gradients_first):
                        gradients += 4 * elements
                    filled, done = filled + elements, done + elements
            gradients += self._divided(done, gradients)
            peak = max(peak, self.steady + self.state.bucket + flight + gradients + self.state.reduced * filled)
            begun[task.chunk] = True
        buckets = self.state.bucket if self.state.bucket_stays else 0
        return peak, self.buffers + buckets

    def _divided(self, done: int, there: int) -> int:
        """ZeRO-2: bytes of this rank's gradients that appear when the `done` last weights have been reduced: all, as
        soon as one of them is among its own, which are the first."""
        total = sum(count for parts in self.parts for _, count in parts)
        return self.state.gradients - there if total - done < self.state.partition else 0


class _Referred:
    """Tensors that came from the stage before, and the gradients that went back to it, which are referred to after the
    backward pass that they were for: a chunk refers to what it was given last (`set_input_tensor`), with its gradient,
    and the schedule to the gradient that went back last."""

    def __init__(self, hidden: int, receives: list[bool]) -> None:
        """hidden: bytes of one of them; receives: of each chunk, whether a stage is before it."""
        self.hidden, self.receives = hidden, receives
        self.given: list[int | None] = [None] * len(receives)
        self.done: list[bool] = [False] * len(receives)
        self.went: Task | None = None

    def begin(self, task: Task) -> int:
        """Bytes that are left from earlier tasks while this one runs."""
        if not task.backward:
            self.given[task.chunk], self.done[task.chunk] = task.micro_batch, False
        again = sum(2 * self.hidden for done, receives in zip(self.done, self.receives) if done and receives)
        went = self.went
        if went and self.receives[went.chunk] and not (
                self.done[went.chunk] and self.given[went.chunk] == went.micro_batch):
            again += self.hidden
        if task.backward:
            self.done[task.chunk] = self.given[task.chunk] == task.micro_batch
            self.went = task
        return again
