"""The table of supported model families. A family is one line; no code elsewhere knows a name.

In every one of them `Model` (or the language model inside it) calls a pipelined inner model,
whose last act is to give all ranks the hidden states of rank 0, and then runs the head on them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

LOOPS_MODULE = "mlx_lm.generate"
"""mlx-lm's module with the generation loops."""
LOADING_MODULE = "mlx_lm.utils"
"""mlx-lm's module with `sharded_load`."""
MODELS_PACKAGE = "mlx_lm.models"


class Family(NamedTuple):
    """Where one module of ``mlx_lm.models`` keeps its head and its pipelined inner model.

    Paths are attribute paths, "" for the object itself.
    """

    name: str
    """The module, and what `model_type` says in most of its checkpoints."""

    head_class: str = "Model"
    """The class whose ``__call__`` runs the head: the *head owner*."""

    stage_class: str = ""
    """The pipelined class: it has ``pipeline_rank``, receives, runs this rank's layers, sends."""

    owner: str = ""
    """From the `Model` that mlx-lm loads to the head owner."""

    stage: str = "model"
    """From the head owner to the pipelined model."""

    embedding: str = "embed_tokens"
    """From the pipelined model to the embedding, which is the head too where the two are tied."""

    base: str = ""
    """The family whose pipelined class this one uses. Without a `stage_class` (`is_alias`) the
    `Model` too is the base family's, or inherits from it."""

    @property
    def module(self) -> str:
        return f"{MODELS_PACKAGE}.{self.name}"

    @property
    def is_alias(self) -> bool:
        return not self.stage_class

    def owner_of(self, model: Any) -> Any:
        """The head owner within a loaded model."""
        return attrgetter(self.owner)(model) if self.owner else model

    def stage_of(self, owner: Any) -> Any:
        """The pipelined model within a head owner."""
        return attrgetter(self.stage)(owner)

    def head_of(self, owner: Any) -> Any:
        """The module that makes logits: `lm_head`, or the embedding where there is none (tied)."""
        name = self.embedding if self.is_tied(owner) else "lm_head"
        return attrgetter(name)(self.parent_of(owner, name))

    def is_tied(self, owner: Any) -> bool:
        """Whether the embedding is the head too."""
        return getattr(owner, "lm_head", None) is None

    def parent_of(self, owner: Any, name: str) -> Any:
        """The module that has ``lm_head``, or the embedding or the final norm, by that name."""
        return owner if name == "lm_head" else self.stage_of(owner)


FAMILIES = (
    Family("bailing_hybrid", stage_class="LanguageModel", embedding="word_embeddings"),
    Family("deepseek_v2", stage_class="DeepseekV2Model"),
    Family("deepseek_v3", stage_class="DeepseekV3Model"),
    Family("deepseek_v32", stage_class="DeepseekV32Model"),
    Family("deepseek_v41", stage_class="TextModel"),
    Family("glm4_moe", stage_class="LanguageModel"),
    Family("glm4_moe_lite", stage_class="Glm4MoeLiteModel"),
    Family("glm_moe_dsa", base="deepseek_v32"),
    Family("kimi_k25", "LanguageModel", "DeepseekV3Model", "language_model", base="deepseek_v3"),
    Family("kimi_k3", "LanguageModel", "KimiK3TextModel", owner="language_model"),
    Family("minimax_m3_vl", "LanguageModel", "TextModel", owner="language_model"),
    Family("ministral3", stage_class="LanguageModel"),
    Family("mistral4", stage_class="Mistral4Model"),
    Family("muse_spark", stage_class="MuseSparkTextModel", stage="model.language_model"),
    Family("prism_hadamard_qwen35", base="qwen3_5"),
    Family("qwen2", stage_class="Qwen2Model"),
    Family("qwen3_5", "TextModel", "Qwen3_5TextModel", owner="language_model"),
    Family("qwen3_5_moe", base="qwen3_5"),
    Family("qwen3_moe", stage_class="Qwen3MoeModel"),
    Family("qwen3_next", stage_class="Qwen3NextModel"),
    Family("solar_open", base="glm4_moe"),
)

BY_NAME = {family.name: family for family in FAMILIES}


def family_of(model: Any) -> Family | None:
    """The family of `model`, as mlx-lm loads it: by its class, or one that it inherits from."""
    for cls in type(model).__mro__:
        package, _, name = cls.__module__.rpartition(".")
        family = BY_NAME.get(name) if package == MODELS_PACKAGE else None
        if family is not None and not family.is_alias and cls.__name__ == "Model":
            return family
    return None


def stage_in(model: Any) -> Any:
    """The pipelined model in `model`; None if it is of no family of the table, or not split."""
    family = family_of(model)
    try:
        stage = family and family.stage_of(family.owner_of(model))
    except AttributeError:  # a class that inherits and is built otherwise
        return None
    return stage if getattr(stage, "pipeline_size", 1) > 1 else None
