"""The R x C grid of a context-parallel group: which ranks gather keys together and which gather queries.

          column 0   column 1   column 2
        +----------+----------+----------+      R = 2 rows, C = 3 columns. A row gathers queries over its
row 0   |    0     |    2     |    4     |      C ranks (`q_group`), a column gathers keys and values over
        +----------+----------+----------+      its R ranks (`kv_group`). Ranks are numbered down the columns:
row 1   |    1     |    3     |    5     |      rank = column * R + row, so a column is a contiguous run of
        +----------+----------+----------+      ranks, as in Megatron's hierarchical context-parallel groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Grid:
    """A rank's view of the grid.

    Attributes:
        ranks: `ranks[row][column]` is the context-parallel rank there, that is, its place in the zigzag layout.
        row, column: where the calling process stands.
        kv_group: the process group of the calling process's column; None where the grid has one row.
        q_group: the process group of its row; None where the grid has one column.
        kv_peers, q_peers: global ranks of the column by row, and of the row by column.
    """

    ranks: tuple[tuple[int, ...], ...]
    row: int
    column: int
    kv_group: dist.ProcessGroup | None = field(repr=False)
    q_group: dist.ProcessGroup | None = field(repr=False)
    kv_peers: tuple[int, ...] = field(repr=False)
    q_peers: tuple[int, ...] = field(repr=False)

    @property
    def rows(self) -> int:
        """R: how many ranks gather keys and values together."""
        return len(self.ranks)

    @property
    def cols(self) -> int:
        """C: how many ranks gather queries together."""
        return len(self.ranks[0])

    @property
    def size(self) -> int:
        """P = R x C, the context-parallel size."""
        return self.rows * self.cols

    @property
    def rank(self) -> int:
        """The calling process's context-parallel rank."""
        return self.ranks[self.row][self.column]

    @property
    def query_ranks(self) -> tuple[int, ...]:
        """Context-parallel ranks of the own row."""
        return self.ranks[self.row]

    def key_ranks(self, column: int) -> tuple[int, ...]:
        """Context-parallel ranks of a column."""
        return tuple(row[column] for row in self.ranks)

    @classmethod
    def single(cls) -> Grid:
        """The 1 x 1 grid: no context parallelism, no process group."""
        return cls(((0,),), 0, 0, None, None, (0,), (0,))

    @classmethod
    def from_group(cls, group: dist.ProcessGroup, *, rows: int, cols: int) -> Grid:
        """Lay a context-parallel group on a grid, creating the row's and the column's process groups.

        Every rank of `group` must call it; ranks outside need not. Keep the grid: a call creates communicators.

        Raises:
            ValueError: if rows x cols is not the group's size.
        """
        _check_shape(rows, cols, group.size())
        members = dist.get_process_group_ranks(group)
        column, row = divmod(group.rank(), rows)
        kv_peers = tuple(members[column * rows : (column + 1) * rows])
        q_peers = tuple(members[row::rows])
        kv_group = group if cols == 1 else _new_group(kv_peers, group)
        q_group = group if rows == 1 else _new_group(q_peers, group)
        return cls(
            _by_columns(rows, cols),
            row,
            column,
            kv_group if rows > 1 else None,
            q_group if cols > 1 else None,
            kv_peers,
            q_peers,
        )

    @classmethod
    def from_groups(cls, *, kv_group: dist.ProcessGroup, q_group: dist.ProcessGroup) -> Grid:
        """Take existing groups: `kv_group`, the caller's column of R ranks, and `q_group`, its row of C ranks.

        The caller's context-parallel rank must be q_group.rank() * R + kv_group.rank(), as it is for
        `[kv_group, q_group] = hierarchical context-parallel groups of sizes [R, C]` in Megatron-Core.

        Raises:
            ValueError: if the two groups share more than the calling rank.
        """
        kv_peers = tuple(dist.get_process_group_ranks(kv_group))
        q_peers = tuple(dist.get_process_group_ranks(q_group))
        if set(kv_peers) & set(q_peers) != {dist.get_rank()}:
            raise ValueError(
                f"kv_group (global ranks {list(kv_peers)}) and q_group (global ranks {list(q_peers)}) must share "
                f"exactly the calling rank, {dist.get_rank()}: one is a column of the grid, the other a row"
            )
        rows, cols = len(kv_peers), len(q_peers)
        return cls(
            _by_columns(rows, cols),
            kv_group.rank(),
            q_group.rank(),
            kv_group if rows > 1 else None,
            q_group if cols > 1 else None,
            kv_peers,
            q_peers,
        )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, kv_axis: int = 1) -> Grid:
        """Take a 2-D DeviceMesh: `kv_axis` gathers keys and values, the other axis gathers queries.

        A rank's context-parallel rank is its place in the flattened mesh, so `init_device_mesh(device, (C, R))` is the
        grid R x C, its columns contiguous. The mesh may hold the global ranks in any order.

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
        return cls(
            ranks,
            row,
            column,
            mesh.get_group(kv_axis) if rows > 1 else None,
            mesh.get_group(q_axis) if cols > 1 else None,
            tuple(line[column] for line in global_ranks),
            tuple(global_ranks[row]),
        )


def _by_columns(rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(c * rows + r for c in range(cols)) for r in range(rows))


def _check_shape(rows: int, cols: int, size: int) -> None:
    if rows < 1 or cols < 1 or rows * cols != size:
        valid = ", ".join(f"{r}x{size // r}" for r in range(1, size + 1) if size % r == 0)
        raise ValueError(
            f"a grid of rows={rows} x cols={cols} does not cover {size} context-parallel ranks: choose one of {valid}"
        )


def _new_group(ranks: tuple[int, ...], parent: dist.ProcessGroup) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    group = dist.new_group(list(ranks), backend=dist.get_backend(parent), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "the caller is among the ranks"
    return group
