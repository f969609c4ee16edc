"""Tables of tasks: which row a task of a launch belongs to."""

import triton
import triton.language as tl


@triton.jit
def row_of(table, task, rows, halvings, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """The row that ``task`` is one of; the column ``FIRST`` has the first task of each row."""
    begin = 0
    end = rows
    for _ in range(halvings):  # as many as `rows` has bits
        middle = (begin + end) // 2
        before = tl.load(table + middle * COLUMNS + FIRST) <= task
        begin = tl.where(before, middle, begin)
        end = tl.where(before, end, middle)
    return begin
