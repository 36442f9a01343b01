"""Pipeline parallelism: schedules as lists of actions, their proofs, and the cut of the layers into stages."""
