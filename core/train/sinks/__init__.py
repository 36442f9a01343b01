"""The places that a run's rows go to: the console, a file of JSON lines, TensorBoard, a picture.

Each is one class behind `report.ReportSink`. A new one is a class here and a line in `open_sinks`.
"""

from ...config import Config
from ..report import ReportSink
from .console import Console
from .jsonl import MetricsFile, metrics_path
from .loss_curve import LossCurve
from .tensorboard import TensorBoard


def open_sinks(config: Config, iteration: int) -> list[ReportSink]:
    """Open every sink that the configuration asks for; rank 0 alone does.

    iteration: the run goes on from here; what a sink already holds of later ones is dropped.
    """
    metrics, tensorboard = metrics_path(config), config.logging.tensorboard_dir
    sinks: list[ReportSink] = [Console(config, iteration)]
    if metrics:
        sinks.append(MetricsFile(metrics, iteration))
    if tensorboard:
        sinks.append(TensorBoard(tensorboard, iteration))
    if metrics:
        sinks.append(LossCurve(metrics))  # after the file that it is drawn from
    return sinks
