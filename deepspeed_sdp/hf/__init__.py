"""SDP in HuggingFace's Trainer and in accelerate.

``SDPTrainer`` is a ``transformers.Trainer``; ``enable()`` brings the same to ``Trainer`` itself, to what inherits from
it, and to ``accelerator.prepare``. The SDP block stands in the DeepSpeed config.
"""

from deepspeed_sdp.hf.routing import enable
from deepspeed_sdp.hf.trainer import SDPTrainer

__all__ = ["SDPTrainer", "enable"]
