"""What a process that ranks are forked off imports: all that they would, and takes seconds."""

import datasets
import deepspeed
import torch
import transformers

import deepspeed_sdp.engine
import deepspeed_sdp.hf
import deepspeed_sdp.pretraining.run
import deepspeed_sdp.pretraining.sources
import deepspeed_sdp.report

__all__ = ["datasets", "deepspeed", "deepspeed_sdp", "torch", "transformers"]
