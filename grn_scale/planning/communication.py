"""How long collectives take: a latency for each hop, and bytes over what the slowest link on the way reaches.

Ring algorithms: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH",
sections 4.1 (all-gather), 4.2 (reduce-scatter) and 4.5 (all-reduce as both); trees with pipelining: Sanders, Speck and
Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", which NCCL takes for small messages.
Ranks of one node send to other nodes over the network cards of all its members (NCCL documentation, rings), so a ring
through `members` ranks of each node has that many cards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grn_scale.planning.hardware import Efficiencies, Gpu


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: `ranks` of them, `members` in each node."""

    ranks: int
    members: int
    bandwidth: float
    """Bytes a second of a ring through them."""
    inside: float
    """Bytes a second between ranks of a node."""
    direct: float
    """Bytes a second that one rank sends to others, of another node where there are several."""
    inside_latency: float
    outside_latency: float
    tree: float
    """Of `bandwidth`, what trees reach."""

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.members)

    @property
    def ring_latency(self) -> float:
        """Seconds in which a message passes all ranks but one."""
        return (self.nodes - 1) * self.outside_latency + self.nodes * (self.members - 1) * self.inside_latency

    @property
    def tree_latency(self) -> float:
        """Seconds up a binary tree of nodes, with a chain inside each."""
        return math.ceil(math.log2(self.nodes)) * self.outside_latency + (self.members - 1) * self.inside_latency

    def all_gather(self, size: float) -> float:
        """Seconds until each rank has all `size` bytes, of which each brought its share; reduce-scatter likewise."""
        if self.ranks == 1:
            return 0.0
        return size * (self.ranks - 1) / self.ranks / self.bandwidth + self.ring_latency

    reduce_scatter = all_gather

    def all_reduce(self, size: float) -> float:
        """Seconds of the faster of ring, 2 (n - 1) / n of the bytes, and tree, which has its latency only
        logarithmically often and reaches less of the links (half a ring's at two directions each)."""
        if self.ranks == 1:
            return 0.0
        ring = 2 * size * (self.ranks - 1) / self.ranks / self.bandwidth + 2 * self.ring_latency
        tree = 2 * size / (self.tree * self.bandwidth) + 2 * self.tree_latency
        return min(ring, tree)

    def all_to_all(self, size: float) -> float:
        """Seconds in which each rank sends `size` bytes, an equal part to each (Jacobs et al. 2023, DeepSpeed-Ulysses,
        arXiv 2309.14509, section 3.2)."""
        if self.ranks == 1:
            return 0.0
        away = (self.ranks - self.members) / self.ranks if self.nodes > 1 else 0.0
        near = (self.members - 1) / self.ranks
        seconds = size * near / self.inside + size * away / self.direct
        return seconds + (self.outside_latency if self.nodes > 1 else self.inside_latency) * math.log2(self.ranks)

    def send(self, size: float) -> float:
        """Seconds of a message to a neighbour, in another node where the group has several."""
        return size / self.direct + (self.outside_latency if self.nodes > 1 else self.inside_latency)


def group(gpu: Gpu, reached: Efficiencies, ranks: int, stride: int) -> Group:
    """The `ranks` ranks that are `stride` apart, on nodes of `gpu.domain` GPUs."""
    inside = gpu.nvlink * reached.nvlink
    card = gpu.nic * reached.nic
    members = max(1, min(ranks, gpu.domain // stride)) if stride <= gpu.domain else 1
    bandwidth, direct = (inside, inside) if ranks <= members else (min(inside, members * card), card)
    return Group(ranks, min(ranks, members), bandwidth, inside, direct, reached.nvlink_latency, reached.nic_latency,
                 reached.tree)
