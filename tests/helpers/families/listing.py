"""Which families there are: what transformers' own tables of automatic classes name."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers.models.auto import configuration_auto, modeling_auto

# A class is listed under the first task that has it.
TASKS = {
    "causal": "CAUSAL_LM",
    "sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
    "image and text": "IMAGE_TEXT_TO_TEXT",
    "several media": "MULTIMODAL_LM",
    "masked": "MASKED_LM",
}
# Classes with a loss over the vocabulary that no such table names, or a mixed one.
MORE = {
    "pretraining": {
        "albert": "AlbertForPreTraining",
        "bert": "BertForPreTraining",
        "big_bird": "BigBirdForPreTraining",
        "ernie": "ErnieForPreTraining",
        "flava": "FlavaForPreTraining",
        "fnet": "FNetForPreTraining",
        "lxmert": "LxmertForPreTraining",
        "megatron-bert": "MegatronBertForPreTraining",
        "mobilebert": "MobileBertForPreTraining",
        "roc_bert": "RoCBertForPreTraining",
        "visual_bert": "VisualBertForPreTraining",
    },
    "other": {
        "gpt2": "GPT2DoubleHeadsModel",
        "openai-gpt": "OpenAIGPTDoubleHeadsModel",
        "imagegpt": "ImageGPTForCausalImageModeling",
        "clvp_decoder": "ClvpForCausalLM",
        "speech-encoder-decoder": "SpeechEncoderDecoderModel",
        "rag": "RagTokenForGeneration",
        "vilt": "ViltForMaskedLM",
        "bark": "BarkSemanticModel",
        "seamless_m4t": "SeamlessM4TForSpeechToText",
        "seamless_m4t_v2": "SeamlessM4Tv2ForSpeechToText",
    },
}


class Family(NamedTuple):
    """A class of models, under the name that transformers gives to its configuration."""

    name: str
    task: str
    model: str  # the class

    def config_class(self) -> Any:
        """The class of its configuration."""
        if self.name == "clvp_decoder":
            return transformers.ClvpDecoderConfig
        if self.name == "bark":
            return transformers.models.bark.configuration_bark.BarkSemanticConfig
        return configuration_auto.CONFIG_MAPPING[self.name]

    def model_class(self) -> Any:
        """The class itself, imported."""
        if hasattr(transformers, self.model):
            return getattr(transformers, self.model)
        name = configuration_auto.model_type_to_module_name(self.name)
        return getattr(getattr(transformers.models, name), self.model)


def families() -> list[Family]:
    """All of them, each class of a name once."""
    listed: dict[tuple[str, str], Family] = {}
    for task, table in TASKS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        for name, model in names.items():
            model = model[0] if isinstance(model, tuple) else model
            listed.setdefault((name, model), Family(name, task, model))
    for task, names in MORE.items():
        for name, model in names.items():
            listed.setdefault((name, model), Family(name, task, model))
    return list(listed.values())
