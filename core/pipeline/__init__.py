"""Pipeline parallelism: schedules as lists of actions, their proofs, the cut into stages."""
