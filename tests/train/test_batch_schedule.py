"""The batch is a function of progress."""

from trivium.config import BatchConfig
from trivium.train.schedule import BatchSchedule, GlobalBatch, Progress

CONFIG = BatchConfig(seq_length=32, micro_batch_size=2, global_batch_size=24, train_iters=10)


def test_a_batch_is_shared_out_over_the_data_parallel_ranks():
    for ranks, num_microbatches in ((1, 12), (3, 4), (12, 1)):
        batch = BatchSchedule(CONFIG, ranks).batch_at(Progress())
        assert batch == GlobalBatch(24, num_microbatches, 32)
        assert batch.tokens == 24 * 32


def test_progress_counts_what_a_batch_holds():
    schedule, progress = BatchSchedule(CONFIG, 2), Progress()
    for _ in range(3):
        progress = progress.after(schedule.batch_at(progress))
    assert progress == Progress(3, 72, 72 * 32)


def test_samples_of_the_whole_run_and_of_the_rest():
    schedule = BatchSchedule(CONFIG, 1)
    assert schedule.samples_from(Progress()) == 240
    # Four updates of another size before: six of this size are left.
    assert schedule.samples_from(Progress(4, 1000, 32000)) == 1000 + 6 * 24
