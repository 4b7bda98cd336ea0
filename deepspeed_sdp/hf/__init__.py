"""SDP in HuggingFace's Trainer and in accelerate.

``SDPTrainer`` is a ``transformers.Trainer``; ``enable()`` brings the same to ``Trainer`` itself, to what inherits from
it, and to ``accelerator.prepare``. The SDP block stands in the DeepSpeed config.
"""

from deepspeed_sdp.hf.routing import build_whole_models, disable, enable
from deepspeed_sdp.hf.trainer import SDPTrainer

__all__ = ["SDPTrainer", "disable", "enable"]

# A script parses TrainingArguments, and then builds its model, before anything here is called.
build_whole_models()
