"""Register the models with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig


def register() -> None:
    """Register configurations and models; may be called more than once."""
    AutoConfig.register("calm_autoencoder", CalmAutoencoderConfig, exist_ok=True)
    AutoConfig.register("calm", CalmConfig, exist_ok=True)
    AutoModel.register(CalmAutoencoderConfig, CalmAutoencoder, exist_ok=True)
    AutoModel.register(CalmConfig, CalmForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)
