"""From a GGUF file to a Hugging Face checkpoint, since vLLM's CPU backend reads no GGUF."""

from __future__ import annotations

import os
from pathlib import Path


def quiet_transformers() -> None:
    """Keeps transformers off the network and its progress bars and advice off the terminal.

    To be called before transformers is first imported.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def gguf_to_safetensors(gguf: Path, out: Path) -> None:
    """Writes the model of `gguf` to the existing directory `out`, dequantised to bf16.

    Config, generation config, tokenizer and chat template come from the GGUF's metadata. Blocks for some
    seconds per 100 MB; needs about 6 bytes of memory a parameter.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    # save_pretrained refuses a model that still says it is quantised, though its weights no longer are.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(out)
    model.generation_config.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for setting in ("is_local", "local_files_only"):  # how it was loaded is no property of the tokenizer
        tokenizer.init_kwargs.pop(setting, None)
    tokenizer.save_pretrained(out)
