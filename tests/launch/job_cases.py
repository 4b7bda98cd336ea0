"""On ranks: jobs of launch/train.py that are refused before they have an engine."""

import importlib.util
from contextlib import closing

import torch.distributed as dist

from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.pretraining.options import parse_run
from deepspeed_sdp.pretraining.run import pretrain
from deepspeed_sdp.stopping import StopRequest
from tests.launch.jobs import TRAIN


def refused(of_ranks):
    """What it says, ``of_ranks`` being the arguments of each; ``None``: it trained."""
    spec = importlib.util.spec_from_file_location("launch_train", TRAIN)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    args = parse_run(train.make_parser(), of_ranks[dist.get_rank()])
    with closing(StopRequest()) as stop:
        try:
            pretrain(args, train.read, stop)
        except SDPError as error:
            return str(error)
    return None
