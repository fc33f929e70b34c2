"""The model and running it: configuration, model, processor, media, export."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .config import FoveateConfig
from .model import FoveateForConditionalGeneration
from .processor import FoveateProcessor

AutoConfig.register("foveate", FoveateConfig, exist_ok=True)
AutoModel.register(FoveateConfig, FoveateForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(FoveateConfig, FoveateForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(FoveateConfig, FoveateForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FoveateConfig, FoveateProcessor, exist_ok=True)

__all__ = ["FoveateConfig", "FoveateForConditionalGeneration", "FoveateProcessor"]
