"""What the fork server loads once for all ranks that it starts."""

import torch.distributed  # noqa: F401
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: F401

import placer.runtime.generate  # noqa: F401
