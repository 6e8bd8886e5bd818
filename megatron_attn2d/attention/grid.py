"""The R x C grid of a context-parallel group: which ranks gather keys together and which gather queries.

                  column 0   column 1   column 2
                +----------+----------+----------+      R = 2 rows, C = 3 columns. A row gathers queries over its
        row 0   |    0     |    2     |    4     |      C ranks (`q_group`), a column gathers keys and values over
                +----------+----------+----------+      its R ranks (`kv_group`). Ranks are numbered down the columns:
        row 1   |    1     |    3     |    5     |      rank = column * R + row, so a column is a contiguous run of
                +----------+----------+----------+      ranks, as in Megatron's hierarchical context-parallel groups.

A third axis may stand before the two: groups of U consecutive ranks (`ulysses_group`) exchange sequence for heads as in
DeepSpeed-Ulysses (arXiv 2309.14509), and each place of the grid is one such group: context-parallel rank =
(column * R + row) * U + rank in the Ulysses group.

With `node_block=(r, c)` consecutive ranks fill blocks of r x c places, each a node of U * r * c GPUs: fewer ranks of
its rows and columns are then on other nodes. Attention is exact in any order of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_attn2d.attention.groups import connect, subgroup
from megatron_attn2d.attention.layout import place_ranks
from megatron_attn2d.attention.warn import renamed_arguments, renamed_property

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Grid:
    """A rank's view of the grid.

    Attributes:
        ranks: `ranks[row][column]` is the rank there in the zigzag layout of the R x C places.
        row, column: the place of the calling process.
        kv_group: the process group of the calling process's column; None where the grid has one row.
        q_group: the process group of its row; None where the grid has one column.
        kv_peers, q_peers: global ranks of the column by row, and of the row by column.
        ulysses_group: the process group that exchanges sequence for heads; None where U = 1.
        ulysses_peers: its global ranks.
        node_rows, node_cols: how many neighbours of a column and of a row share a node. Chunks cross the network once
            per node, see `routes`. 1 where each rank counts as a node.
        derived: what calls on this grid derive from it once, by mask (`comm.axes`).
        calls: what is the same in all calls of a kind, by their arguments (`call.prepare`).
    """

    ranks: tuple[tuple[int, ...], ...]
    row: int
    column: int
    kv_group: dist.ProcessGroup | None = field(repr=False)
    q_group: dist.ProcessGroup | None = field(repr=False)
    kv_peers: tuple[int, ...] = field(repr=False)
    q_peers: tuple[int, ...] = field(repr=False)
    ulysses_group: dist.ProcessGroup | None = field(default=None, repr=False)
    ulysses_peers: tuple[int, ...] = field(default=(0,), repr=False)
    node_rows: int = 1
    node_cols: int = 1
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    calls: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """R: how many ranks gather keys and values together."""
        return len(self.ranks)

    @property
    def cols(self) -> int:
        """C: how many ranks gather queries together."""
        return len(self.ranks[0])

    @property
    def ulysses_size(self) -> int:
        """U: over how many ranks the heads are spread."""
        return len(self.ulysses_peers)

    @property
    def ulysses_rank(self) -> int:
        """The calling process's place among the U ranks: it attends that part of the heads."""
        return 0 if self.ulysses_group is None else self.ulysses_group.rank()

    @property
    def size(self) -> int:
        """P = U x R x C, the context-parallel size."""
        return self.ulysses_size * self.rows * self.cols

    @property
    def rank(self) -> int:
        """The calling process's rank in the zigzag layout of the R x C places."""
        return self.ranks[self.row][self.column]

    @property
    def context_rank(self) -> int:
        """The calling process's context-parallel rank, which says whose shard of the sequence it holds."""
        return self.rank * self.ulysses_size + self.ulysses_rank

    heads = renamed_property("Grid", "heads", "ulysses_size")
    head_rank = renamed_property("Grid", "head_rank", "ulysses_rank")
    head_group = renamed_property("Grid", "head_group", "ulysses_group")
    head_peers = renamed_property("Grid", "head_peers", "ulysses_peers")

    @property
    def query_ranks(self) -> tuple[int, ...]:
        """Ranks in the zigzag layout, as `rank`, of the own row."""
        return self.ranks[self.row]

    def key_ranks(self, column: int) -> tuple[int, ...]:
        """Ranks in the zigzag layout, as `rank`, of a column."""
        return tuple(row[column] for row in self.ranks)

    @classmethod
    def single(cls) -> Grid:
        """The 1 x 1 grid: no context parallelism, no process group."""
        return cls(((0,),), 0, 0, None, None, (0,), (0,))

    @classmethod
    @renamed_arguments(heads="ulysses_size", tile="node_block")
    def from_group(
        cls,
        group: dist.ProcessGroup,
        *,
        rows: int,
        cols: int,
        ulysses_size: int = 1,
        node_block: tuple[int, int] | None = None,
        reuse: bool = False,
    ) -> Grid:
        """Lay a context-parallel group on a grid, creating the process groups of the caller's row, column and heads.

        Every rank of `group` must call it; ranks outside need not. Keep the grid, as each call creates communicators.
        With NCCL their streams have high priority. They wait for messages as long as `group` does.

        Args:
            rows, cols, ulysses_size: R, C and U.
            node_block: rows and columns of the blocks that consecutive ranks fill, each on a node. What several ranks
                of a node need crosses the network once. By default ranks fill whole columns and each counts as a node.
            reuse: take `group` itself for an axis that has all of its ranks, even if its streams have low priority.

        Raises:
            ValueError: if U x R x C is not the group's size or blocks don't fill the grid.
        """
        _check_shape(rows, cols, ulysses_size, group.size())
        block_rows, block_cols = (rows, 1) if node_block is None else node_block
        node_rows, node_cols = node_block or (1, 1)
        if block_rows < 1 or block_cols < 1 or rows % block_rows or cols % block_cols:
            raise ValueError(f"node blocks of {block_rows}x{block_cols} don't fill a grid of {rows}x{cols}")
        ranks = place_ranks(rows, cols, block_rows, block_cols)
        place, ulysses_rank = divmod(group.rank(), ulysses_size)
        row, column = next((r, line.index(place)) for r, line in enumerate(ranks) if place in line)
        members = dist.get_process_group_ranks(group)
        kv_peers = tuple(members[line[column] * ulysses_size + ulysses_rank] for line in ranks)
        q_peers = tuple(members[rank * ulysses_size + ulysses_rank] for rank in ranks[row])
        ulysses_peers = tuple(members[place * ulysses_size : (place + 1) * ulysses_size])
        peers = kv_peers, q_peers, ulysses_peers
        kv_group, q_group, ulysses_group = (subgroup(each, group, reuse) for each in peers)
        connect(ulysses_group, kv_group, q_group)
        return cls(
            ranks,
            row,
            column,
            kv_group,
            q_group,
            kv_peers,
            q_peers,
            ulysses_group,
            ulysses_peers,
            node_rows,
            node_cols,
        )

    @classmethod
    @renamed_arguments(head_group="ulysses_group")
    def from_groups(
        cls,
        *,
        kv_group: dist.ProcessGroup,
        q_group: dist.ProcessGroup,
        ulysses_group: dist.ProcessGroup | None = None,
    ) -> Grid:
        """Take existing groups: the caller's column of R ranks, its row of C ranks and, if any, its U ranks of heads.

        With NCCL their streams should have high priority, or a kernel may keep messages from beginning that it hides:
        ProcessGroupNCCL.Options(is_high_priority_stream=True), Megatron's `--high-priority-stream-groups hcp`.

        The caller's context-parallel rank must be (q_group.rank() * R + kv_group.rank()) * U + ulysses_group.rank(), as
        it is for Megatron-Core's hierarchical context-parallel groups of sizes [R, C] or [U, R, C].

        Raises:
            ValueError: if two groups share more than the calling rank.
        """
        me = dist.get_rank()
        kv_peers, q_peers = (tuple(dist.get_process_group_ranks(group)) for group in (kv_group, q_group))
        ulysses_peers = (me,) if ulysses_group is None else tuple(dist.get_process_group_ranks(ulysses_group))
        named = {"kv_group": kv_peers, "q_group": q_peers, "ulysses_group": ulysses_peers}
        for first, second in (("kv_group", "q_group"), ("kv_group", "ulysses_group"), ("q_group", "ulysses_group")):
            if set(named[first]) & set(named[second]) != {me}:
                raise ValueError(
                    f"{first} (global ranks {list(named[first])}) and {second} (global ranks {list(named[second])}) "
                    f"must share exactly the calling rank, {me}: they are different axes of the grid"
                )
        rows, cols = len(kv_peers), len(q_peers)
        connect(ulysses_group, kv_group, q_group)
        return cls(
            place_ranks(rows, cols, rows, 1),
            kv_group.rank(),
            q_group.rank(),
            kv_group if rows > 1 else None,
            q_group if cols > 1 else None,
            kv_peers,
            q_peers,
            ulysses_group if len(ulysses_peers) > 1 else None,
            ulysses_peers,
        )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, kv_axis: int = 1) -> Grid:
        """Take a 2-D DeviceMesh: `kv_axis` gathers keys and values, the other axis gathers queries.

        A rank's context-parallel rank is its place in the flattened mesh, so `init_device_mesh(device, (C, R))` is the
        grid R x C, its columns contiguous. The mesh may hold the global ranks in any order. Its groups' streams should
        have high priority, as those of `from_groups`: `backend_override` of `init_device_mesh` takes such options.

        Raises:
            ValueError: if the mesh is not two-dimensional, `kv_axis` is neither axis, or the caller is not in it.
        """
        if mesh.ndim != 2:
            raise ValueError(
                f"Grid.from_mesh takes a mesh of 2 axes, this one has {mesh.ndim}: slice it, mesh['cp_q', 'cp_kv']"
            )
        if kv_axis not in (0, 1):
            raise ValueError(f"kv_axis={kv_axis} is no axis of a 2-D mesh: give 0 or 1")
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"global rank {dist.get_rank()} is not part of the mesh {mesh}")
        q_axis = 1 - kv_axis
        global_ranks = mesh.mesh.t().tolist() if kv_axis == 1 else mesh.mesh.tolist()
        width = mesh.size(1)
        rows, cols = mesh.size(kv_axis), mesh.size(q_axis)
        ranks = tuple(tuple(c * width + r if kv_axis == 1 else r * width + c for c in range(cols)) for r in range(rows))
        row, column = coordinate[kv_axis], coordinate[q_axis]
        kv_group, q_group = (mesh.get_group(axis) for axis in (kv_axis, q_axis))
        connect(kv_group, q_group)
        return cls(
            ranks,
            row,
            column,
            kv_group if rows > 1 else None,
            q_group if cols > 1 else None,
            tuple(line[column] for line in global_ranks),
            tuple(global_ranks[row]),
            ulysses_peers=(dist.get_rank(),),
        )


def _check_shape(rows: int, cols: int, ulysses_size: int, size: int) -> None:
    if min(rows, cols, ulysses_size) < 1 or rows * cols * ulysses_size != size:
        asked = f"rows={rows} x cols={cols}" + (f" x ulysses_size={ulysses_size}" if ulysses_size != 1 else "")
        fits = ulysses_size >= 1 and size % ulysses_size == 0
        places = size // ulysses_size if fits else size
        valid = ", ".join(f"{r}x{places // r}" for r in range(1, places + 1) if places % r == 0)
        choice = f"one of {valid}" + (f" with ulysses_size={ulysses_size}" if ulysses_size != 1 and fits else "")
        choice += "" if fits else f", or a ulysses_size that divides {size}"
        raise ValueError(f"a grid of {asked} does not cover {size} context-parallel ranks: choose {choice}")
