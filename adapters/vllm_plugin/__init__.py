"""foveate inside vLLM: pictures enter vLLM's decoder with fewer tokens, chosen by the same methods as everywhere else.

vLLM finds this package through its entry point ``vllm.general_plugins`` and calls :func:`register` in every process.
The architectures of :data:`ARCHITECTURES` are then served by subclasses of vLLM's own models, which do nothing unless
their configuration has a ``foveate`` entry: ``--hf-overrides '{"foveate": {"pruner": "hiprune", "keep": 0.25}}'``.

How it fits together: vLLM reserves each picture's places before any encoder runs, in another process
(``processor.py``). :class:`~foveate.adapters.vllm_plugin.serving.ServedMethod` counts them from the picture's layout
alone, and later, in the worker, picks exactly so many rows (``model.py``), reading what the method needs from vLLM's
vision towers (``towers.py``). Three-axis positions follow their tokens (``mrope.py``).
"""

from __future__ import annotations

from typing import Any

from foveate import tested

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava:Llava",
    "LlavaNextForConditionalGeneration": "llava:LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava:LlavaOnevision",
    "Qwen2VLForConditionalGeneration": "qwen_vl:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl:Qwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen_vl:Qwen3VL",
}
"""vLLM's architectures that can be pruned, and who serves them: ``module:class`` in this package."""

TESTED = tuple(f"{major}.{minor}" for major, minor in tested.TESTED["vllm"].minors)
"""Minor versions of vLLM whose internals this package knows and was tried with."""


def register() -> None:
    """Make vLLM know the architectures. May run several times in a process, and imports nothing heavy."""
    from vllm import ModelRegistry

    for architecture, home in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{home}")
    _check_at_start(ModelRegistry)


def _check_at_start(registry: Any) -> None:
    """Let vLLM refuse, when it reads a model's configuration, what it would otherwise serve unpruned."""
    inspect = registry.inspect_model_cls
    if hasattr(inspect, "foveate"):
        return

    def checked(architectures: str | list[str], model_config: Any) -> Any:
        given = getattr(model_config.hf_config, "foveate", None)
        if given is not None:
            from foveate.adapters.vllm_plugin.serving import check_front_end, check_start, check_version

            check_front_end()
            check_version()
            check_start(architectures, model_config.hf_config, given, model_config.model_impl)
        _check_requests()
        return inspect(architectures, model_config)

    checked.foveate = True
    registry.inspect_model_cls = checked


def _check_requests() -> None:
    """Let vLLM refuse requests for pruning where one of its own processors, which would not hear them, serves them."""
    from vllm.multimodal.processing import BaseMultiModalProcessor

    apply = BaseMultiModalProcessor.apply
    if hasattr(apply, "foveate"):
        return

    def checked(self: BaseMultiModalProcessor, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs).get("foveate")
        if asked not in (None, False) and not hasattr(self, "foveate"):
            from foveate.errors import ParameterError

            raise ParameterError(
                f"foveate={asked!r}: vLLM serves {self.info.ctx.model_config.architecture} with {type(self).__name__}, "
                "which foveate cannot prune; leave it out of mm_processor_kwargs to ask the model unpruned"
            )
        return apply(self, inputs, *args, **kwargs)

    checked.foveate = True
    BaseMultiModalProcessor.apply = checked
