"""The DeepSpeed extension. Everything that knows DeepSpeed from inside lives here."""

from deepspeed_sdp.engine.deepspeed.dense import DenseEngine, initialize_dense
from deepspeed_sdp.engine.deepspeed.memory import Peak, gradient_peak, model_state_bytes
from deepspeed_sdp.engine.deepspeed.refusals import check_apart, check_supported, zero_stage
from deepspeed_sdp.engine.deepspeed.settings import reduce_bucket_numel
from deepspeed_sdp.engine.deepspeed.start import start_communication
from deepspeed_sdp.engine.engine import SDPEngine
from deepspeed_sdp.engine.initialize import check_copies, check_job, initialize

__all__ = [
    "DenseEngine",
    "Peak",
    "SDPEngine",
    "check_apart",
    "check_copies",
    "check_job",
    "check_supported",
    "gradient_peak",
    "initialize",
    "initialize_dense",
    "model_state_bytes",
    "reduce_bucket_numel",
    "start_communication",
    "zero_stage",
]
