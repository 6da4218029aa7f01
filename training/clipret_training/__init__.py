"""Fine-tuning of CLIP models with torch, open_clip and peft."""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
