"""Where a kernel finds what: the places of its table of int64, and the flags."""

COUNTER = 0  # of the threads that came; alone in its cache line, since every thread writes it
CHUNKS = 8
STEP = 9  # planes, channels or images a chunk
BATCH = 10
CHANNELS = 11
SIZE = 12  # K
FLAGS = 13
REGIONS = 14  # one for each thread that is expected
ARGS = 15  # from here on: addresses
COUNTERS = 48  # from here on: how many chunks of each region are taken
LINE = 8  # int64 in a cache line

# What the first pass gathers: the extrema with their positions and the first value.
MOMENTS = 1
EXTREMA = 2
POSITIONS = 4
# What the last pass reads.
WITH_Z = 1
WITH_SPIKES = 2
# The tail without gate and residual, relu(norm(z)): its mask follows from z, its coefficients are
# the channel's.
RECTIFIED = 4
BY_VALUE = 8  # spikes fall on the first value that is an extremum, not on its position
# Of the norm: whether its statistics are the batch's, and what it has.
SHARED = 16
WEIGHT = 32
BIAS = 64
RUNNING = 128
# Which gradients reach the statistics; what is wanted; whether there is a gate.
MEAN = 1
VAR = 2
HIGH = 4
LOW = 8
SUMS = 32
COEFFICIENTS = 64
GATED = 128
