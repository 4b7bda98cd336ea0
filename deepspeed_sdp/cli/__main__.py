"""``python -m deepspeed_sdp.cli``."""

import sys

from deepspeed_sdp.cli import main

sys.exit(main())
