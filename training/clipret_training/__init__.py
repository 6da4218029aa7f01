"""The training: torch, open_clip, peft."""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
