"""Fine-tuning: weights and intervals of a calibrated model learn together (quantization-aware training)."""

from ptq_tdq.finetuning.config import KEEP, FinetuneConfig
from ptq_tdq.finetuning.quantizers import Quantizer
from ptq_tdq.finetuning.run import check_start, disk_bytes, finetune, recipe
from ptq_tdq.finetuning.train import IterationReport

__all__ = [
    "KEEP",
    "FinetuneConfig",
    "IterationReport",
    "Quantizer",
    "check_start",
    "disk_bytes",
    "finetune",
    "recipe",
]
