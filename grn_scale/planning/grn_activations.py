"""Bytes that the forward pass of GRN's parts keeps for the backward pass, and the most that the backward pass takes.

The accounting is that of Korthikanti et al. 2022 (arXiv:2205.05198, section 4), term by term for our layer: RMS norms
in fp32, norms of queries and keys, rotation in fp32, SwiGLU, bidirectional attention that keeps no scores, and a head
on the predicted rows only. The kernels of a GPU are told apart from plain operations one after the other, which a CPU
runs and with it the dry run.

Legend, elements: X rows between layers x width, R rows inside a layer x width, A rows inside x this rank's heads, T the
same after Ulysses' exchange (all rows, fewer heads), M rows inside x this rank's MLP width. b: bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.schema import Config
from grn_scale.perf.flops import LEVEL_FEATURES
from grn_scale.planning.grn_pack import PackShape

FP32 = 4
SHORT_ON_CPU = 256
"""Keys up to which a CPU computes attention with an explicit softmax (`grn_scale.model.attention_kernels`)."""


@dataclass(frozen=True)
class KernelForms:
    """Which operations keep what."""

    norm: bool
    """Norms of layers keep their input and 1/rms only (torch.compile, apex), not fp32 copies."""
    swiglu: bool
    """SwiGLU keeps gate and up only."""
    native_norm: bool
    """torch's own norm is one kernel (CUDA), which keeps its fp32 input but nothing in between."""
    explicit_softmax: bool
    """Short segments keep their scores."""
    drops_outputs: bool
    """megatron frees what a stage has sent on (`deallocate_pipeline_outputs`, on a GPU)."""

    @classmethod
    def of_gpu(cls, kernels: KernelsConfig) -> KernelForms:
        compiled = kernels.compile != "never"
        return cls(norm=compiled or kernels.norm == "apex", swiglu=compiled, native_norm=True, explicit_softmax=False,
                   drops_outputs=True)

    @classmethod
    def of_dry_run(cls) -> KernelForms:
        return cls(norm=False, swiglu=False, native_norm=False, explicit_softmax=True, drops_outputs=False)


@dataclass(frozen=True)
class Kept:
    """Of one part of the model, one micro-batch."""

    kept: int
    """Bytes between its forward and its backward pass."""
    backward: int
    """Most bytes while it runs backward, what it kept included."""
    forward: int = 0
    """Most bytes while it runs forward, what it keeps included; 0 where that is never more than backward."""
    arrivals: tuple[tuple[int, int], ...] = ()
    """Of the weights' gradients in their order, elements and the bytes that are there then, their own included."""

    def with_more(self, kept: int) -> Kept:
        """The same with bytes that stay from before its forward pass until after its backward pass."""
        return replace(self, kept=self.kept + kept, backward=self.backward + kept, forward=self.forward + kept,
                       arrivals=tuple((elements, there + kept) for elements, there in self.arrivals))


class Activations:
    """Sizes of one micro-batch on one rank."""

    def __init__(self, config: Config, pack: PackShape, forms: KernelForms, cast: int) -> None:
        """cast: bytes an element of the copy of a gradient while it is accumulated (`State.cast`)."""
        model, parallel = config.model, config.parallel
        self.model, self.pack, self.forms, self.cast = model, pack, forms, cast
        self.b = b = 2 if config.train.precision == "bf16" else FP32
        self.tensor, self.split = parallel.tensor, parallel.sequence and parallel.tensor > 1
        rows = config.data.token_budget // parallel.context
        width = model.hidden_size
        self.R = rows * width
        self.X = self.R // parallel.tensor if self.split else self.R
        self.A = self.R // parallel.tensor
        heads = model.num_heads // parallel.tensor
        # of uneven heads the first process of a context has most (`ulysses.shares`)
        attending = -(-heads // parallel.context)
        self.T = config.data.token_budget * attending * model.head_size
        self.exchanged = parallel.context > 1
        self.M = rows * model.ffn_hidden_size // parallel.tensor
        self.attending = attending
        modules = parallel.recompute_modules if parallel.recompute == "selective" else ()
        self.again_mlp, self.again_attention = "mlp" in modules, "core_attn" in modules
        self.again_layer = parallel.recompute == "full"
        self.hidden = b * self.X

    # -- norms ---------------------------------------------------------------------------------------------

    def _norm(self, elements: int, source_kept: bool) -> int:
        """An RMS norm's bytes without its output. source_kept: its input is kept by another operation anyway."""
        if self.forms.norm:
            return 0 if source_kept else self.b * elements
        copied = FP32 * elements if self.b < FP32 or not source_kept else 0
        # plain operations keep x / rms as well
        return copied if self.forms.native_norm else copied + FP32 * elements

    def _norm_backward(self, elements: int) -> int:
        """Most bytes of an RMS norm's backward pass, what it kept included."""
        if self.forms.norm:
            return 3 * self.b * elements
        # fused: x, gradient in, gradient out; plain: x, its square over rms cubed, and products of the gradient
        return (3 if self.forms.native_norm else 6) * FP32 * elements

    @property
    def keeps_input(self) -> bool:
        """Whether a layer keeps its input as it is: the norm's own fp32 copy takes its place in bf16."""
        return self.again_layer or self.forms.norm or self.b == FP32

    # -- a layer -------------------------------------------------------------------------------------------

    def _attention(self) -> tuple[int, int]:
        """Bytes of attention between the norm before it and the output projection: (what core attention is given, what
        it keeps itself)."""
        b, A, pack, forms = self.b, self.A, self.pack, self.forms
        # The fused output of the first projection stays as the values, which are a view of it, and as the input of
        # norms that make no copy; unless both are copied, values because other ranks or texts share them.
        copied = self.exchanged or pack.shares_texts
        fused = 3 * b * A if self.norm_reads_fused or not copied else 0
        given = fused + self.head_norms
        if forms.explicit_softmax and pack.longest_keys <= SHORT_ON_CPU:
            scores = pack.pairs * self.attending
            core = FP32 * scores + (b * scores if b < FP32 else 0)
        else:
            # output and log-sum-exp (Dao et al. 2022, arXiv:2205.14135, section 3.1)
            core = b * self.T + FP32 * pack.length * self.attending
        # turned queries and keys, or all that came in the exchange; keys and values again where texts are shared
        core += 3 * b * self.T if self.exchanged else 2 * b * A
        if pack.shares_texts:
            core += 2 * b * pack.keys * self.attending * self.model.head_size
        return given, core

    @property
    def norm_reads_fused(self) -> bool:
        return self.forms.norm or self.b == FP32

    @property
    def head_norms(self) -> int:
        """Bytes of the norms of queries and keys, whose input and output others keep."""
        return 0 if self.forms.norm else 2 * self._norm(self.A, source_kept=self.b == FP32)

    def layer(self, matrices: tuple[int, ...]) -> Kept:
        """A layer without its input; matrices: its weights, in the order of `grn_parameters`."""
        b, A, M = self.b, self.A, self.M
        given, core = self._attention()
        norm_in = self._norm(self.X, source_kept=True) + b * self.X
        norm_mid = self._norm(self.X, source_kept=False) + b * self.X
        # fused: gate and up, and their product; plain: also silu(gate) and up + 0 (megatron's offset)
        mlp = (3 if self.forms.swiglu else 5) * b * M
        attention = norm_in + given + core + b * A  # and the input of the output projection
        whole = attention + norm_mid + mlp
        out, qkv, gate_up, down = matrices
        g = self.hidden  # gradient of a layer's output, which passes by every part
        gathered = b * self.R if self.split else 0
        again = g if self.again_mlp or self.again_layer else 0  # the output that was computed again,
        left = g if self.again_layer else 0  # which of a whole layer stays until the layer is done
        in_mlp = max(
            # down projection: gradients of its input and its weight, then the latter's copy
            whole + g + again + gathered + b * M + b * down,
            whole + g + again + (b + self.cast) * down,
            # SwiGLU: gradients of its output, of gate and of up; its own output is gone
            whole + g + again + 2 * b * M,
            # gate and up projection
            whole - mlp + g + 2 * b * M + b * self.R + (g if self.split else 0) + b * gate_up,
            whole - mlp + 2 * g + (b + self.cast) * gate_up)
        in_attention = left + max(
            # core attention: gradients of its output, of queries, keys and values
            norm_in + given + core + g + 4 * b * self.T,
            # norms of queries and keys, then the projection before them
            norm_in + given + g + 3 * b * A + (0 if self.forms.norm else self._norm_backward(A)),
            norm_in + g + 3 * b * A + b * self.R + (g if self.split else 0) + (b + self.cast) * qkv)
        in_norm = attention + g + left + self._norm_backward(self.X)
        arrivals = ((down, whole + g + again + b * down), (gate_up, whole - mlp + 2 * g + b * gate_up),
                    (out, left + norm_in + given + core + g + b * A + b * out),
                    (qkv, left + norm_in + 2 * g + b * qkv))
        if self.again_layer:
            return Kept(0, max(in_mlp, in_norm, in_attention), 0, arrivals)
        kept = whole - (mlp if self.again_mlp else 0)
        # forward: the output, before it is scattered whole
        forward = whole + gathered + g
        if not self.again_attention:
            return Kept(kept, max(in_mlp, in_norm, in_attention), forward, arrivals)
        # megatron's checkpoint keeps queries and keys before they are turned, and the fused buffer of the values
        saved = given + core - (3 * b * A + 2 * b * A + self.head_norms)
        return Kept(kept - saved, max(in_mlp - saved, in_norm - saved, in_attention + b * A), forward - saved,
                    tuple((elements, there - saved) for elements, there in arrivals))

    # -- the ends ------------------------------------------------------------------------------------------

    def embedding(self) -> Kept:
        """Labels, text and noise level to rows, in fp32."""
        model, pack, width = self.model, self.pack, self.model.hidden_size
        tokens = FP32 * (pack.own_visual + pack.own_text + pack.own_levels) * width
        # what the linear layers were given; labels of more classes are looked up by int64 numbers
        labels = (FP32 if model.classes == 2 else 8) * pack.own_visual * model.label_channels
        text = FP32 * pack.own_text * model.text_hidden_size
        level = FP32 * pack.samples * (LEVEL_FEATURES + 2 * width)
        weight = 0 if self.b == FP32 else FP32 * width * width  # of the level's second layer, in fp32
        # sequence parallelism takes a view of the rows, and where the first layer keeps its input they stay as a whole
        view = self.b * (self.R - self.X) if self.keeps_input else 0
        kept = tokens + labels + text + level + weight + view
        # the rows in fp32, before and after the tokens are put in or taken out, and in the activations' dtype
        most = kept + 2 * FP32 * self.R + (self.b * self.R if self.b < FP32 else 0)
        return Kept(kept, most, most)

    def head(self) -> Kept:
        """Norm, scores of this rank's labels and loss, in fp32, on the predicted rows."""
        model, pack = self.model, self.pack
        rows, labels = pack.own_predicted * model.hidden_size, pack.own_predicted * model.label_channels // self.tensor
        weights = FP32 * model.hidden_size * model.label_channels // self.tensor
        norm = FP32 * rows * (2 if self.forms.native_norm else 3)  # x, (x / rms,) and the output
        if model.classes == 2:
            # a sign, its product with the scores, then their gradients; the difference of two classes' weights
            scores, working = 2 * FP32 * labels, 3 * FP32 * labels
        else:
            # log-probabilities and int64 targets, then their gradients; the weights in fp32
            scores, working = (FP32 * model.classes + 8) * labels, 2 * FP32 * model.classes * labels
            weights = 0 if self.b == FP32 else weights * model.classes
        kept = norm + scores + weights
        backward = (3 if self.forms.native_norm else 6) * FP32 * rows + weights
        return Kept(kept, max(kept + working, kept + FP32 * rows + weights, backward))
