"""The instruction row: 64 int64 fields that tell the compiled loop what to do. Strides are bytes, pointers addresses.

Output pixels are not listed here one by one: ``TILES`` points to the row's items, made once when the program is frozen:
tiles that cover one image (int32 quadruples), or numbers (int32) of vectors or of rows of pixels.
"""

from __future__ import annotations

from enum import IntEnum

ROW_FIELDS = 64
ROW_BYTES = 8 * ROW_FIELDS


class Op(IntEnum):
    """What a row does."""

    BLOCK = 1  # convolution, lanes = 16 filters
    PLANAR = 2  # gather a buffer into pixel-major planes
    CSR = 3  # convolution over planes, lanes = pixels
    ADD = 4  # elementwise: out = curve(floor(x · scale + shift + y)), or · y
    POOL = 5  # window maximum or mean
    INPUT = 6  # user's NCHW tensor → buffer
    OUTPUT = 7  # buffer → user's NCHW tensor
    DEPTHWISE = 8  # convolution of every channel by itself, lanes = 16 channels


class Field(IntEnum):
    """Index of a field in a row; ``8 * field`` is its byte offset."""

    OP = 0
    X = 1  # address of the element that tap (0, 0) of output pixel (0, 0) reads, image 0
    X_IMAGE = 2
    X_ROW = 3  # from one output row to the next
    X_STEP = 4  # from one output column to the next
    OUT = 5
    OUT_IMAGE = 6
    OUT_ROW = 7
    OUT_STEP = 8
    RES = 9  # residual, 0 if none
    RES_IMAGE = 10
    RES_ROW = 11
    RES_STEP = 12
    BIAS = 13
    RELU = 14
    TILES = 15  # block: (variant, x, out, res) byte offsets; csr: (variant, first position, vectors, first pixel index)
    N_TILES = 16
    GROUPS = 17  # groups of filters: 16 · vectors each (block), 16 each (csr)
    VECTORS = 18
    POINTERS = 19  # block: int64[groups + 1]; csr: int32[filters · blocks · shifts + 1]
    ENTRIES = 20  # block: int32 byte offsets; csr: {int32 byte offset, float32 weight}
    WEIGHTS = 21
    SHIFTS = 22  # csr: lane-shift groups of a filter
    WORK = 23  # planes, workspace of one image
    WORK_IMAGE = 24
    PLANE = 25  # bytes of one channel's planes
    PIXELS = 26  # int32 byte offset of every position's source pixel (planar), output pixel or -1 (csr)
    SCRATCH = 28  # csr: filter-major tile before the transpose, per thread
    SCRATCH_THREAD = 29
    RES_PIXELS = 30
    WORK_THREAD = 31
    CHANNELS = 32  # real channels (input, output, planar) or vectors of channels (add, pool)
    HEIGHT = 33  # of the output
    WIDTH = 34
    Y = 35
    Y_IMAGE = 36
    Y_ROW = 37
    WINDOW_H = 38
    WINDOW_W = 39
    STRIDE_H = 40
    STRIDE_W = 41
    PAD_H = 42
    PAD_W = 43
    MEAN = 44  # pool: 0 maximum, 1 mean of the window, 2 mean of what of it lies inside the map
    IN_HEIGHT = 45
    IN_WIDTH = 46
    BLOCKS = 47  # csr: blocks of input channels
    CAP = 48  # bits of the float32 that results are cut at
    CURVE = 49  # elementwise: a Curve
    SCALE = 50  # elementwise: float32 per channel, 0 if none
    SHIFT = 51
    TIMES = 52  # elementwise: 1 multiplies by y, 0 adds it
    TAP_ROW = 53  # depthwise: from one tap to the next below
    TAP_STEP = 54  # depthwise: from one tap to the next beside
    BANDS = 55  # int32[threads][4]: a thread's first item, its first inner one, its end; 0: all share all units
    WAIT = 56  # before the row: number that the neighbours must have announced, 0 for none, -1: all threads meet
    MARK = 57  # announced when the edge items are done; 0 for nothing
    VARIANT = 58  # depthwise: its tile, of VECTORS pixels
    SLOPE = 59  # leaky curve: bits of the float32 that negative numbers are multiplied by


class Curve(IntEnum):
    """Activations that take more than a floor and a ceiling."""

    NONE = 0
    HARDSWISH = 1  # x · hardsigmoid(x)
    HARDSIGMOID = 2  # min(max(x + 3, 0), 6) / 6
    SILU = 3  # x · sigmoid(x)
    SIGMOID = 4
    LEAKY = 5  # x, or slope · x where that is negative


class Control(IntEnum):
    """Index of an int64 in the control block that the threads of a program share; a cache line (8) apart."""

    SOURCE = 0  # address of the user's input; + 1 if its memory is channels-last
    TARGET = 1  # address of the user's output; likewise
    REPEATS = 2
    TIMES = 3  # address of int64 nanoseconds, or 0
    PROFILE = 4  # 1: TIMES holds one number per run and row, 0: per run
    TABLE = 5
    N_ROWS = 6
    THREADS = 7
    EPOCH = 8  # counts runs; workers wait for it to change
    ARRIVED = 16  # barrier: threads that arrived
    PHASE = 24  # barrier: counts openings
    STOP = 32
    BATCH = 33
    CHUNK = 34  # images that go through all rows together
    BY_IMAGE = 35  # 1: every thread has its own images, 0: all share the work of every row
    STATE = 40  # + 16 · thread: 1 while that worker sleeps; 8 further on: what that thread has announced


def control_size(threads: int) -> int:
    """Return the number of int64 in the control block of ``threads`` threads."""
    return Control.STATE + 16 * (threads + 1)
