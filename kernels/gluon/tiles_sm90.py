"""Which tiles a block of threads takes: its one, or with PERSISTENT many of all.

A tile's begin and end then run under the products of another, and no block of threads has to start for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # query rows, or keys, of one consumer: the M of one wgmma


@gluon.jit
def tile_of_turn(turn, PERSISTENT: gl.constexpr):
    """Return which tile this block of threads takes next: there and back again, since they are in order of weight."""
    index = gl.program_id(0)
    if PERSISTENT:
        index = gl.where(turn % 2 == 0, index, gl.num_programs(0) - 1 - index) + turn * gl.num_programs(0)
    return index


@gluon.jit
def turns(total, PERSISTENT: gl.constexpr):
    """Return how many of all tiles this block takes; one that the compiler knows to be one costs fewer registers."""
    if PERSISTENT:
        each = total // gl.num_programs(0)
        return each + gl.where(tile_of_turn(each, True) < total, 1, 0)
    else:
        return 1
