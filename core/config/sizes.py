"""Sizes that the engine works with and that `trivium.estimate` counts with: each stands here once.

Plain numbers, no torch. The ones that a user can change are fields of the configuration instead.
"""

# Elements between the starts of two tensors in a flat bucket, and of each rank's share of one:
# a slot starts on a cache line in every dtype.
BUCKET_ALIGNMENT = 64

# Logits that the loss computes at a time, by kind of device. On a CPU 64 MB in fp32: enough rows
# for the products to run at full speed, few enough to be touched again soon.
LOGITS_AT_A_TIME = {"cpu": 1 << 24, "gpu": 1 << 28}

# Elements of an array that one pass of several elementwise steps handles at a time on a CPU, so
# that what it reads and writes stays in a core's cache: AdamW's 64K x 6 arrays x 4 bytes are
# 1.5 MiB.
# On a device a pass takes the whole array: launches cost more there.
ELEMENTS_IN_CACHE = 1 << 16
LOGITS_IN_CACHE = 2 * ELEMENTS_IN_CACHE  # the loss touches fewer arrays
