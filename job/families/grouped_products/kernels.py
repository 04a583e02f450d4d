"""Grouped products as Triton kernels. Programs find their expert on the device.

A product's tiles are numbered expert by expert, so that programs which run at the same time share
an expert's weights and rows in the L2 cache. Imported only where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(ends, tile, upto, row_tiles, column_tiles, experts, GROUP: tl.constexpr):  # noqa: N803
    """The expert of a tile, the ends of its rows, and the tile's place among the expert's tiles.

    Column by column within `GROUP` tiles of rows, which then stay in the L2 cache.
    """
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    mine = experts == expert
    count = tl.sum(tl.where(mine, row_tiles, 0), 0)
    within = tile - tl.sum(tl.where(mine, upto, 0), 0) + count * column_tiles
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    group = within // (GROUP * column_tiles)
    height = min(count - group * GROUP, GROUP)
    within -= group * GROUP * column_tiles
    return expert, start, end, group * GROUP + within % height, within // height


@triton.jit
def _tile_ends(ends, column_tiles, EXPERTS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    """For each expert: its number, how many tiles of `ROWS` rows it has, and where its tiles end.

    `LANES` is `EXPERTS` rounded up to a power of two; the lanes past `EXPERTS` have no tiles.
    """
    experts = tl.arange(0, LANES)
    real = experts < EXPERTS
    end = tl.load(ends + experts, mask=real, other=0)
    start = tl.load(ends + experts - 1, mask=real & (experts > 0), other=0)
    row_tiles = tl.where(real, (end - start + ROWS - 1) // ROWS, 0)
    return experts, row_tiles, tl.cumsum(row_tiles * column_tiles, 0)


@triton.jit
def _store(
    out,
    acc,
    first_row,
    end,
    first_column,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Stores a tile's rows before `end` and columns below `width`."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = out + first_row.to(tl.int64) * width + first_column
    mask = (row < end - first_row)[:, None] & (column < width - first_column)[None, :]
    offsets = row[:, None] * width + column[None, :]
    tl.store(at + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product(
    rows,
    weight,
    out,
    ends,
    inner,
    width,
    rows_stride,
    expert_stride,
    inner_stride,
    width_stride,
    EXPERTS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    INNER: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    WHOLE_COLUMNS: tl.constexpr,  # noqa: N803
    WHOLE_INNER: tl.constexpr,  # noqa: N803
):
    """`out` (M, width) = `rows` (M, inner) by each expert's `weight` (E, inner, width).

    `ends` (E,): where each expert's rows end. Tiles are `ROWS` by `COLUMNS`, `INNER` at a time.
    `WHOLE_COLUMNS` and `WHOLE_INNER`: width and inner are multiples of the tile's.
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    experts, row_tiles, upto = _tile_ends(ends, column_tiles, EXPERTS, LANES, ROWS)
    k = tl.arange(0, INNER)
    for tile in range(tl.program_id(0), tl.max(upto, 0), tl.num_programs(0)):
        expert, start, end, m, n = _locate(
            ends, tile, upto, row_tiles, column_tiles, experts, GROUP
        )
        first_row, first_column = start + m * ROWS, n * COLUMNS
        # Offsets within a tile fit 32 bits. Rows past the expert's are read again, not stored.
        row = tl.minimum(tl.arange(0, ROWS), end - 1 - first_row)
        column = tl.arange(0, COLUMNS)
        left = rows + first_row.to(tl.int64) * rows_stride
        right = weight + expert.to(tl.int64) * expert_stride + first_column * width_stride
        left_offsets = row[:, None] * rows_stride + k[None, :]
        right_offsets = k[:, None] * inner_stride + column[None, :] * width_stride
        real_columns = (column < width - first_column)[None, :]
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in range(0, inner, INNER):
            if WHOLE_INNER:
                a = tl.load(left + left_offsets)
                if WHOLE_COLUMNS:
                    b = tl.load(right + right_offsets)
                else:
                    b = tl.load(right + right_offsets, mask=real_columns, other=0.0)
            else:
                real = k < inner - done
                a = tl.load(left + left_offsets, mask=real[None, :], other=0.0)
                b = tl.load(right + right_offsets, mask=real[:, None] & real_columns, other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            left += INNER
            right += INNER * inner_stride
        _store(out, acc, first_row, end, first_column, width, ROWS, COLUMNS)


@triton.jit
def product_by_descriptors(
    rows,
    weight,
    out,
    ends,
    inner,
    width,
    EXPERTS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    INNER: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    INNER_IS_LAST: tl.constexpr,  # noqa: N803
    FLATTEN: tl.constexpr,  # noqa: N803
):
    """`product` with `rows` and `weight` as tensor descriptors, which Hopper's copy engine reads.

    `weight` is (E·width, inner) in tiles of `COLUMNS` by `INNER` if `INNER_IS_LAST`, else
    (E·inner, width) in tiles of `INNER` by `COLUMNS`; `inner` is a multiple of `INNER`. What a tile
    reads past its expert's rows or columns is another's, and not stored. With `FLATTEN`, a
    persistent program reads its next tile while it stores one.
    """
    column_tiles = tl.cdiv(width, COLUMNS)
    experts, row_tiles, upto = _tile_ends(ends, column_tiles, EXPERTS, LANES, ROWS)
    first, last, step = tl.program_id(0), tl.max(upto, 0), tl.num_programs(0)
    for tile in tl.range(first, last, step, flatten=FLATTEN):
        expert, start, end, m, n = _locate(
            ends, tile, upto, row_tiles, column_tiles, experts, GROUP
        )
        first_row, first_column = start + m * ROWS, n * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for done in range(0, inner, INNER):
            a = rows.load([first_row, done])
            if INNER_IS_LAST:
                b = weight.load([expert * width + first_column, done]).T
            else:
                b = weight.load([expert * inner + done, first_column])
            acc = tl.dot(a, b, acc)
        _store(out, acc, first_row, end, first_column, width, ROWS, COLUMNS)


@triton.jit
def outer(
    left,
    right,
    out,
    ends,
    height,
    width,
    left_stride,
    right_stride,
    LEFT: tl.constexpr,  # noqa: N803
    RIGHT: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """`out[e]` (height, width) = the transposed `left` (M, height) by `right` (M, width).

    Over expert e's rows, `ROWS` at a time; zeros for an expert without rows. `ends` (E,) as above.
    """
    column_tiles = tl.cdiv(width, RIGHT)
    tiles = tl.cdiv(height, LEFT) * column_tiles
    tile = tl.program_id(0)
    expert = tile // tiles
    first_left = tile % tiles // column_tiles * LEFT
    first_right = tile % column_tiles * RIGHT
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    row, i, j = tl.arange(0, ROWS), tl.arange(0, LEFT), tl.arange(0, RIGHT)
    a_at = left + start.to(tl.int64) * left_stride + first_left
    b_at = right + start.to(tl.int64) * right_stride + first_right
    a_offsets = i[:, None] + row[None, :] * left_stride
    b_offsets = row[:, None] * right_stride + j[None, :]
    real_i, real_j = (i < height - first_left)[:, None], (j < width - first_right)[None, :]
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    for done in range(start, end, ROWS):
        real = row < end - done
        a = tl.load(a_at + a_offsets, mask=real_i & real[None, :], other=0.0)
        b = tl.load(b_at + b_offsets, mask=real[:, None] & real_j, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += ROWS * left_stride
        b_at += ROWS * right_stride
    at = out + expert.to(tl.int64) * height * width + first_left * width + first_right
    offsets = i[:, None] * width + j[None, :]
    tl.store(at + offsets, acc.to(out.dtype.element_ty), mask=real_i & real_j)
