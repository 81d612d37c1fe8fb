"""Fine-tuning by distillation without data: the float network teaches the quantized one on synthetic images.

`config.py` holds the settings, `student.py` what is learned and how the quantized network runs with it, `losses.py`
what the student is asked for, `step.py` the compiled steps, and `loop.py` the public `finetune`.
"""

from dfq_jax.stages.finetuning.config import FinetuneConfig
from dfq_jax.stages.finetuning.loop import Evaluation, Finetuning, finetune

__all__ = ["Evaluation", "FinetuneConfig", "Finetuning", "finetune"]
