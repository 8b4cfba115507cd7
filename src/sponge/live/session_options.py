"""Session options: what can be read from a user's session, and how a session of a given width is configured.

ONNX Runtime fixes the number of threads when a session is created, so each width needs options of its own. It has no
call to copy options and keeps part of them unreadable; what is readable is copied here by name, and the rest becomes
a note, so that nothing is lost silently. The user's own options object is never changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import onnxruntime as ort

PLAIN_ATTRIBUTES = (
    "enable_cpu_mem_arena",
    "enable_mem_reuse",
    "execution_mode",
    "execution_order",
    "graph_optimization_level",
    "inter_op_num_threads",
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "use_deterministic_compute",
)

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"

CONFIG_KEYS = (
    EXTERNAL_DATA_FOLDER,
    "mlas.disable_kleidiai",
    "mlas.qnbit.force_fp32",
    "mlas.use_lut_gemm",
    "optimization.disable_specified_optimizers",
    "optimization.enable_cast_chain_elimination",
    "optimization.enable_gelu_approximation",
    "optimization.minimal_build_optimizations",
    "session.allow_released_opsets_only",
    "session.disable_aot_function_inlining",
    "session.disable_cpu_ep_fallback",
    "session.disable_double_qdq_remover",
    "session.disable_prepacking",
    "session.disable_qdq_constant_folding",
    "session.disable_quant_qdq",
    "session.dynamic_block_base",
    "session.enable_dq_matmulnbits_fusion",
    "session.enable_quant_qdq_cleanup",
    "session.force_spinning_stop",
    "session.graph_optimizations_loop_level",
    "session.inter_op.allow_spinning",
    "session.inter_op.spin_duration_us",
    "session.intra_op.spin_backoff_max",
    "session.intra_op.spin_duration_us",
    "session.load_model_format",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdq_matmulnbits_block_size",
    "session.qdqisint8allowed",
    "session.set_denormal_as_zero",
    "session.strict_shape_type_inference",
    "session.use_device_allocator_for_initializers",
    "session.x64quantprecision",
)
"""Entries that are copied from a user's session. ONNX Runtime can answer for one key at a time but not list them."""

SAVED_MODEL_DROPS = (EXTERNAL_DATA_FOLDER, "session.load_model_format", "session.strict_shape_type_inference")
"""Entries that speak of the original file and would be wrong for the optimised one saved from it."""

UNREADABLE_NOTE = (
    "ONNX Runtime does not tell whether initializers were added to the wrapped session by hand or optimizers disabled "
    "by name; if so, that is not kept"
)
"""A custom-op library that was not passed again needs no note: the model then fails to load."""

_arena_lock = threading.Lock()
_arena_shared = False


@attrs.frozen(kw_only=True)
class SessionSettings:
    """Everything about a session but its model and its number of threads."""

    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    config: Mapping[str, str] = attrs.field(factory=dict)
    providers: Sequence[Any] = ("CPUExecutionProvider",)
    """Names, or pairs of name and options."""
    custom_op_libraries: tuple[str, ...] = ()
    free_dimensions: Mapping[str, int] = attrs.field(factory=dict)
    spinning: bool = False
    notes: tuple[str, ...] = ()

    @property
    def on_cpu_only(self) -> bool:
        """Whether only providers are used that leave the whole model to ONNX Runtime's own CPU kernels."""
        names = {provider if isinstance(provider, str) else provider[0] for provider in self.providers}
        return names <= {"CPUExecutionProvider", "AzureExecutionProvider"}

    def identity(self) -> str:
        """Return a text that differs whenever the optimised form of a model may differ."""
        kept = sorted((name, str(value)) for name, value in self.attributes.items() if not name.startswith("log"))
        libraries = [(path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in self.custom_op_libraries]
        free_dimensions = sorted(self.free_dimensions.items())
        return repr((kept, sorted(self.config.items()), list(self.providers), libraries, free_dimensions))

    def options(self, threads: int) -> Any:
        """Return new ``SessionOptions`` for a session of *threads* intra-op threads, the caller's among them."""
        options = ort.SessionOptions()
        for name, value in self.attributes.items():
            setattr(options, name, value)
        options.intra_op_num_threads = threads
        # Patterns are learnt anew for every batch size, by one more slow run each; they gained nothing in speed.
        options.enable_mem_pattern = False
        for library in self.custom_op_libraries:
            options.register_custom_ops_library(library)
        for name, size in self.free_dimensions.items():
            options.add_free_dimension_override_by_name(name, size)
        for key, entry in self.config.items():
            options.add_session_config_entry(key, entry)
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        if self.attributes.get("enable_cpu_mem_arena", True) and share_arena():
            options.add_session_config_entry("session.use_env_allocators", "1")
        return options

    def saving_options(self, path: str, weights_name: str, min_bytes: int) -> Any:
        """Return options that make a session write its optimised model to *path*, the weights to a file beside it."""
        options = self.options(1)
        options.optimized_model_filepath = path
        # The warning that the file suits this kind of CPU only is what the cache key takes care of.
        options.log_severity_level = 3
        prefix = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{prefix}_file_name", weights_name)
        options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(min_bytes))
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        return options

    def for_saved_model(self) -> SessionSettings:
        """Return the settings to load an optimised model: as it is, since optimising again would copy its weights."""
        config = {key: entry for key, entry in self.config.items() if key not in SAVED_MODEL_DROPS}
        level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        attributes = {**self.attributes, "graph_optimization_level": level}
        if attributes.get("log_severity_level", -1) == -1:
            # Not chosen by the user: a warning about the model would come again with every one of many sessions.
            attributes["log_severity_level"] = 3
        return attrs.evolve(self, attributes=attributes, config=config, free_dimensions={})


def read_settings(session: Any) -> SessionSettings:
    """Read from an ``InferenceSession`` all that ONNX Runtime lets us read."""
    options = session.get_session_options()
    attributes = {name: getattr(options, name) for name in PLAIN_ATTRIBUTES if hasattr(options, name)}
    config = {}
    for key in CONFIG_KEYS:
        entry = _config_entry(options, key)
        if entry is not None:
            config[key] = entry
    notes = [UNREADABLE_NOTE]
    if options.execution_mode == ort.ExecutionMode.ORT_PARALLEL:
        notes.append("execution_mode is parallel: the inter-op threads of each session come on top of its width")
    if options.enable_profiling:
        notes.append("enable_profiling is not kept: every session would write a trace of its own")
    if options.optimized_model_filepath:
        notes.append(
            f"optimized_model_filepath ({options.optimized_model_filepath}) is not kept: it was written already"
        )
    if _config_entry(options, "session.intra_op_thread_affinities"):
        notes.append("session.intra_op_thread_affinities is not kept: it fits a single number of threads")
    if not getattr(options, "use_per_session_threads", True):
        notes.append("the global thread pool is not used: each width needs threads of its own")
    provider_options = session.get_provider_options()
    providers = [(name, dict(provider_options.get(name) or {})) for name in session.get_providers()]
    return SessionSettings(attributes=attributes, config=config, providers=providers, notes=tuple(notes))


def _config_entry(options: Any, key: str) -> str | None:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:  # how ONNX Runtime says that the key is not set
        return None


def share_arena() -> bool:
    """Register one CPU arena for all sessions of the process, once; return whether there is one.

    Sessions that run after one another then reuse the same memory for their intermediate tensors, where an arena each
    would keep as much memory per session as its largest batch ever needed.
    """
    global _arena_shared
    with _arena_lock:
        if not _arena_shared:
            kind, use = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
            try:
                ort.create_and_register_allocator(
                    ort.OrtMemoryInfo("Cpu", kind, 0, use), ort.OrtArenaCfg(0, -1, -1, -1)
                )
            except Exception as error:  # ONNX Runtime raises plain RuntimeError and its own classes alike
                if "already" not in str(error):
                    return False
            _arena_shared = True
    return True
